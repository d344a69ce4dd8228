"""Every command that a run prints is a command: run here as printed, of a folder that a shell must be kept from."""

import re
import shlex

import pytest

from launch.cli import main
from tests.jobs import overrides
from train.tracking import records

NAME = "it's [a] run, $HOME"


@pytest.mark.e2e
def test_what_a_run_prints_at_its_end_can_be_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [*overrides(tmp_path), "cluster.workers=1", "train.steps=2"]
    quoted = NAME.replace("'", r"\'")
    assert main(["train", *given, f"run.dir='{quoted}'"]) == 0
    lines = re.findall(r"^  (farspan .+)$", capsys.readouterr().err, re.MULTILINE)
    verbs = [shlex.split(line, comments=True) for line in lines]
    assert [words[1] for words in verbs] == ["generate", "train"] and verbs[0][2] == NAME
    for words in verbs:
        assert main(words[1:]) == 0, words
    assert [r["step"] for r in records(tmp_path / NAME / "metrics.jsonl")] == [1, 2, 3, 4]
    capsys.readouterr()
    assert main(["train", verbs[1][2]]) == 2
    assert capsys.readouterr().err.endswith("is complete at step 4; give a larger train.steps to go on\n")
    assert main(["train", *given, f"run.dir='{quoted}'"]) == 2
    (hint,) = re.findall(r"continue it with (resume=.+|'resume=.+|\"resume=.+)$", capsys.readouterr().err, re.MULTILINE)
    assert main(["train", "--cfg", *shlex.split(hint)]) == 0
