"""`precision=…` as a user meets it: what a plan says of a recipe, what is refused, and a run that follows one."""

import shutil
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.run.rundir import saved_config
from tests.jobs import overrides
from train.checkpoints.stored import metadata
from train.tracking import records


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.mark.composes
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["precision.recipe=fp8"], "precision.recipe=fp8: must be one of none, fp8_tensorwise, fp8_delayed"),
        (["precision=fp8"], "precision=fp8: "),
        (["precision.masters=fp16"], "precision.masters=fp16: must be one of high, bf16"),
        (
            ["precision=bf16_masters", "engine.offload_optimizer=true"],
            "precision.masters=bf16: must be high with engine.offload_optimizer=true",
        ),
        (["precision=bf16_masters", "precision.high=[heads]"], "precision.high=heads: must match a linear layer"),
        (["precision=bf16_masters", "engine=deepspeed"], "precision.masters=bf16: must be high with engine=deepspeed"),
        (["precision.high=[head]"], "precision.high=['head']: must be [] without a recipe"),
        (["precision=mxfp8", "precision.kernel=native"], "precision.kernel=native: must be auto or emulated with"),
        (["precision=fp8_rowwise", "precision.high=[heads]"], "precision.high=heads: must match a linear layer"),
        (["precision=fp8_blockwise"], "no linear layer of this model may follow it; of layers.0.mixer.qkv, "),
        (["parallel.transport.keys=fp4"], "parallel.transport.keys=fp4: must be one of exact, fp8, int8"),
        (["parallel.transport.keys=fp8", "train.span_tokens=32"], "keys=fp8: must be exact with train.span_tokens"),
        (["engine.gradients=fp8"], "engine.gradients=fp8: must be one of high, bf16"),
        (["precision.gather=codes"], "precision.gather=codes: must be high without a recipe"),
        (["precision=int8_weights", "precision.gather=fp8"], "precision.gather=fp8: must be one of high, codes"),
        (
            ["precision=mxfp8", "precision.gather=codes"],
            "gather=codes: must be high with precision.recipe=mxfp8, whose",
        ),
        (
            ["precision=int8_weights", "precision.gather=codes", "engine.offload_optimizer=true"],
            "precision.gather=codes: must be high with engine.offload_optimizer=true",
        ),
        (
            ["precision=int8_weights", "precision.gather=codes", "parallel.pipeline=2", "cluster.workers=2"],
            "precision.gather=codes: must be high with a pipeline",
        ),
        (["precision=int8", "engine=deepspeed"], "precision.recipe=int8: must be none with engine=deepspeed"),
        (
            ["precision=fp8_tensorwise", "precision.scales=sequence", "parallel.pipeline=2", "cluster.workers=2"],
            "precision.scales=sequence: must be rank with a pipeline",
        ),
        (
            ["precision=fp8_delayed", "parallel.pipeline=2", "cluster.workers=2"],
            "precision.recipe=fp8_delayed: must be another with a pipeline",
        ),
        (["precision=fp8_delayed", "precision.gather=codes"], "must be high with precision.recipe=fp8_delayed, whose"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(place, capsys, more, words):
    assert main(["plan", *overrides(place), *more]) == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "\n" not in line


@pytest.mark.composes
def test_a_run_follows_a_recipe_and_says_how_far(place, capsys):
    """The same lines in the plan and in the run's log; layers that the format cannot tile are counted, one named."""
    more = [
        "precision=mxfp8",
        "precision.high=[layers.0.*]",
        "train.steps=2",
        "cluster.workers=1",
        f"run.dir={place / 'run'}",
    ]
    given = [
        each for each in overrides(place) if not each.startswith(("run.", "precision", "train.tokens", "train.steps"))
    ]
    assert main(["plan", *given, *more]) == 0
    planned = [line[12:] for line in capsys.readouterr().out.splitlines() if "precision.recipe=mxfp8: " in line]
    assert " products with weights follow it (" in planned[0] and planned[0].endswith("emulated on cpu")
    assert any("stay high, as layers.0.mixer.qkv: precision.high" in line for line in planned)
    assert any("stay high, as head: makes logits" in line for line in planned)
    assert main(["train", *given, *more]) == 0
    log = (place / "run" / "log.txt").read_text()
    assert all(line in log for line in planned)
    assert saved_config(place / "run")["precision"]["recipe"] == "mxfp8"
    assert len(records(place / "run" / "metrics.jsonl")) == 2
    capsys.readouterr()
    assert main(["plan", *given, "precision=int8", "precision.report=true", f"init_from={place / 'run'}"]) == 0
    assert "96 tokens with its weights of step-2" in capsys.readouterr().out


@pytest.mark.composes
def test_a_run_goes_on_with_delayed_scales_and_with_the_magnitudes_behind_them(place, capsys):
    """From a checkpoint without them; then two steps in a row are those of one step and another."""
    given = [o for o in overrides(place) if not o.startswith(("run.", "precision", "train.tokens", "train.steps"))]
    more = ["cluster.workers=1", "schedule=constant", "train.tokens=384", f"run.dir={place / 'delayed'}"]
    assert main(["train", *given, *more]) == 0
    shutil.copytree(place / "delayed", place / "whole")
    assert main(["train", f"resume={place / 'whole'}", "precision=fp8_delayed", "train.tokens=1152"]) == 0
    assert main(["train", f"resume={place / 'delayed'}", "precision=fp8_delayed", "train.tokens=768"]) == 0
    assert main(["train", f"resume={place / 'delayed'}", "train.tokens=1152"]) == 0
    capsys.readouterr()
    whole, parts = (records(place / name / "metrics.jsonl") for name in ("whole", "delayed"))
    assert [row["loss"] for row in whole][-2:] == [row["loss"] for row in parts][-2:]


@pytest.mark.composes
def test_a_run_keeps_weights_in_bf16(place, capsys):
    """Its plan and its log say which; its checkpoint has them so, an average and the rest in fp32."""
    given = [o for o in overrides(place) if not o.startswith(("run.", "precision", "train.tokens", "train.steps"))]
    more = ["precision=bf16_masters", "precision.high=[layers.0.*]", "train.steps=2", "cluster.workers=1"]
    more += ["train.average=ema", f"run.dir={place / 'masters'}"]
    assert main(["plan", *given, *more]) == 0
    planned = [line[12:] for line in capsys.readouterr().out.splitlines() if "precision.masters=bf16: " in line]
    assert " products with weights (" in planned[0] and planned[0].endswith("updates rounded at random")
    assert any("stay high, as layers.0.mixer.qkv: precision.high" in line for line in planned)
    assert main(["train", *given, *more]) == 0
    log = (place / "masters" / "log.txt").read_text()
    assert all(line in log for line in planned)
    saved = metadata(place / "masters" / "checkpoints" / "step-2").state_dict_metadata
    dtypes = {name: entry.properties.dtype for name, entry in saved.items() if hasattr(entry, "properties")}
    few = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert few and all(name.startswith("model.layers.") and "router" not in name for name in few)
    assert not any(name.startswith("model.layers.0.") for name in few)


@pytest.mark.composes
def test_weights_that_are_no_numbers_become_no_checkpoint_and_no_success(place, capsys):
    """A rate beyond fp32 in the last of two steps: its gradients are finite, and its weights are not; nor
    does a maximum over ranks hide that."""
    given = [o for o in overrides(place) if not o.startswith(("run.", "precision", "train.tokens", "train.steps"))]
    curve = "[[0.5,0.0,constant],[0.5,1.0,linear]]"
    more = ["optimizer.lr=1e39", "schedule=phases", f"schedule.phases={curve}", "train.checkpoint_every=384"]
    more += [
        "precision=int8_weights",
        "precision.gather=codes",
        "train.steps=2",
        "cluster.workers=1",
        "train.keep=9",
        f"run.dir={place / 'endless'}",
    ]
    assert main(["train", *given, *more]) == 1
    assert [path.name for path in sorted((place / "endless" / "checkpoints").iterdir())] == ["step-1"]
    assert "is not finite after step 2: no checkpoint is made of it" in capsys.readouterr().err
