"""Training rate of the default job, two ranks of one thread each, over that of a plain loop with two threads.

    python -m tests.benchmarks.train_rate [rounds] [steps]

The plain loop is what one would write on one device: the same model, batches, precision and AdamW, no process group, no
sharding, no logging. Both are timed in turn, round after round, in fresh processes; the line to read is the median
ratio. On machines whose two hardware threads share a core's matmul units, two processes cannot be twice as fast.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.config.compose import composed
from tests.world import run_world

WARM = 8


def distributed(order: dict[str, Any], steps: int) -> float:
    """Tokens a second of the Trainer's steps on this world."""
    from train.build import build

    trainer = build(order)
    for _ in range(WARM):
        trainer.step()
    began = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    return steps * order["config"].train.batch_tokens / (time.perf_counter() - began)


def plain(order: dict[str, Any], steps: int) -> float:
    """Tokens a second of the plain loop."""
    import torch

    from models.axes import initialise
    from models.sequence import Whole
    from train.loss import sums
    from train.precision import dtypes

    torch.set_num_threads(2)
    config = order["config"]
    model = initialise(config.model.build(), config.seed)
    model.compute = dtypes(config.precision.compute, "cpu")[0]
    optimizer = config.optimizer.build()(model.parameters())
    tokens = config.train.batch_tokens
    batches = config.data.build().open(tokens)
    began = 0.0
    for step in range(WARM + steps):
        if step == WARM:
            began = time.perf_counter()
        (sample,) = batches.batch(config.seed, step)
        seq = Whole.of(torch.from_numpy(sample.positions)[None])
        part = sums(model(torch.from_numpy(sample.tokens)[None], seq), torch.from_numpy(sample.targets)[None])
        part.objective(targets=sample.num_targets, tokens=tokens, balance_weight=0.01).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return steps * tokens / (time.perf_counter() - began)


def main(rounds: int = 3, steps: int = 12) -> None:
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        config = composed(["cluster=none", "tracking.mode=disabled"])
        order = {"config": config, "run_dir": str(Path(folder)), "device": "cpu"}
        for _ in range(rounds):
            ours = min(run_world(2, distributed, order, steps, timeout=600))
            theirs = run_world(1, plain, order, steps, timeout=600)[0]
            ratios.append(ours / theirs)
            print(f"two ranks {ours:,.0f} tok/s   plain loop {theirs:,.0f} tok/s   ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} over {rounds} rounds")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
