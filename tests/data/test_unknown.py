"""Text that a tokenizer does not know is counted, in the card and for whoever trains."""

import os
from pathlib import Path
from typing import Any

import pytest

from data.loader import Data
from data.stores import card
from data.stores.store import Store
from tests.data import write

tokenizers = pytest.importorskip("tokenizers")


def letters(path: Path, unknown: str | None) -> str:
    """A tokenizer.json of the letters a to e, and of whatever stands for others."""
    vocabulary = {letter: i for i, letter in enumerate(["<eos>", *"abcde", *([unknown] if unknown else [])])}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], **({"unk_token": unknown} if unknown else {}))
    tokenizers.Tokenizer(model).save(str(path))
    return str(path)


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_unknown_text_is_counted(tmp_path: Path, unknown: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "draw", lambda *_: None)
    texts = write(tmp_path / "texts", [b"abcxde", "aübz".encode(), b"abc"])
    keys: dict[str, Any] = {"store": str(tmp_path / "store"), "tokenizer": letters(tmp_path / "t.json", unknown)}
    data = Data(corpus="text", path=str(texts), **keys)
    folder = data.prepare()
    tokens = Store(folder).card["tokens"]
    assert Store(folder).card["unknown"] == 3
    assert data.left_out(folder) == {f"of {tokens} tokens unknown to the tokenizer": 3}


def test_a_pipe_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder/tokenizer.json"):
        os.mkfifo(tmp_path / name)
    texts = write(tmp_path / "texts", [b"text"])
    with pytest.raises(ValueError, match=r"^data\.tokenizer=xxx.*: cannot be looked up .File name too long"):
        Data(corpus="text", path=str(texts), tokenizer="x" * 300).check()
    with pytest.raises(ValueError, match=r"^data\.local=/dev/zero: is a device"):
        Data(corpus="text", path=str(texts), local="/dev/zero").check()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=r"^data\.tokenizer=.*: is a pipe; must be a regular file or a folder"):
            Data(corpus="text", path=str(texts), tokenizer=str(tmp_path / name)).check()
