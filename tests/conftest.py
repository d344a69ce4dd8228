"""`run(world, fn, ...)`: the same function on every rank of a fresh gloo world, results by rank; the order of files.

Worlds come from a fork server that has imported torch once, so that a world costs a fraction of a second and none
inherits another's state. Every wait has a limit; what is left of a world when it is over is killed.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest  # noqa: E402
import torch  # noqa: E402

import tests.read_once  # noqa: E402, F401
from tests.world import run_world  # noqa: E402

torch.set_num_threads(1)
gc.set_threshold(
    50_000, 20, 20
)  # tests make many small objects: looking for circles every 700 takes a tenth of the time

TESTS = Path(__file__).resolve().parent
# Files that take half a minute or more, the longest first: a worker that begins one of them last would be waited for.
LONGEST = (
    "launch/test_jobs.py",
    "launch/test_cli.py",
    "launch/test_extension.py",
    "test_compositions.py",
    "parallel/test_mutations.py",
    "parallel/test_matrix.py",
    "launch/test_watch.py",
    "launch/test_stop.py",
    "test_conf.py",
    "parallel/test_tensor.py",
    "data/stores/test_prepare.py",
    "launch/test_sweep.py",
    "train/test_spans.py",
    "test_docs.py",
    "launch/test_templates.py",
    "launch/test_prepare.py",
    "launch/test_cluster.py",
    "parallel/test_mixers.py",
    "train/test_average.py",
    "launch/test_local.py",
    "launch/test_continual.py",
    "train/test_continual.py",
    "launch/test_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of `LONGEST`, all others behind them; within a file nothing moves."""
    order = {path: number for number, path in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path.relative_to(TESTS)), len(order)))


def pytest_collection_finish() -> None:
    """Takes all that is there out of the search for circles: a million objects of modules and tests, which stay."""
    gc.freeze()


@pytest.fixture(scope="session")
def run():
    return run_world
