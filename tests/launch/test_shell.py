"""What farspan prints for a person to type is read back as it was meant: by a shell, and then by Hydra."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch.cli import main
from launch.config.compose import _read, composed
from launch.paths import with_absolute_paths
from launch.preflight.configure import overlay
from launch.run.rundir import reserved
from launch.shell import override, quote
from train.run_config import ObjectConfig
from train.settings import RunSettings

TEXTS = [
    "runs/a",
    "a b",
    "it's",
    "a[b]c",
    "[1",
    "1e3",
    "null",
    "a\\",
    "a\\'b",
    "${x}",
    "a,b",
    "a=b",
    "$HOME",
    'a"b',
    "ü",
]
TEXTS += [
    "20260101-120000",
    "2027",
    "~x",
    "a:b",
    "-x",
    "{a}",
    "#x",
    "a#b",
    "'",
    "(x)",
    "*",
    "a!b",
    "`ls`",
    "a;b",
    "true",
]
TEXTS += ["\\\\'", "''", "a''", "inf", "0x1", "1_0", ".5", "+a", "%", "a  b ", " a"]


def _as_hydra_reads(word: str) -> object:
    config = OmegaConf.create({"it": _read(word).parts.value()})
    return OmegaConf.to_container(config, resolve=True)["it"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEXTS) | st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=12))
def test_any_text_is_read_back_as_it_is(text):
    (word,) = shlex.split(override("run.name", text))
    assert _as_hydra_reads(word) == _as_hydra_reads(f"run.name={quote(text)}") == text


def test_a_shell_gives_back_one_word():
    line = " ".join(override("k", text) for text in TEXTS)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == shlex.split(line)


@pytest.mark.composes
def test_the_budget_that_is_given_counts(capsys):
    assert main(["train", "--cfg", "train.tokens=5", "train.steps=3"]) == 2
    assert capsys.readouterr().err == (
        "farspan train: train.steps=3: must be null with train.tokens=5, or the other way\n"
    )
    assert composed(["experiment=smoke"]).train.steps is None
    saved, asked = composed(["train.steps=3"]).to_dict(), composed(["train.tokens=4096000"]).to_dict()
    overlay(saved, asked, ["train.tokens=4096000"])
    assert saved["train"]["steps"] is None and saved["train"]["tokens"] == 4096000


@pytest.mark.composes
def test_a_cluster_that_is_named_again_keeps_what_the_run_has():
    """`submit resume=RUN` names it: two workers by default, and as many threads as cores, would be other sums."""
    saved = composed(["cluster=ray", "cluster.workers=8", "cluster.threads=1", "cluster.address=http://10.0.0.1:8265"])
    saved = saved.to_dict()
    words = ["cluster=ray", "cluster.restarts=5"]
    overlay(saved, composed(words).to_dict(), words)
    kept = {key: saved["cluster"][key] for key in ("workers", "threads", "restarts", "address")}
    assert kept == {"workers": 8, "threads": 1, "restarts": 5, "address": None}
    overlay(saved, composed(["cluster=none"]).to_dict(), ["cluster=none"])
    assert saved["cluster"] == composed(["cluster=none"]).to_dict()["cluster"]


@pytest.mark.composes
def test_a_home_folder_is_meant_by_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = composed(["run.dir=~/x", "init_from=~/base", "run.plot=~/p.png"])
    assert config.run.dir == f"{tmp_path}/x" and config.run.plot == f"{tmp_path}/p.png"
    assert config.init_from == f"{tmp_path}/base"


def test_runs_without_a_name_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.run.rundir.stamp", lambda: "20260101-000000")
    names = [reserved(RunSettings())[0] for _ in range(3)]
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]
    assert reserved(RunSettings(name="a"))[0] == reserved(RunSettings(name="a"))[0] == "a"


def test_a_run_keeps_paths_that_any_folder_can_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    one = {"path": "texts", "store": "~/s", "tokenizer": "bytes", "corpus": "text", "local": None}
    two = {"path": "org/set", "store": "s3://bucket/s", "tokenizer": "my", "corpus": "hf"}
    sources = {"a": {"data": one}, "b": {"data": two}}
    config = replace(composed([]), data=ObjectConfig({"sources": sources}))
    monkeypatch.setenv("HOME", "/h")
    kept = with_absolute_paths(config).data["sources"]
    one, two = kept["a"]["data"], kept["b"]["data"]
    assert one == {"path": f"{tmp_path}/texts", "store": "/h/s", "tokenizer": "bytes", "corpus": "text", "local": None}
    assert two == {"path": "org/set", "store": "s3://bucket/s", "tokenizer": f"{tmp_path}/my", "corpus": "hf"}


def test_version_and_what_nobody_has_foreseen_are_a_line(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"farspan \d+\.\d+\S*\n", capsys.readouterr().out)

    def broken(words):
        return {}["x"]

    monkeypatch.setattr("launch.verbs.Verb.load", lambda verb: broken)
    assert main(["status", "x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("farspan status: failed: KeyError: 'x' (a fault of farspan, in tests/launch/test_shell.py:")
    assert said.count("\n") == 1
    monkeypatch.setenv("FARSPAN_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["status", "x"])


@pytest.mark.parametrize("verb", ["status", "logs"])
def test_a_look_at_a_run_costs_no_torch(verb, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-12").mkdir(parents=True)
    (run / "checkpoints" / "step-7").mkdir()
    for step in (7, 12):
        (run / "checkpoints" / f"step-{step}" / "manifest.json").write_text("{}")
    (run / "config.yaml").write_text(
        "model: {}\ntrain: {tokens: 100, batch_tokens: 10}\ncluster: {kind: none, workers: 1}\nstages: []\n"
    )
    (run / "log.txt").write_text("a notice\n")
    (run / "metrics.jsonl").write_text('{"step": 5, "tokens": 50, "time": 1.0, "loss": 2.5}\n')
    program = "import sys; from launch.cli import main; r = main(sys.argv[1:]); assert not r"
    program += "; assert not {'torch', 'ray', 'hydra'} & sys.modules.keys()"
    command = [sys.executable, "-c", program, verb, str(run)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = ["step        5 of 10 (50%)", "checkpoint  step-12, "] if verb == "status" else ["a notice\n"]
    assert all(words in said for words in expected), said
