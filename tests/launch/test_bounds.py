"""Numbers of any size: each key has bounds, and what is beyond them is refused at once."""

import time

import pytest

from launch.cli import main
from tests.jobs import overrides

pytestmark = pytest.mark.composes

REFUSED = {
    "model.layers=100000000": "model.layers=100000000: must be at least 1, and at most 1,024",
    "model.layers=0": "model.layers=0: must be at least 1",
    "model.blocks.attn.mixer.head_dim=100000000": "head_dim=100000000: must be at most 65,536",
    "train.batch_tokens=1e15": "train.batch_tokens=1000000000000000: must be at most 268,435,456 tokens a step",
    "train.batch_tokens=[[0,96],[9600,1e15]]": "train.batch_tokens=1000000000000000: must be",
    "train.batch_tokens=9600000": "train.batch_tokens=9600000: makes 100,000 sequences a step; must make at",
    "cluster.threads=100000": "cluster.threads=100000: must be at least 1 and at most 1,024, or null",
    "cluster.threads=1000": "cluster.threads=1000: must be at most ",
    "cluster.workers=1e6": "cluster.workers=1000000: must be at least 1, and at most 131,072",
    "cluster.workers=100000": "cluster.workers=100000: must be at most ",
    "cluster.timeout=1e300": "cluster.timeout=1e+300: must be above 0 and at most 2,592,000 seconds, or null",
    "tracking.timeout=1e9": "tracking.timeout: got 1000000000.0, accepts a number of seconds above 0, up to a day",
    "tracking.queue=1e18": "tracking.queue: got 1000000000000000000, accepts a number of records",
    "evaluate.depths=1e9": "evaluate.depths=1000000000: must be at most 1,024",
    "evaluate.symbols=3": "evaluate.symbols=3: must be at least 4",
    "seed=-1": "seed=-1: must not be negative",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("bounds")


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_beyond_a_bound_is_refused_at_once(place, capsys, override):
    began = time.process_time()
    key = override.partition("=")[0]
    given = [each for each in overrides(place) if each.partition("=")[0] != key]
    assert main(["plan", *given, override]) == 2
    err = capsys.readouterr().err
    assert REFUSED[override] in err and err.count("\n") == 1, err
    assert time.process_time() - began < 10
