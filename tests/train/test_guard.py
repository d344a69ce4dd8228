"""Runs in which something goes wrong: what is poisoned is passed over, and nothing else; weights never see a NaN."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.audit import passed_over
from data.pack import Packed
from launch.commands import plan
from launch.preflight.checked import CheckedRun
from launch.preflight.configure import configure
from models.axes import initialise
from parallel.matrix_owners import wholes
from parallel.mesh import Groups
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from parallel.shards import local
from tests.jobs import order, prepared
from tests.parity import small_model
from train.build import build
from train.execute import Executor
from train.guards.rollback import origin
from train.guards.step_guard import Guard, Watched, suspects
from train.run_config import RunConfig
from train.settings import GuardSettings
from train.state import State
from train.tracking import records

SHORT = [
    "train.batch_tokens=192",
    "tracking=none",
    "model.layers=1",
    "train.keep=9",
    "schedule=constant",
    "optimizer.lr=1e-2",
]
LIMITED = ["train.guard.sigma=6", "train.guard.window=8"]


class Alone:
    """Of one rank."""

    def all_reduce(self, x: torch.Tensor, *, purpose: str) -> torch.Tensor:
        return x.clone()


def guard(**settings: Any) -> Guard:
    return Guard(GuardSettings(**settings), Alone(), torch.device("cpu"))  # type: ignore[arg-type]


def decide(one: Guard, loss: float, norm: float) -> bool:
    return bool(one.decide(torch.tensor(10 * loss), 10, torch.tensor(norm)))


def test_a_limit_is_so_many_deviations_of_a_window_that_is_half_full():
    one, values = guard(sigma=3.0, window=8), [2.0, 2.2, 1.9, 2.1]
    assert not any(decide(one, v, 100 * v) for v in values), "nothing is known yet"
    limit = np.mean(values) + 3 * np.std(values)
    kept = one.state()
    for factor, held in ((0.999, False), (1.001, True)):
        one.load(kept)
        assert decide(one, limit * factor, 200.0) is held
        one.load(kept)
        assert decide(one, 2.0, 100 * limit * factor) is held
    one.load(json.loads(json.dumps(kept)))
    assert [decide(one, 50.0, 200.0) for _ in range(3)] == [True] * 3, "one far off does not hide the next"
    assert np.nanmax(one.seen[0]) < 4
    assert not decide(one, 2.0, 200.0)


def test_a_lasting_change_is_accepted_in_time():
    one = guard(sigma=6.0, window=16)
    rng = np.random.default_rng(0)
    assert not any(decide(one, 2 + 0.05 * rng.standard_normal(), 1.0) for _ in range(16))
    held = [decide(one, 2.6 + 0.05 * rng.standard_normal(), 1.0) for _ in range(40)]
    assert held[0] and not any(held[16:])


def test_what_is_not_finite_is_held_back_without_any_limit():
    one = guard()
    assert [decide(one, 2.0, norm) for norm in (1.0, math.nan, math.inf, 1e30)] == [False, True, True, False]
    limited = guard(sigma=3.0, window=4)
    assert [decide(limited, v, 1.0) for v in (2.0, math.nan, 2.1, math.inf, 2.0)] == [False, True, False, True, False]


def test_rows_of_batches_that_were_passed_over_add_up():
    state = State(step=5)
    state.skip(6)
    state.skip(7)
    state.step += 3
    state.skip(12)
    assert (state.skipped, state.skips, state.place) == ([[5, 7], [10, 12]], 4, 12)
    assert State.of(json.loads(json.dumps(state.facts()))) == state
    trained = {n: place for n, place in enumerate([0, 1, 2, 3, 4, 7, 8, 9], 1)}
    assert "4 batches passed over: 5 to 6, 10 to 11" in passed_over(state.skipped, 8, 4, trained)
    for wrong, words in (
        ({**trained, 6: 5}, "batch 5 is listed as passed over, and was trained on"),
        ({**trained, 8: 8}, "batch 9 was neither"),
        ({n: p for n, p in trained.items() if n != 3}, "no record of step 3"),
    ):
        with pytest.raises(AssertionError, match=words):
            passed_over(state.skipped, 8, 4, wrong)
    with pytest.raises(AssertionError, match="3 batches are listed as passed over, 4 are counted"):
        passed_over([[5, 7], [10, 11]], 8, 4, trained)


# Each goes wrong at one place in the order, on every attempt to read it.
def poison(trainer: Any, place: int) -> None:
    """The first layer gives a NaN for the second document of this batch, as often as it is run."""
    train, layer = trainer.executor.train, next(iter(trainer.model.layers.values()))

    def step(plan: Any, batch: Any) -> Any:
        bad = trainer.state.place == place
        hook = layer.register_forward_hook(lambda module, args, out: _times_nan(out, args[1])) if bad else None
        trainer.hooked = hook
        try:
            return train(plan, batch)
        finally:
            if hook is not None and not bad:
                hook.remove()

    object.__setattr__(trainer.executor, "train", step)


def _times_nan(out: tuple[Any, ...], seq: Any) -> Any:
    return out[0].masked_fill((seq.documents == 1).unsqueeze(-1), math.nan), *out[1:]


def one_ranks_gradient(trainer: Any, place: int) -> None:
    """A NaN in one element of one weight's gradient, on the last rank only."""
    train = trainer.executor.train

    def step(plan: Any, batch: Any) -> Any:
        tally = train(plan, batch)
        if trainer.state.place == place and trainer.groups.rank == trainer.groups.world - 1:
            weight = dict(trainer.model.named_parameters())["embedding"]
            local(weight.grad).view(-1)[-1] = math.nan
        return tally

    object.__setattr__(trainer.executor, "train", step)


def spike(trainer: Any, place: int) -> None:
    """Tokens that no text has in such an order: the targets of the batch are shuffled among 256 bytes."""
    batch = trainer.batches.batch

    def read(seed: int, step: int, skips: int = 0) -> Any:
        found = batch(seed, step, skips)
        if step + skips != place:
            return found
        rng = np.random.default_rng(0)
        return [type(s)(s.tokens, rng.integers(0, 256, s.targets.shape), s.starts) for s in found]

    trainer.batches.batch = read


def fit(job: dict[str, Any], harm: Any = None, place: int = 0) -> dict[str, Any]:
    """A run to its end, with its weights looked at after each update."""
    trainer = build(job)
    if harm is not None:
        harm(trainer, place)
    update, clean = trainer._update, []

    def looked_at(*given: Any) -> Any:
        found = update(*given)
        clean.append(all(bool(torch.isfinite(local(p)).all()) for p in trainer.model.parameters()))
        return found

    trainer._update = looked_at
    step = trainer.step

    def stepped() -> Any:
        found = step()  # the hook of a poisoned batch stays until its layers have been named
        if hook := getattr(trainer, "hooked", None):
            hook.remove()
            trainer.hooked = None
        return found

    trainer.step = stepped
    trainer.fit()
    weights = wholes({n: p.detach() for n, p in trainer.model.named_parameters()})
    whole = {n: x.numpy().copy() for n, x in weights.items()}
    return {"clean": all(clean), "weights": whole, "state": trainer.state.facts()}


CASES = {  # ranks, the harm, steps, words of the log
    "a poisoned batch": (1, poison, 10, "not finite first in layers.0"),
    "a NaN on one rank": (2, one_ranks_gradient, 10, "not finite first in the gradient of embedding"),
    "a loss spike": (1, spike, 22, "passed over, loss"),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_exactly_the_poisoned_batch_is_passed_over(run, tmp_path: Path, case: str) -> None:
    world, harm, steps, words = CASES[case]
    layers = ["model.layers=2"] if harm is poison else []  # or the first that is not finite could be no other
    poisoned = steps - 2
    folder = tmp_path / "run"
    more = [*SHORT, *LIMITED, f"cluster.workers={world}", f"train.steps={steps}", *layers]
    found = run(world, fit, order(tmp_path, folder, *more), harm, poisoned)
    for rank in found:
        assert rank["clean"] and rank["state"] == found[0]["state"]
        assert rank["state"]["skipped"] == [[poisoned, poisoned + 1]] and rank["state"]["step"] == steps
    log = (folder / "log.txt").read_text()
    assert words in log and f"step {poisoned + 1}: batch {poisoned} passed over" in log
    every = [r for r in records(folder / "metrics.jsonl", every_attempt=True) if "skipped" in r]
    assert len(every) == 1 and every[0]["skipped"]["batch"] == poisoned
    assert records(folder / "metrics.jsonl")[-1]["skips"] == 1
    kept = np.load(folder / "skipped" / f"batch-{poisoned}.npz", allow_pickle=False)
    assert kept["tokens"].shape == (192,) and kept["lengths"].tolist() == [96, 96]

    path = folder / "checkpoints" / f"step-{steps}"
    config = configure(prepared(tmp_path, *more))
    batches = preflight_batches(config)
    flight = CheckedRun(config, "cpu", Mesh(sequence=world), {}, batches, resume=path)
    if harm is poison:
        slots = batches.slots(poisoned)
        _, (s, begin) = [(s, a) for s, slot in enumerate(slots) for a, _ in slot.pieces(config.seed).tolist()][:2]
        (number,) = (n for n, (a, b) in enumerate(pairwise(slots[s].part.source.store.offsets)) if a <= begin < b)
        words = f"not finite first in layers.0, document {number} in sequence {s}; saved"
        assert words in log and every[0]["skipped"]["first"] == words[20:-7]
    said = "\n".join(plan._audit(flight, 5))
    assert f"{steps} steps before, 1 batches passed over: {poisoned}; every other one trained on once" in said


def preflight_batches(config: RunConfig) -> Any:
    from data.batch_ramp import opened

    return opened(config.data.build(), config.train.batch_tokens, config.curriculum.build())


@pytest.mark.dist
def test_a_run_without_anything_unusual_is_what_it_was(run, tmp_path: Path) -> None:
    jobs = [order(tmp_path, tmp_path / n, *SHORT, "cluster.workers=1", "train.steps=6", *more) for n, more in
            (("plain", []), ("guarded", ["train.guard.sigma=6", "train.guard.window=4"]))]  # fmt: skip
    plain, guarded = (run(1, fit, job)[0] for job in jobs)
    assert guarded["state"]["skipped"] == [] and plain["state"] == guarded["state"]
    for name, weight in plain["weights"].items():
        assert np.array_equal(weight, guarded["weights"][name])


@pytest.mark.dist
def test_a_rate_far_too_high_goes_back_and_ends_healthy(run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    curve = "[[0.1,0.003,linear],[0.4,0.003,constant],[0.05,1.0,linear],[0.45,1.0,constant]]"
    more = [
        *SHORT,
        "cluster.workers=1",
        "train.steps=24",
        "schedule=phases",
        f"schedule.phases={curve}",
        "train.clip=1e9",
    ]
    more += ["optimizer.lr=3", "train.guard.sigma=4", "train.guard.window=8", "train.guard.skips=2"]
    more += ["train.guard.rollbacks=9", "train.guard.backoff=0.01", "train.checkpoint_every=384"]
    (found,) = run(1, fit, order(tmp_path, folder, *more))
    state, log = found["state"], (folder / "log.txt").read_text()
    assert state["rollbacks"] >= 1 and state["scale"] == pytest.approx(0.01 ** state["rollbacks"])
    assert found["clean"] and state["step"] == 24 and "back to step-" in log
    written = records(folder / "metrics.jsonl")
    trained = {r["step"]: r["step"] - 1 + r.get("skips", 0) for r in written if "skipped" not in r}
    assert "every other one trained on once" in passed_over(state["skipped"], 24, state["skips"], trained)
    assert written[-1]["loss"] < written[0]["loss"], "it ends better than it began"


def nowhere_to_go(job: dict[str, Any]) -> str:
    trainer = build(job)

    def always(tally: Any, targets: int, norm: Any) -> Any:
        trainer.guard.held = torch.ones((), dtype=torch.bool)
        return trainer.guard.held

    trainer.guard.decide = always
    try:
        trainer.fit()
    except FloatingPointError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_a_run_with_nowhere_to_go_back_to_ends_in_one_line(run, tmp_path: Path) -> None:
    more = [*SHORT, "cluster.workers=1", "train.steps=9", "train.guard.skips=2"]
    (line,) = run(1, nowhere_to_go, order(tmp_path, tmp_path / "run", *more))
    assert (
        line
        == "2 of the last 128 batches were passed over, and there is no checkpoint from before batch 0 to go back to"
    )


def masked(trainer: Any, place: int) -> None:
    """No token of the second rank's sequence counts."""
    batch = trainer.batches.batch

    def read(*asked: int) -> Any:
        first, second = batch(*asked)
        return [first, type(second)(second.tokens, np.full_like(second.targets, -100), second.starts)]

    trainer.batches.batch = read


@pytest.mark.dist
def test_a_rank_whose_tokens_are_all_masked_trains_on(run, tmp_path: Path) -> None:
    more = [*SHORT, "cluster.workers=2", "parallel.data=2", "train.steps=3", *LIMITED]
    for rank in run(2, fit, order(tmp_path, tmp_path / "run", *more), masked):
        assert rank["state"]["skipped"] == [] and rank["state"]["step"] == 3 and rank["clean"]
    losses = [r["loss"] for r in records(tmp_path / "run" / "metrics.jsonl")]
    assert losses[2] < losses[1] < losses[0]


def test_suspects_come_in_the_order_of_their_group_and_padding_is_none():
    batch = [packed([3, 2], padding=1), packed([4, 4]), packed([5])]
    steps = MicroStep((Group((0,), (1, 0), (((0, 14),),)), Group((1,), (2,), (((0, 5),),))))
    plan_, bad = Plan(0, (6, 8, 5), (steps,)), np.zeros(19, dtype=bool)
    assert suspects(plan_, batch, bad) == []
    bad[[5, 16]] = True  # padding of the first, and in the third
    assert suspects(plan_, batch, bad) == [[(2, 0, 5)]]
    bad[[3, 4, 10, 11]] = True
    assert suspects(plan_, batch, bad) == [[(1, 4, 8), (0, 3, 5)], [(2, 0, 5)]]


def blamed(world: int) -> Any:
    """Of two sequences of three documents, in one chunk, in which the second of the first has a token that is NaN."""
    model = initialise(small_model().double(), seed=1)
    model.compute = torch.float64
    with torch.no_grad():
        model.embedding[0] = math.nan
    batch = [packed([5, 7, 9]), packed([4, 4, 4])]
    for s in batch:
        s.tokens[:] = 1 + np.arange(len(s.tokens)) % 20
    batch[0].tokens[8] = 0
    executor = Executor(model, Groups(), torch.device("cpu"), GatherEffects(), GatherKeys(), 0.0)
    plan_ = Static().plan(0, [21, 12], data=1, sequence=world)
    with Watched(dict(model.layers.items())) as watched:
        (depths,) = executor.by_token(plan_, batch, watched.read)
        (group,) = suspects(plan_, batch, (depths == depths.max()).numpy())
        return group, origin(executor, watched, batch, group, 0, (1, world)), watched.name(int(depths.max()))


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_the_document_that_made_a_nan_is_told_from_its_neighbours(run, world):
    for group, found, layer in run(world, blamed, world):
        assert group[0] == (0, 0, 5), "or its neighbour in the chunk would not be under suspicion"
        assert found == (0, 5, 12) and layer == "0"


def packed(pieces: list[int], padding: int = 0) -> Packed:
    length = sum(pieces) + padding
    starts = np.isin(np.arange(length), np.cumsum([0, *pieces]))
    return Packed(tokens=np.zeros(length, int), targets=np.zeros(length, int), starts=starts, padding=padding)
