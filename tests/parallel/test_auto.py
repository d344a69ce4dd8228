"""A run that chooses its transport: what it measured is said, counted and kept."""

import json
from functools import partial

import pytest
import torch

from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from parallel.schedule.comm_volume import AttendCall, How, ScanCall, of_plan, of_weights
from parallel.schedule.transport_cost import LinkCost
from parallel.sequence.states import AutoTransport
from tests.jobs import HYBRID, order
from train.build import build
from train.checkpoints.hook import Checkpoints
from train.metrics import comm_record
from train.metrics.comm_trace import asked, weight_units

AUTO = "parallel.transport.recurrence=auto"


def first_step(job):
    """The record of a step, the plan behind it, and what its batch is; then a checkpoint."""
    trainer = build(job)
    batch = trainer.batches.batch(trainer.seed, trainer.state.step, trainer.state.skips)
    plan = trainer.plan([len(s.tokens) for s in batch])
    record, _ = trainer.step()
    trainer.hooks.of(Checkpoints).save()
    return record, plan, [s.starts.nonzero()[0].tolist() for s in batch], trainer.executor.recurrence.wire


def chosen(job):
    """The choice for large dense effects on many ranks, of a run that is not trained."""
    auto = build(job).executor.recurrence
    return auto.wire, auto.choice(64, 1 << 26, 1 << 26, 64)


@pytest.mark.dist
def test_a_run_measures_chooses_counts_and_keeps_its_choice(run, tmp_path):
    job = order(tmp_path, tmp_path / "run", *HYBRID, AUTO, "train.steps=2", "cluster.workers=2")
    results = run(2, first_step, job)
    (record, plan, starts, wire), again = results[0], results[1]
    assert again[3] == wire
    said = (tmp_path / "run" / "log.txt").read_text()
    assert (
        f"{AUTO}: Diagonal by " in said and ", Dense by " in said and "2 spans each" in said and said.count("auto") == 1
    )

    with torch.device("meta"):
        model = job["config"].model.build()
    asks = asked(model)
    auto = AutoTransport(wire=wire)
    (spans,) = {len(held) for micro in plan.micro_steps for group in micro.groups for held in group.spans}
    names = {
        auto.choice(2, a.decay * a.itemsize, a.state * a.itemsize, a.extent, spans)
        for a in asks
        if isinstance(a, ScanCall)
    }
    found = of_plan(plan, starts, asks, How(*names))
    for traffic in found.values():
        reshard = job["config"].engine["reshard_after_forward"]
        traffic.include(of_weights(weight_units(model, itemsize=4, reshard=reshard), 2, len(plan.micro_steps)))
    for key in ("bytes", "calls"):
        counts = [getattr(traffic, key) for traffic in found.values()]
        want = {purpose.replace(" ", "_"): sum(c[purpose] for c in counts) for purpose in counts[0] | counts[1]}
        assert {name.split("/")[1]: count for name, count in record[f"comm_{key}"].items()} == want

    (path,) = (tmp_path / "run" / "checkpoints").glob("step-1")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["wire"] == {"ranks": 2, "latency": wire.latency, "bandwidth": wire.bandwidth}
    manifest["wire"] |= {"latency": 1e6, "bandwidth": 1e6}  # as no machine measures it
    (path / "manifest.json").write_text(json.dumps(manifest))
    resumed = order(tmp_path, tmp_path / "again", *HYBRID, AUTO, "train.steps=2", "cluster.workers=2", resume=str(path))
    assert (
        run(2, chosen, resumed) == [(LinkCost(1e6, 1e6), "gather")] * 2
        and auto.choice(64, 1 << 26, 1 << 26, 64) != "gather"
    )
    assert ", as before" in (tmp_path / "again" / "log.txt").read_text()


def test_a_record_names_what_it_knows_and_adds_up_the_rest():
    total = [0.0] * comm_record.COLUMNS
    total[0], total[len(comm_record.ENTRIES) - 1], total[len(comm_record.ENTRIES)] = 12.0, 5.0, 3.0
    assert comm_record.record(total) == {
        "comm_bytes": {"sequence/state": 12, "world/other": 5},
        "comm_calls": {"sequence/state": 3},
    }
    assert comm_record.record([0.0] * comm_record.COLUMNS) == {}


def test_a_model_is_asked_for_what_it_asks():
    mixer = partial(MIXERS["attention"], heads=6, kv_heads=2, head_dim=4, window=5, sinks=1)
    with torch.device("meta"):
        block = partial(Block, mixer=mixer, ffn=partial(SwiGLU, hidden=8))
        model = LM(vocabulary=32, dim=12, layers=2, pattern=["a"], blocks={"a": block})
    model.compute = torch.bfloat16
    assert asked(model) == (AttendCall(6, 2, 4, 4, 2, 5, 1),) * 2
