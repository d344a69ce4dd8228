"""engine.compile: its choice, its refusals, and a machine without a compiler."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from launch.config.compose import composed
from parallel.schedule.mesh import Mesh
from tests import jobs
from tests.parity import small_model
from train import compile_choice
from train.build import build
from train.compile_choice import Measured, lacking, measured
from train.engines.refusals import refuse


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lacking("cpu") is None
    compiler.unlink()
    assert lacking("cpu") == "there is no C++ compiler (c++, g++, clang++)"
    monkeypatch.setenv("CXX", "icpx")
    assert lacking("cpu") == "there is no C++ compiler (icpx)"
    monkeypatch.setattr(compile_choice.importlib.util, "find_spec", lambda name: None)
    assert lacking("cuda") == "triton is not installed"


def test_the_faster_one_is_taken_and_a_layer_that_cannot_run_alone_is_left_as_it_is():
    assert Measured(2.0, 1.0).pays and not Measured(1.0, 2.0).pays and not Measured(why="no").pays
    with torch.device("meta"):
        layer = small_model().layers["1"]
    own = partial(measured, dim=32, tokens=64, device=torch.device("cpu"), compute=torch.float32, master=torch.float32)
    found = own(layer, backend="eager")
    assert not found.why and found.plain > 0 and found.compiled > 0

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    found = own(layer, backend=broken)
    assert "cannot be measured alone" in str(found) and "no such instruction" in found.why and not found.pays


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["engine.compile=auto", "engine.cuda_graphs=true"], "engine.cuda_graphs=true: must be false on a CPU"),
        (["engine.compile=blocks", "precision.recipe=int8"], "must be none with engine.compile=blocks"),
    ],
)
def test_what_compiled_layers_do_not_go_with_is_refused(tmp_path, keys, line):
    config = composed([*jobs.overrides(tmp_path), *keys])
    with pytest.raises(ValueError, match=line):
        refuse(config, Mesh(), "cpu")


def test_tensor_ranks_are_refused(tmp_path):
    config = composed([*jobs.overrides(tmp_path), "engine.compile=auto"])
    with pytest.raises(ValueError, match="parallel.tensor=2: must be 1 with engine.compile=auto"):
        refuse(config, Mesh(tensor=2), "cpu")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"compile": "max"}, "engine.compile=max: must be one of none, auto, blocks"),
        ({"compile": "auto", "tile": 64}, "engine.tile=64: must be null with engine.compile=auto"),
        ({"cuda_graphs": True}, "engine.cuda_graphs=true: must be false with engine.compile=none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, line):
    from train.engines import FSDP

    with pytest.raises(ValueError, match=line):
        FSDP(**settings)


def _steps(tmp: str, *keys: str) -> tuple[list[float], str]:
    folder = Path(tmp) / "-".join(["run", *keys]).replace("=", "-")
    trainer = build(jobs.order(Path(tmp), folder, *keys))
    losses = [trainer.advance()["loss"] for _ in range(2)]
    return losses, (folder / "log.txt").read_text()


def _without_a_compiler(tmp: str) -> tuple[list[float], str]:
    os.environ["PATH"] = tmp
    os.environ.pop("CXX", None)
    return _steps(tmp, "engine.compile=blocks")


@pytest.mark.dist
def test_a_run_without_a_compiler_says_so_and_goes_on(run, tmp_path):
    ((losses, log),) = run(1, _without_a_compiler, str(tmp_path))
    assert "engine.compile=blocks: there is no C++ compiler (c++, g++, clang++), and the run goes on without" in log
    assert len(losses) == 2


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("how", ["auto", "blocks"])
def test_a_compiled_run_has_the_losses_of_one_that_is_not(run, tmp_path, how):
    want = run(2, _steps, str(tmp_path), timeout=600)[0][0]
    losses, log = run(2, _steps, str(tmp_path), f"engine.compile={how}", timeout=1800)[0]
    assert f"engine.compile={how}: " in log
    assert losses == pytest.approx(want, rel=1e-5)
