"""`farspan prepare` as a user meets it: a corpus made, interrupted, gone on with, trained on, copied to a disk."""

import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.stores.store import Store
from launch.cli import main
from launch.commands import prepare
from tests.data.stores.test_prepare import content

pytestmark = pytest.mark.e2e
SMALL = [
    "cluster=none",
    "cluster.workers=1",
    "cluster.threads=1",
    "tracking.mode=disabled",
    "model.dim=32",
    "model.blocks.gla.mixer.heads=2",
    "model.blocks.gdn.mixer.heads=2",
    "data.max_length=64",
    "data.heldout=0.2",
    "data.heldout_tokens=128",
    "train.batch_tokens=128",
    "train.tokens=256",
    "train.evaluate_every=null",
    "train.checkpoint_every=null",
    "train.mfu=false",
]


def corpus(path: Path, documents: int = 400, words: int = 60) -> Path:
    draw = random.Random(0)
    vocabulary = "the a of to model state span token gate decay chunk and with then from".split()
    with open(path, "w") as stream:
        for _ in range(documents):
            text = " ".join(draw.choices(vocabulary, k=draw.randint(1, 2 * words)))
            stream.write(json.dumps({"body": text}) + "\n")
    return path


def test_a_corpus_is_prepared_once_and_trained_on_elsewhere(tmp_path, capfd, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "x.jsonl")
    made = ["data=jsonl", "data.path=x.jsonl", "data.field=body", "data.store=store"]
    made += ["data.tokenizer=bpe", "data.vocabulary=300"]
    assert main(["prepare", *made]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"^documents   400 from 1 sources, \d+ of them copies$", out, re.MULTILINE)
    assert "bpe-300" in out and "part 1 of 1: 400 documents" in err
    before = (tmp_path / "store" / "card.json").stat().st_mtime_ns
    assert main(["prepare", *made]) == 0
    assert (tmp_path / "store" / "card.json").stat().st_mtime_ns == before
    (tmp_path / "x.jsonl").unlink()
    there = ["data=store", "data.store=store", "data.local=disk", *SMALL]
    capfd.readouterr()
    assert main(["train", *there, "model.vocabulary=200"]) == 2
    assert "model.vocabulary=200: the tokenizer has " in capfd.readouterr().err
    assert main(["train", *there, "model.vocabulary=300", "run.name=first"]) == 0
    err = capfd.readouterr().err
    per_token, per_byte = map(
        float, re.search(r"nats per token: ([\d.]+), per byte: ([\d.]+)$", err, re.MULTILINE).groups()
    )
    assert 1.5 * per_byte < per_token < 10 * per_byte
    (copy,) = (tmp_path / "disk").glob("store-*[0-9a-f]")
    assert content(Store(copy)) == content(Store(tmp_path / "store"))
    card = json.loads((tmp_path / "runs" / "first" / "tokenizer.json").read_text())
    assert card["name"] == "json" and json.loads(card["json"])["model"]["type"] == "BPE"
    capfd.readouterr()
    assert main(["generate", "first", "prompt=the state", "tokens=20"]) == 0
    assert capfd.readouterr().out.startswith("the state")


def test_a_vocabulary_is_refused_before_a_corpus_is_read(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "x.jsonl")
    asked = ["data=jsonl", "data.path=x.jsonl", "data.field=body", "data.store=store", "data.tokenizer=bpe", *SMALL]
    assert main(["train", *asked]) == 2
    assert "model.vocabulary=264: the tokenizer has 8192 tokens; must be at least that" in capfd.readouterr().err
    assert not (tmp_path / "store").exists() and not (tmp_path / ".store.partial").exists()


SMALL_PARTS = """
import sys
from data.corpora import records
from data.stores import merge, prepare
from launch.cli import main
if __name__ == "__main__":
    records.PART_BYTES, prepare.SMALL_BYTES, merge.JOURNAL_S = 100_000, 0, 0.0
    sys.exit(main())
"""


@pytest.mark.slow
def test_interrupted_in_the_terminal_it_goes_on(tmp_path):
    corpus(tmp_path / "x.jsonl", documents=4000)
    farspan = [sys.executable, "-c", SMALL_PARTS]
    made = ["prepare", "data=jsonl", "data.path=x.jsonl", "data.field=body", "data.workers=2"]
    made += ["data.tokenizer=bpe", "data.vocabulary=300"]
    first = subprocess.Popen([*farspan, *made, "data.store=a"], cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    assert first.stderr is not None
    line = first.stderr.readline()
    assert line.startswith("part "), line
    first.send_signal(signal.SIGINT)
    rest = first.communicate(timeout=30)[1]
    assert first.returncode == 1 and rest.splitlines()[-1] == "interrupted: the same command goes on from here"
    assert "Traceback" not in rest and not (tmp_path / "a").exists()
    done = subprocess.run([*farspan, *made, "data.store=a"], cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.startswith("part 1 ")
    made[4] = "data.workers=1"
    subprocess.run([*farspan, *made, "data.store=b"], cwd=tmp_path, check=True, capture_output=True, timeout=200)
    assert content(Store(tmp_path / "a")) == content(Store(tmp_path / "b"))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["data=copy"], "data: a generated task has no corpus to prepare"),
        (["data=jsonl", "data.path=no"], "data.path=no: no such file or folder"),
        (["data=jsonl"], "data.path: missing; give it as data.path=VALUE"),
        (["data=text", "data.path=.", "data.tokenizer=no.json"], "data.tokenizer=no.json: must be bytes, bpe, or"),
        (["data.tokenizer=bpe", "data.vocabulary=100"], "data.vocabulary=100: must be at least 257"),
        (["data.vocabulary=1000"], "data.vocabulary=1000: must be null: data.tokenizer=bytes has its own"),
        (["data.document=x"], "data.document=x: must be null"),
        (["data.field=x"], "data.field=x: corpus stdlib takes none"),
        (["data.workers=0"], "data.workers=0: must be a positive whole number, or null"),
        (["data=hf", "data.path=x", "data.on_error=go"], "data.on_error=go: must be one of stop, skip"),
        (["cluster=ray", "cluster.address=http://127.0.0.1:1"], "cluster.address=http://127.0.0.1:1: must be auto"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(asked, line, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["prepare", *asked]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"farspan prepare: {line}") and err.count("\n") == 1


@pytest.mark.slow
def test_over_ray_the_bytes_are_the_same(tmp_path, monkeypatch):
    """Two cores of a Ray that is started for this: interrupted by a bad line, then gone on with."""
    ray = pytest.importorskip("ray")
    from data.corpora import records
    from data.corpora.records import Jsonl
    from data.stores.store import build
    from data.tokenizer import Bytes

    monkeypatch.setattr(records, "PART_BYTES", 4000)
    path = corpus(tmp_path / "x.jsonl")
    whole = build(Jsonl(path=str(path), field="body"), Bytes(), tmp_path / "here")
    good = path.read_text()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    try:
        runner = prepare.RayTasks(ahead=4)
        path.write_text(good + "{\n")
        with pytest.raises(ValueError, match="line 401 is not JSON"):
            build(Jsonl(path=str(path), field="body"), Bytes(), tmp_path / "there", runner=runner)
        path.write_text(good)
        store = build(Jsonl(path=str(path), field="body"), Bytes(), tmp_path / "there", runner=runner)
        made = ["prepare", "data=jsonl", f"data.path={path}", "data.field=body", f"data.store={tmp_path / 'joined'}"]
        made += ["cluster=ray", f"cluster.address={ray.get_runtime_context().gcs_address}"]
        done = subprocess.run([sys.executable, "-c", SMALL_PARTS, *made], text=True, capture_output=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert content(Store(tmp_path / "joined")) == content(store)
    finally:
        ray.shutdown()
    there, here = content(store), content(whole)
    assert there.pop("card.json") != here.pop("card.json")  # the file was written twice: another identity
    assert there == here
