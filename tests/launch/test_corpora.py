"""A run says of its corpus before it starts: what is left out, and how a single text is divided."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.stores import card
from launch.config.compose import composed
from launch.preflight import init_from
from launch.preflight.corpus import open_batches
from train.checkpoints import checkpoint
from train.run_config import ObjectConfig

KEYS = {"_target_": "data.Data", "max_length": 64, "heldout_tokens": 128}


def opened(monkeypatch: pytest.MonkeyPatch, **keys: Any) -> tuple[Any, list[str]]:
    """The batches of a run on such data, and the lines before its first step."""
    monkeypatch.setattr(card, "draw", lambda *_: None)
    lines: list[str] = []
    config = composed(["train.batch_tokens=128"])
    config = replace(config, data=ObjectConfig({**KEYS, **keys}))
    return open_batches(config, 257, lines.append), lines


def said(monkeypatch: pytest.MonkeyPatch, **keys: Any) -> list[str]:
    return opened(monkeypatch, **keys)[1]


def test_a_run_says_what_is_left_out_and_how_a_text_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"text " * 400)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "linked").symlink_to(tmp_path)
    keys = {"corpus": "text", "path": str(folder), "store": str(tmp_path / "store")}
    first = said(monkeypatch, **keys)
    assert first[0] == "data: left out: 1 not text, 1 linked folders"
    assert first[1].startswith(
        "data.path: too few documents to hold out whole ones by data.heldout=0.03: of the docume"
    )
    (folder / "linked").unlink()
    (folder / ".hidden").touch()
    assert said(monkeypatch, **keys)[0] == "data: left out: 1 not text, 1 hidden files or folders"
    mixed = {"a": {"_target_": "data.Portion", "data": {**KEYS, **keys}}}
    lines = said(monkeypatch, _target_="data.Mixture", sources=mixed)
    assert lines[0] == "data.sources.a.data: left out: 1 not text, 1 hidden files or folders"
    assert lines[1].startswith("data.sources.a.data.path: too few documents")


def test_a_run_on_a_damaged_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"text " * 400)
    keys = {"corpus": "text", "path": str(tmp_path / "a.txt"), "store": str(tmp_path / "store")}
    said(monkeypatch, **keys)
    content = bytearray((tmp_path / "store" / "tokens.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "store" / "tokens.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"^data\.store=.*: tokens\.bin is not what was written .bytes 0 to 4,002 are"):
        said(monkeypatch, **keys)
    with pytest.raises(ValueError, match=r"^data\.store=.*: tokens\.bin is not what was written"):
        said(monkeypatch, corpus="store", store=keys["store"])


def test_weights_that_were_trained_on_what_would_be_held_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"text " * 400)
    keys = {"corpus": "text", "path": str(tmp_path / "a.txt"), "store": str(tmp_path / "store")}
    less, more = (opened(monkeypatch, heldout=share, **keys)[0] for share in (0.05, 0.2))
    for trained, batches, refused in ((less, more, True), (more, less, False), (less, less, False)):
        facts = {"format": checkpoint.FORMAT, "step": 1, "model": {}, "files": {}, "order": dict(trained.order)}
        facts["order"].pop("data.heldout")  # as of an earlier version: the cut alone has to tell
        (tmp_path / checkpoint.MANIFEST).write_text(json.dumps(facts))
        if not refused:
            init_from.still_held_out(tmp_path, batches, print)
            continue
        with pytest.raises(ValueError, match=r"^data\.heldout=0\.2: must be .* was trained on what it would hold out"):
            init_from.still_held_out(tmp_path, batches, print)
