"""Generated documents and headers as a user meets them: prepared, and trained on beside text."""

import json
import re
from pathlib import Path

import pytest

from data.stores.store import Store
from launch.cli import main

pytestmark = pytest.mark.e2e
SMALL = [
    "experiment=smoke",
    "cluster=none",
    "cluster.workers=1",
    "cluster.threads=1",
    "tracking.mode=disabled",
    "model.dim=32",
    "model.blocks.gla.mixer.heads=2",
    "model.blocks.gdn.mixer.heads=2",
    "data.max_length=512",
    "data.packing=best_fit",
    "data.heldout=0.1",
    "data.heldout_tokens=2048",
    "train.batch_tokens=1024",
    "train.tokens=4096",
]
PLACES = (("path", ""), ("store", "-store"))


def beside(name: str, weight: float) -> str:
    """A source of a mixture, as it is written on the command line."""
    corpus = f"_target_: data.Data, corpus: {name}, documents: 200, lengths: [128, 512], store: {name}"
    return f"+data.sources.{name}={{_target_: data.Portion, weight: {weight}, data: {{{corpus}}}}}"


def test_needles_are_prepared(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["data=needles", "data.documents=200", "data.lengths=[128,1024]", "data.store=store"]
    assert main(["prepare", *asked]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^documents   200 from 1 sources, 0 of them copies$", out, re.MULTILINE)
    store = Store(tmp_path / "store")
    texts = [store.tokenizer.decode(store.document(n)).decode() for n in range(200)]
    assert all(128 <= len(text) + 1 <= 1024 and re.search(r"The pass key is \d{5}$", text) for text in texts)
    assert store.card["identity"]["corpus"] == "needles" and store.card["identity"]["documents"] == 200


def test_headers_are_prepared_and_count_what_they_leave_out(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "data=headers", "data.store=store"]) == 0
    assert re.search(r"^left out    \d+ generated$", capfd.readouterr().out, re.MULTILINE)
    assert Store(tmp_path / "store").card["bytes"] > 10e6


def test_a_run_on_text_with_needles_and_copies_beside_it(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side in ("new", "old"):
        Path(side).mkdir()
        for n in range(60):
            Path(side, f"{n}.txt").write_text(f"{side.title()} text {n}, of so many words. " * 60)
    asked = ["data=mixture", "data.sources.old.data.corpus=text"]
    asked += [f"data.sources.{side}.data.{key}={side}{end}" for side in ("new", "old") for key, end in PLACES]
    asked += [beside("needles", 0.5), beside("copies", 0.25)]
    assert main(["train", *asked, *SMALL, "run.name=mixed"]) == 0, capfd.readouterr().err
    lines = [json.loads(line) for line in Path("runs/mixed/metrics.jsonl").read_text().splitlines()]
    drawn = lines[-1]["drawn"]
    assert all(any(name.startswith(source) for name in drawn) for source in ("new", "old", "needles", "copies"))
    assert lines[-2]["tokens"] < 4096 <= lines[-1]["tokens"] and lines[-1]["heldout_loss"] < 6  # padding is no token


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (
            ["data=needles", "data.lengths=[4096,256]"],
            "data.lengths=[4096, 256]: must be in order; nearest [256, 4096]",
        ),
        (["data=needles", "data.lengths=[9,256]"], "data.lengths=[9, 256]: must begin with at least 105, the room"),
        (["data=needles", "data.lengths=[1.5,256]"], "data.lengths[0]=1.5: expected a whole number"),
        (["data=copies", "data.documents=0"], "data.documents=0: must be a whole number from 1"),
        (["data=copies", "data.path=x"], "data.path=x: corpus copies takes no path"),
        (["data=copies", "data.heldout=0.3"], "data.heldout=0.3: must be at most 0.25 for corpus copies"),
        (["data=headers", "data.path=x"], "data.path=x: corpus headers takes no path"),
        (["data.lengths=[256,512]"], "data.lengths=[256, 512]: corpus stdlib takes none"),
    ],
)
def test_bad_input_is_one_line(asked, line, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["prepare", *asked]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"farspan prepare: {line}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
