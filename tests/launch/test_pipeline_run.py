"""Pipelines as a user asks for them: a run from the command line, its plan, and what is refused before it starts."""

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.jobs import overrides

TWO = ["cluster.workers=2", "parallel.pipeline=2", "train.steps=2"]
MICRO = "scheduler.tokens_per_rank=96"
RWKV7 = "model=rwkv7_tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelined")


@pytest.mark.composes
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "parallel.pipeline=2: a step of 4 sequences has 1 micro-step, must have at least 2"),
        ([MICRO, "parallel.pipeline=64", "cluster.workers=64"], "parallel.pipeline=64: makes 64 stages, must make at"),
        ([MICRO, "parallel.pipeline_layers=[1,2]"], "parallel.pipeline_layers=[1, 2]: must be 2 numbers of layers"),
        ([MICRO, "parallel.pipeline_schedule=interleaved"], "parallel.stages_per_rank=1: must be at least 2"),
        ([MICRO, "parallel.stages_per_rank=2"], "parallel.stages_per_rank=2: must be 1 with"),
        ([MICRO, "parallel.pipeline_schedule=dual"], "parallel.pipeline_schedule=dual: must be one of 1f1b"),
        ([MICRO, "train.span_tokens=32"], "train.span_tokens=32: must be null with parallel.pipeline=2"),
        (
            [MICRO, RWKV7, "parallel.tensor=2", "cluster.workers=4"],
            "parallel.tensor=2: must be 1 with parallel.pipeline=2: stages hand on rwkv7 values",
        ),
        (
            [MICRO, "parallel.pipeline_schedule=zero_bubble", "engine.recompute=selective"],
            "engine.recompute=selective: must be none or full with parallel.pipeline_schedule=zero_bubble",
        ),
        (["scheduler=adaptive"], "scheduler=adaptive: must be static with parallel.pipeline=2"),
    ],
)
def test_what_no_pipeline_can_run_is_refused_in_one_line(place, capsys, more, words):
    given = [o for o in overrides(place) if RWKV7 not in more or not o.startswith("model.")]
    assert main(["plan", *given, *TWO, *more]) == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "\n" not in line


COMMON = [*TWO, MICRO, "parallel.pipeline_schedule=zero_bubble"]


@pytest.mark.dist
@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_in_a_pipeline_sends_what_its_plan_foretells(place, capsys, tensor):
    """The first step's messages between stages, byte for byte; `plan` prints stages, their work and the wait."""
    common = [*overrides(place), *COMMON, f"parallel.tensor={tensor}", f"cluster.workers={2 * tensor}"]
    assert main(["plan", *common]) == 0
    told = capsys.readouterr().out
    assert "pipeline    zero_bubble over 2 ranks, 4 micro-steps" in told
    assert "stage 0 on rank 0: embedding, layers 0 to" in told and "head, " in told
    foretold = next(line for line in told.splitlines() if line.startswith("traffic"))
    assert main(["train", *common, f"run.dir={place / f'run-{tensor}'}"]) == 0
    records = [json.loads(line) for line in (place / f"run-{tensor}" / "metrics.jsonl").read_text().splitlines()]
    first = next(record for record in records if record.get("step") == 1)
    sent = [first["comm_bytes"][f"pipeline/{name}"] for name in ("activations", "activations_gradient")]
    assert sent[0] == sent[1] == 384 * 32 * 4  # tokens, width, bytes of fp32
    assert f"{sum(sent) / 1000:.1f} kB" in foretold


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_in_a_pipeline_is_evaluated_and_goes_on_without_one(place):
    run = str(place / "saved")
    assert main(["train", *overrides(place), *COMMON, f"run.dir={run}"]) == 0
    assert main(["evaluate", run, "evaluate.parts=[positions]", "evaluate.tokens=400", "evaluate.length=96"]) == 0
    assert main(["generate", run, "prompt=alpha ", "tokens=5"]) == 0
    alone = ["parallel.pipeline=1", "parallel.pipeline_schedule=1f1b", "cluster.workers=1", "train.steps=3"]
    assert main(["train", f"resume={run}", *alone]) == 0
