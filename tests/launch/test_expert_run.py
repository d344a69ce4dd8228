"""A run whose experts lie on several ranks, as a user meets it."""

import json

import pytest

from launch.cli import main
from tests.launch.test_cli import finish, overrides, records, start

MODEL = ["model=qwen3_moe_tiny", "model.dim=32", "model.layers=2", "model.blocks.moe.mixer.head_dim=8"]
MODEL += ["model.blocks.moe.ffn.hidden=8", "precision=fp64", "schedule=constant"]


def settings(place) -> list[str]:
    return [*(o for o in overrides(place) if not o.startswith("model.") and o != "precision=fp32"), *MODEL]


@pytest.mark.slow
@pytest.mark.e2e
def test_train_resume_generate_evaluate_and_export(tmp_path, capsys):
    """Two ranks with experts, and then one without: tests/train/test_expert_runs.py has the losses of one process."""
    both = tmp_path / "both"
    said = finish(
        start(tmp_path, "train", *settings(tmp_path), f"run.dir={both}", "parallel.expert=2", "train.steps=3")
    )
    assert "2 workers (data 1 x expert 2 x sequence 1)" in said and "redistributing" not in said
    one = ["parallel.expert=1", "cluster.workers=1", "train.steps=4"]
    finish(start(tmp_path, "train", f"resume={both}", *one))
    losses = [r["loss"] for r in records(both)]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    received = records(both)[0]["comm_bytes"]
    assert received["expert/expert_counts"] == 2 * 2 * 8 * 8  # layers, ranks, the eight experts of each, int64
    rows = [received[f"expert/expert_{name}"] for name in ("rows", "outputs", "rows_gradient", "outputs_gradient")]
    assert len(set(rows)) == 1 and rows[0] % (32 * 8) == 0
    assert main(["generate", str(both), "prompt=alpha ", "tokens=5"]) == 0
    quick = ["evaluate.parts=[positions]", "evaluate.tokens=400", "evaluate.length=96"]
    finish(start(tmp_path, "evaluate", str(both), *quick, "cluster.workers=2", "parallel.expert=2"))
    assert main(["export", str(both), str(tmp_path / "hub")]) == 0
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["num_experts"] == 16


@pytest.mark.composes
@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["model=llama_tiny"], "parallel.expert=2: must be 1, for the model has no experts"),
        ([*MODEL, "model.blocks.moe.ffn.num_experts=15"], "parallel.expert=2: must divide the num_experts=15 of"),
        ([*MODEL, "parallel.transport.experts=padded"], "padded: must be counted, for the experts of layers.0 have no"),
        ([*MODEL, "parallel.transport.experts=some"], "experts=some: must be one of counted, padded"),
        ([*MODEL, "parallel.data=2"], "is 4, must be cluster.workers=2"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_one_line(tmp_path, capsys, more, line):
    given = [o for o in overrides(tmp_path) if not o.startswith("model.") and not o.startswith("precision")]
    assert main(["train", *given, "parallel.expert=2", "cluster.workers=2", *more]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1, said
