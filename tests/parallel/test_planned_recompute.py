"""engine.recompute=planned: groups of one micro-step choose by themselves, and the numbers stay."""

from typing import Any

import pytest

from models.lm import LM
from parallel.schedule.adaptive.packing import Packing, Share
from parallel.sequence.attention import Ring
from parallel.sequence.states import Relay
from tests import parity
from tests.parity import Sample, small_model

pytestmark = pytest.mark.dist

BATCH = [Sample((3, 20, 1)), Sample((17,), seed=1), Sample((5, 30), seed=2)]
PACKING = Packing(((Share(0, 1, (0,), "full"), Share(1, 1, (1,))), (Share(0, 2, (2,), "full"),)))


def step() -> tuple[int, dict[str, float]]:
    """Forward passes of this rank's mixers, and how loss and gradients differ from one process."""
    passes: list[Any] = []

    def build() -> LM:
        model = small_model()
        for layer in model.layers.values():
            layer.mixer.register_forward_hook(lambda *_: passes.append(1))
        return model

    plan = PACKING.plan(0, [len(s.tokens) for s in BATCH], 2)
    got = parity.spread(BATCH, plan, "fp64", "planned", build=build, recurrence=Relay(), keys=Ring())
    return len(passes), parity.differences(got, parity.truth(BATCH, "fp64"))


def test_groups_compute_again_as_the_plan_says(run: Any) -> None:
    (first, differs), (second, differs_too) = run(2, step)
    assert max(*differs.values(), *differs_too.values()) < 1e-10
    assert (first, second) == (4 * 2 + 4 * 2, 4 * 1 + 4 * 2), "of four layers, in two micro-steps"
