"""What routers remember: the same on every rank and layout, part of the checkpoint, counted and logged."""

import json

import numpy as np
import pytest

from models.moe import mixtures
from tests.jobs import order
from train.build import build
from train.checkpoints.hook import Checkpoints

pytestmark = pytest.mark.dist

FFN = "model.blocks.gla.ffn."
REMEMBERING = [
    "precision=fp64",
    "train.steps=20",
    "train.balance_weight=0.1",
    "train.z_weight=0.01",
    f"{FFN}router=sigmoid",
    f"{FFN}scale=1.5",
    f"{FFN}balance=batch",
    f"{FFN}bias_rate=0.01",
    f"{FFN}shared_gate=true",
]
LAYOUTS = {
    "sequence 2": (2, ["cluster.workers=2"]),
    "data 2, accumulated, recomputed": (
        2,
        ["cluster.workers=2", "parallel.data=2", "scheduler.tokens_per_rank=96", "engine.recompute=full"],
    ),
}
STEPS = 4


def remembered(trainer):
    routers = {name: moe.router for name, moe in mixtures(trainer.model).items()}
    return {
        f"{name}.{kind}": buffer.numpy().copy()
        for name, router in routers.items()
        for kind, buffer in router.named_buffers()
    }


def train(job, steps, save_at=None):
    """The losses of some steps, what routers then remember, and what they did at the checkpoint."""
    trainer, losses, saved = build(job), [], None
    for step in range(1, steps + 1):
        record, _ = trainer.step()
        losses.append([record[name] for name in ("loss", "grad_norm", "balance_loss", "z_loss")])
        if step == save_at:
            saved = remembered(trainer), str(trainer.hooks.of(Checkpoints).save())
    return losses, remembered(trainer), saved


def begin(job):
    """What routers remember before the first step."""
    return remembered(build(job))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("routers")


@pytest.fixture(scope="module")
def alone(run, folder):
    return run(1, train, order(folder, folder / "alone", *REMEMBERING, "cluster.workers=1"), STEPS)[0]


@pytest.fixture(scope="module")
def together(run, folder):
    more = [*REMEMBERING, *LAYOUTS["sequence 2"][1]]
    return run(2, train, order(folder, folder / "together", *more), STEPS, save_at=STEPS // 2)


@pytest.mark.parametrize("layout", [pytest.param(n, marks=[pytest.mark.slow] * (n != "sequence 2")) for n in LAYOUTS])
def test_routers_remember_the_same_and_lose_the_same_on_every_layout(run, alone, together, tmp_path, layout):
    world, more = LAYOUTS[layout]
    done = together
    if layout != "sequence 2":
        done = run(world, train, order(tmp_path, tmp_path / "run", *REMEMBERING, *more), STEPS)
    for losses, kept, _ in done:
        np.testing.assert_allclose(losses, alone[0], rtol=1e-9)
        assert kept.keys() == alone[1].keys() and len(kept) == 4
        for name, value in kept.items():
            assert np.array_equal(value, alone[1][name]), name
            assert value.std() > 0, "nothing was learnt"


def test_resuming_is_bitwise_uninterrupted_and_a_new_run_starts_from_the_same_bias(run, together, tmp_path):
    whole, kept, (halfway, path) = together[0]
    more = [*REMEMBERING, *LAYOUTS["sequence 2"][1]]
    for losses, again, _ in run(2, train, order(tmp_path, tmp_path / "rest", *more, resume=path), STEPS // 2):
        assert losses == whole[STEPS // 2 :]
        assert all(np.array_equal(again[name], kept[name]) for name in kept)
    (taken,) = run(1, begin, order(tmp_path, tmp_path / "new", *REMEMBERING, "cluster.workers=1", init_from=path))
    assert taken.keys() == halfway.keys() and all(np.array_equal(taken[name], halfway[name]) for name in halfway)


def test_a_new_run_may_remember_what_the_old_one_did_not(run, tmp_path):
    plain = ["precision=fp64", "cluster.workers=1", f"{FFN}router=sigmoid", f"{FFN}shared_gate=true"]
    _, nothing, (_, path) = run(1, train, order(tmp_path, tmp_path / "plain", *plain), 1, save_at=1)[0]
    assert nothing == {}
    job = order(tmp_path, tmp_path / "new", *REMEMBERING, "cluster.workers=1", init_from=path)
    kept = run(1, begin, job)[0]
    assert all((value == (0 if name.endswith("bias") else 1 / 4)).all() for name, value in kept.items()) and kept


def fit(job):
    build(job).fit()


def test_a_capacity_is_announced_and_what_it_drops_is_logged(run, tmp_path):
    job = order(tmp_path, tmp_path / "run", "cluster.workers=2", "train.steps=2", f"{FFN}capacity_factor=0.75")
    run(2, fit, job)
    said = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "capacity_factor=0.75" in line]
    assert len(said) == 1 and said[0].endswith("so the loss depends on the layout")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in logged:
        assert record["expert_dropped"].keys() == record["expert_load"].keys()
        assert all(0.25 <= share < 0.75 for share in record["expert_dropped"].values())


def test_padding_is_of_no_count(run, tmp_path):
    """Of a run to its budget whose sequences are half empty, by what its order says is read of each document."""
    (tmp_path / "short").mkdir()
    for i in range(60):
        (tmp_path / "short" / f"{i}.txt").write_text(f"{i:059}")
    packed = ("data.packing=best_fit", "cluster.workers=1", "train.steps=null", "train.tokens=1500")
    packed += (f"data.path={tmp_path / 'short'}", "data.heldout=0.2", "data.heldout_tokens=96")
    job = order(tmp_path, tmp_path / "run", *packed)
    run(1, fit, job)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    batches = job["config"].data.build().open(job["config"].train.batch_tokens, None)
    read = [
        sum(int(np.diff(slot.pieces(job["config"].seed)).sum()) for slot in batches.slots(step))
        for step in range(len(logged))
    ]
    assert sum(read) < 0.9 * len(read) * job["config"].train.batch_tokens, "or there is no padding to speak of"
    assert [record["tokens"] for record in logged] == np.cumsum(read).tolist()
    assert logged[-2]["tokens"] < 1500 <= logged[-1]["tokens"]
