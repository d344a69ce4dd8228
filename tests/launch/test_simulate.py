"""`farspan plan scheduler.simulate=N`: the table, the picture, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from launch.commands.plan import plan
from launch.errors import UserError

pytestmark = pytest.mark.composes


@pytest.fixture
def lengths(tmp_path):
    drawn = np.random.default_rng(0).lognormal(5.95, 1.26, 600).clip(16, 30_000)
    np.save(tmp_path / "lengths.npy", drawn.astype(np.int64))
    return f"simulation.lengths={tmp_path / 'lengths.npy'}"


def test_a_published_model_on_a_cluster_that_nobody_has(lengths, tmp_path, capsys):
    picture = tmp_path / "step.png"
    asked = ["scheduler.simulate=1", lengths, "simulation.model=7b", "simulation.sequences=128", f"run.plot={picture}"]
    assert plan(asked) == 0
    out = capsys.readouterr().out
    assert "1 steps of model 7b 192K on 8 x 8 ranks of 28 GiB" in out
    rows = {line[12:30].strip(): line.split() for line in out.splitlines() if len(line) > 60}
    static, ours = float(rows["all_ranks"][-7]), float(rows["adaptive"][-7])
    assert static > 1.2 * ours and picture.read_bytes().startswith(b"\x89PNG")


def test_the_configured_model_with_its_own_transports(lengths, capsys):
    own = ["simulation.machines=2", "simulation.per_machine=4", "simulation.inside=300", "simulation.across=25"]
    asked = ["scheduler.simulate=1", lengths, *own, "simulation.recompute=true", "simulation.schedulers=[auto]"]
    assert plan([*asked, "parallel.transport.attention=ulysses", "simulation.sequences=64"]) == 0
    out = capsys.readouterr().out
    assert "M parameters on 2 x 4 ranks" in out and "auto" in out and "megatron" not in out
    assert "the longest sequence that fits has" in out


@pytest.mark.parametrize(
    "more,told",
    [
        (["simulation.model=9b"], "simulation.model=9b: must be one of run, 7b, 13b, 30b"),
        (["simulation.machines=0"], "simulation.machines=0: must be at least 1"),
        (["scheduler.simulate=0"], "scheduler.simulate=0: must be at least 1"),
        (["scheduler.simulate=99"], "has 600 sequences .* need 50,688"),
        (["simulation.memory=1"], "simulation.memory=1: model 7b 192K takes 1.78 GiB of states on each of 64 ranks"),
        (
            ["simulation.memory=1.785"],
            r"simulation.longest=None: a sequence of .* fits no group: the largest that fits 64 ranks is .* more ranks",
        ),
        (["simulation.lengths=none.npy"], "simulation.lengths=none.npy: cannot be read"),
        (["simulation.schedulers=[fastest]"], "simulation.schedulers=fastest: must be one of adaptive, auto, one_size"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_value_is_one_line(lengths, more, told):
    with pytest.raises(UserError, match=told) as error:
        plan(["scheduler.simulate=1", lengths, "simulation.model=7b", *more])
    assert "\n" not in str(error.value)
