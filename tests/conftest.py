"""`run(world, fn, ...)`: the same function on every rank of a fresh gloo world, results by rank.

Worlds come from a fork server that has imported torch once, so that a world costs a fraction of a second and none
inherits another's state. Every wait has a limit; what is left of a world when it is over is killed.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.world import run_world  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run():
    return run_world
