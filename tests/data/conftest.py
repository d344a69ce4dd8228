"""Properties are tried on the same examples every time, and leave no files; FARSPAN_EXAMPLES says how many. Stores
that tests build have a picture that is not drawn, but in a module that says PICTURES = True."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from data.stores import card

EXAMPLES = int(os.environ.get("FARSPAN_EXAMPLES", 25))
settings.register_profile("farspan", max_examples=EXAMPLES, database=None, derandomize=True, deadline=None)
settings.load_profile("farspan")


@pytest.fixture(scope="module", autouse=True)
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """A picture takes a quarter of a second, all else of a small store a hundredth."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "PICTURES", False):
            patch.setattr(card, "draw", _blank)
        yield


def _blank(bars: Any, title: str, path: Path) -> None:
    path.write_bytes(b"")
