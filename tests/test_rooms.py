"""What import-linter cannot say: `models/` and the schedulers never touch torch.distributed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("models/**/*.py"), *ROOT.glob("parallel/schedule/*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_torch_distributed(path):
    assert not re.search(r"torch\.distributed|from torch import .*\bdistributed\b", _code(path)), path


def _code(path: Path) -> str:
    return re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
