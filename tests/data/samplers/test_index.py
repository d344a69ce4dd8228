"""An index is a cache: one that is damaged is made again, the same."""

from pathlib import Path
from typing import Any

import pytest

from data.samplers.documents import Documents
from tests.data.fake import Store


def flipped(content: bytes) -> bytes:
    return content[:9] + bytes([content[9] ^ 1]) + content[10:]


@pytest.mark.parametrize("name", ["ids.bin", "edges.bin", "index.json"])
@pytest.mark.parametrize("harm", [flipped, lambda content: content[:-8], lambda content: b"[]", lambda content: b""])
def test_a_damaged_index_is_made_again(tmp_path: Path, name: str, harm: Any) -> None:
    store = Store(tmp_path, [5 + i for i in range(40)])
    documents = Documents(store, side="train", heldout=0.01)
    expected = documents.ids.tolist(), documents.edges.tolist()
    (folder,) = (tmp_path / "store.index").glob("[0-9a-f]*")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(harm(whole))
    again = Documents(store, side="train", heldout=0.01)
    assert (again.ids.tolist(), again.edges.tolist()) == expected
    assert (folder / name).read_bytes() == whole
