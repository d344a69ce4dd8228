"""Accuracy on a generated task: the same on every layout, and what a plain loop over the held-out examples counts."""

import json

import numpy as np
import pytest
import torch

from launch.config.compose import composed
from models.sequence import Whole
from tests.jobs import SMALL
from train.build import build

pytestmark = pytest.mark.dist

TASK = ["data=copy", "data.max_length=32", "data.symbols=4", "data.heldout_tokens=512"]
KEPT = [key for key in SMALL if not key.startswith("data")]


def evaluated(folder, more):
    """What a run of three steps records of its held-out examples; beside it, one sequence after another."""
    config = composed([*KEPT, *TASK, "train.steps=3", "precision=fp64", *more])
    folder.mkdir(exist_ok=True)
    trainer = build({"config": config, "run_dir": str(folder), "device": "cpu"})
    trainer.fit()
    right = total = 0
    if config.cluster.workers == 1:  # the model is whole
        for packed in trainer.batches.heldout():
            tokens, positions = (torch.from_numpy(x)[None] for x in (packed.tokens, packed.positions))
            with torch.no_grad():
                likeliest = trainer.model(tokens, Whole.of(positions)).logits[0].argmax(-1).numpy()
            asked = packed.targets != -100
            right, total = right + (likeliest == packed.targets)[asked].sum(), total + asked.sum()
    return right, total


def test_accuracy_is_the_same_on_every_layout_and_that_of_a_plain_loop(run, tmp_path):
    found = {}
    for workers in (1, 2):
        counts = run(workers, evaluated, tmp_path / str(workers), [f"cluster.workers={workers}"])
        lines = (tmp_path / str(workers) / "metrics.jsonl").read_text().splitlines()
        found[workers] = [json.loads(line) for line in lines][-1]["heldout_accuracy"]
        if workers == 1:
            ((right, total),) = counts
    assert total == 16 * 15 and 0 < right < total
    np.testing.assert_allclose([found[1], found[2]], right / total, rtol=1e-12)
    assert json.loads((tmp_path / "2" / "summary.json").read_text())["heldout_accuracy"] == found[2]
