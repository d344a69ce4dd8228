"""What the command line says of the order of the data: its audit, and a resumed run that would have another."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.cli import main
from launch.preflight.check import _with_checkpoints
from tests.jobs import overrides
from train.checkpoints import checkpoint

DECOMPOSED = ["data.packing=decomposition", "data.max_length=64", "data.min_length=16", "train.steps=30"]


@pytest.mark.composes
def test_plan_audits_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = [*DECOMPOSED, "curriculum=grow_p2", "data.audit=40"]
    assert main(["plan", *overrides(tmp_path, *more)]) == 0
    said = capsys.readouterr().out
    assert "audit       40 steps of 384 tokens: no token lost, none seen twice in an epoch" in said
    assert "sequences   24 x 16 | 12 x 32 | 6 x 64 a step" in said


@pytest.mark.composes
@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["curriculum=grow_p2"], "data.packing=concat: must be decomposition for curriculum.odds=grow_p2"),
        (["data.packing=best"], "data.packing=best: must be one of concat, best_fit, decomposition; nearest: best_fit"),
        (["curriculum.odds=grow"], "curriculum.odds=grow: must be one of uniform, grow_linear,"),
        (["data=copy", "curriculum=grow_p2", "~data.path"], "curriculum.odds=grow_p2: must be uniform for a generated"),
        (
            ["data=copy", "curriculum=progressive", "curriculum.context=[[0,64,null]]", "~data.path"],
            "must be null for a gen",
        ),
        (
            ["curriculum=progressive", "curriculum.context=[[0,64,1e6]]", "model.pattern=[gla]"],
            "names a rotary base, and no layer has rotary positions",
        ),
    ],
)
def test_a_wrong_order_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], line: str
) -> None:
    given = [o for o in overrides(tmp_path) if "data=copy" not in more or not o.startswith("data.")]
    given = [*given, *(o for o in more if not o.startswith("~"))]
    assert main(["plan", *given]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and line in said[0], said


def test_resuming_in_another_order_says_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "step": 1,
        "model": {},
        "files": {},
        "data": "a",
        "order": {"data.packing": "concat", "data.corpus": "x", "seed": 0},
    }
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps(facts))
    monkeypatch.setattr(checkpoint, "first_difference", lambda path, shapes: None)
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)
    order = {"data.packing": "best_fit", "data.corpus": "y", "seed": 0}
    flight = SimpleNamespace(
        config=SimpleNamespace(resume=str(tmp_path), init_from=None),
        shapes={},
        train=SimpleNamespace(init_weights="raw", init_optimizer="reset"),
        batches=SimpleNamespace(fingerprint="b", order=order),
    )
    with pytest.raises(ValueError) as error:
        _with_checkpoints(flight, print)  # type: ignore[arg-type]
    assert str(error.value) == (
        f"resume={tmp_path}: was trained in another order: data.corpus: other documents; "
        f"data.packing was concat, is best_fit"
    )
