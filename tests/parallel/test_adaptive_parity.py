"""Training with adaptive groups, for every mixer: loss and gradients of two updates on every rank, as one process has.

The planner's own plans of packed, unequal documents: a group of four ranks, then groups of two and of one beside each
other, then ranks without work. The second update starts from weights that the first one made. A model here has many
mixers, one a layer, so that one world and few models hold them all; a gradient's name says which layer is wrong.

The default suite runs each mixer with one transport; with `-m slow` each runs with every transport, and the static plan
beside the adaptive one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

import train.execute
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Whole
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.adaptive.cost import Cluster, Costs, Layer, Model, Wire
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.plan import Group, Plan
from parallel.schedule.static import Static
from parallel.sequence.attention.ring_ulysses import divides
from parallel.sequence.spread import Spread
from parallel.shards import local
from tests.parallel.matrix import EFFECTS, KEYS, rows
from tests.parity import BALANCE, VOCABULARY, Sample, assert_close, counted
from train.execute import Executor
from train.loss import sums
from train.time_spans import Spans

pytestmark = pytest.mark.dist

RANKS, ROOM, RATE = 4, 24, 0.05
BATCHES = (
    [Sample((44, 1, 18, 5)), Sample((20, 11, 2)), Sample((1, 15, 4)), Sample((9, 2, 4), seed=1), Sample((5,))],
    [Sample((2, 1, 1, 27, 3, 8), padding=6), Sample((10, 9), masked=(0, 4))],
)
MODELS, FIELDS = 6, ("tokens", "targets", "positions")
Numbers = tuple[float, dict[str, np.ndarray]]


class Case(NamedTuple):
    """A model by its number, the transports that its layers use, and `train.span_tokens`."""

    model: int
    effects: str
    keys: str
    span: int | None = None  # a case with one has the first update alone


def layers(number: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """By row of the matrix: the mixer and its options; rows are dealt out, so that kinds of mixers mix."""
    return {name: row for i, (name, row) in enumerate(rows().items()) if i % MODELS == number}


def build(number: int) -> LM:
    """A layer for each mixer; the first one's feed-forward has experts, which balance over each whole document."""
    dense, experts = partial(SwiGLU, hidden=12), partial(MoE, num_experts=4, top_k=2, hidden=8)
    blocks = {
        f"block{i}": partial(Block, mixer=partial(MIXERS[mixer], **options), ffn=dense if i else experts)
        for i, (mixer, options) in enumerate(layers(number).values())
    }
    return LM(vocabulary=VOCABULARY, dim=16, layers=len(blocks), pattern=list(blocks), blocks=blocks)


def cases(turn: int) -> list[Case]:
    """Every model with one transport of each kind; in another turn another one. Ulysses stands aside for gather where
    it cannot share out the heads of a group."""
    effects, keys = list(EFFECTS), list(KEYS)
    found = []
    for number in range(MODELS):
        wanted = keys[(number + turn) % len(keys)]
        held = [options for mixer, options in layers(number).values() if mixer in ("attention", "mla")]
        heads = [(each["heads"], each.get("kv_heads", each["heads"])) for each in held]
        able = wanted != "ulysses" or all(divides(size, *each) for each in heads for size in (2, 4))
        found.append(Case(number, effects[(number + turn) % len(effects)], wanted if able else "gather"))
    return found


def adaptive(batch: list[Sample]) -> Plan:
    """By the planner, for a model of which a pair of tokens costs: short sequences stay apart, long ones spread."""
    layer = Layer(1, pair=1e-4, token=0.01, token_bytes=1.0)
    model = Model("small", (layer,), launch=1.0, state_bytes=0.0, activation_bytes=1.0)
    costs = Costs(model, Cluster("four", RANKS, float(ROOM), {1: Wire(10.0), 4: Wire(0.5)}))
    lengths = [len(s.tokens) for s in batch]
    return Planner(costs, quantum=1).plan(lengths).packing.plan(0, lengths, RANKS)


def static(batch: list[Sample]) -> Plan:
    return Static(tokens_per_rank=ROOM).plan(0, [len(s.tokens) for s in batch], data=1, sequence=RANKS)


def one_process(number: int) -> list[Numbers]:
    """Returns each update's loss and gradients: one process, plain descent, documents end to end, unpadded."""
    model = initialise(build(number).double(), seed=1)
    model.compute, found = torch.float64, []
    for batch in BATCHES:
        together = [np.concatenate([getattr(s, name)[s.counted] for s in batch]) for name in FIELDS]
        tokens, targets, positions = (torch.from_numpy(x)[None] for x in together)
        seq = Whole.of(positions)
        seq.index_losses.weight = 1 / tokens.numel()
        part = sums(model(tokens, seq), targets)
        loss = part.objective(targets=int((targets != -100).sum()), tokens=tokens.numel(), balance_weight=BALANCE)
        loss.backward()
        found.append((loss.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}))
        descend(model)
    return found


def spread(case: Case, plans: list[Plan]) -> list[Numbers]:
    """The same by the executor along these plans: of the gradients what this rank has, some rows of each."""
    groups, device = Groups(), torch.device("cpu")
    with torch.device("meta"):
        model = build(case.model)
    model.compute = torch.float64
    meshes = Meshes(groups.mesh, device)
    parallelise(model, meshes, seed=1, dtype=torch.float64, remat="none", reshard_after_forward=False)
    spans = None if case.span is None else Spans(case.span)
    executor = Executor(model, groups, device, EFFECTS[case.effects], KEYS[case.keys], BALANCE, spans=spans)
    found = []
    for batch, plan in zip(BATCHES if spans is None else BATCHES[:1], plans, strict=False):
        tally = executor.train(plan, batch)
        both = groups.world_comm.all_reduce(torch.stack((tally.cross_entropy, tally.balance)).double(), purpose="loss")
        targets = sum(int((s.targets != -100).sum()) for s in batch)
        loss = both[0].item() / targets + BALANCE * both[1].item() / counted(batch)
        gradients = {parameter_name(name): local(p.grad) for name, p in model.named_parameters()}
        found.append((loss, {name: gradient.numpy().copy() for name, gradient in gradients.items()}))
        descend(model)
    return found


def descend(model: LM) -> None:
    """Gradient descent, on what this process has of each parameter."""
    for p in model.parameters():
        local(p.data).sub_(RATE * local(p.grad))
        p.grad = None


def all_of(chosen: list[Case], schedulers: list[Callable[[list[Sample]], Plan]]) -> list[list[list[Numbers]]]:
    """In one world: by case and scheduler."""
    return [[spread(case, [plan(batch) for batch in BATCHES]) for plan in schedulers] for case in chosen]


@contextmanager
def a_rank_sums_over_its_own_span() -> Iterator[None]:
    """And not over its group's."""
    with patch.object(Spread, "sum", Spread.local_sum):
        yield


@contextmanager
def a_group_runs_the_documents_of_another() -> Iterator[None]:
    """One of the first batch is counted twice, two others are not."""
    honest = train.execute.place

    def place(group: Group, *rest: Any, **more: Any) -> Any:
        return honest(replace(group, sequences=(2,)) if group.sequences == (3, 4) else group, *rest, **more)

    with patch.object(train.execute, "place", place):
        yield


@contextmanager
def a_rank_without_work_has_a_target() -> Iterator[None]:
    honest = train.execute.place

    def place(group: Group, *rest: Any, **more: Any) -> Any:
        placed = honest(group, *rest, **more)
        return placed if group.sequences else replace(placed, targets=torch.zeros_like(placed.targets))

    with patch.object(train.execute, "place", place):
        yield


@contextmanager
def the_last_micro_step_alone_has_gradients() -> Iterator[None]:
    honest = train.execute.communicate_gradients

    def communicate(model: LM, last: bool) -> None:
        honest(model, True)
        for p in model.parameters():
            p.grad = None

    with patch.object(train.execute, "communicate_gradients", communicate):
        yield


BROKEN = [
    a_rank_sums_over_its_own_span,
    a_group_runs_the_documents_of_another,
    a_rank_without_work_has_a_target,
    the_last_micro_step_alone_has_gradients,
]
SMALL = Case(3, "gather", "gather")


def broken() -> list[list[Numbers]]:
    """Returns the same for each way to break it."""
    found = []
    for way in BROKEN:
        with way():
            found.append(spread(SMALL, [adaptive(batch) for batch in BATCHES]))
    return found


def check(ranks: list[list[Numbers]], want: list[Numbers], what: str) -> None:
    """The loss on every rank, and the gradients of all ranks' rows."""
    for update, (theirs, *mine) in enumerate(zip(want, *ranks, strict=True), 1):
        whole = {name: np.concatenate([gradients[name] for _, gradients in mine]) for name in theirs[1]}
        for rank, (loss, _) in enumerate(mine):
            try:
                assert_close((loss, whole), theirs, "fp64")
            except AssertionError as error:
                raise AssertionError(f"{what}, update {update}, rank {rank}: {error}") from None


def hold_to_one_process(run: Any, chosen: list[Case], schedulers: list[Any]) -> None:
    wanted = {number: one_process(number) for number in {case.model for case in chosen}}
    ranks = run(RANKS, all_of, chosen, schedulers, timeout=500)
    for i, case in enumerate(chosen):
        for j, scheduler in enumerate(schedulers):
            found = [by_case[i][j] for by_case in ranks]
            want = wanted[case.model][: len(found[0])]
            check(found, want, f"{scheduler.__name__}, {case} of {list(layers(case.model))}")


def test_adaptive_training_equals_one_process_for_every_mixer(run: Any) -> None:
    """One of them in spans in time besides, in which groups of one micro-step take as many each."""
    hold_to_one_process(run, [*cases(0), SMALL._replace(span=6)], [adaptive])


@pytest.mark.slow  # run by `make mutations`
def test_what_is_broken_on_purpose_is_caught(run: Any) -> None:
    want, missed = one_process(SMALL.model), []
    for way, *ranks in zip(BROKEN, *run(RANKS, broken, timeout=500), strict=True):
        try:
            check(ranks, want, way.__name__)
        except AssertionError:
            continue
        missed.append(way.__name__)
    assert not missed


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("turn", range(4))
def test_and_with_every_transport_as_static_training_does(run: Any, turn: int) -> None:
    hold_to_one_process(run, cases(turn), [adaptive, static])


def test_every_mixer_is_in_a_model_and_every_transport_in_use() -> None:
    assert {mixer for number in range(MODELS) for mixer, _ in layers(number).values()} == set(MIXERS)
    assert {case.effects for case in cases(0)} == set(EFFECTS) and {case.keys for case in cases(0)} == set(KEYS)
    recurrent = {(number, case.effects) for turn in range(4) for number, case in enumerate(cases(turn))}
    assert len(recurrent) == MODELS * len(EFFECTS), "every model with every transport of effects"


def test_plans_have_groups_of_several_sizes_side_by_side_and_ranks_without_work() -> None:
    sizes = [[len(g.ranks) for g in micro.groups if g.sequences] for b in BATCHES for micro in adaptive(b).micro_steps]
    assert any(len(set(micro)) > 1 for micro in sizes) and {size for micro in sizes for size in micro} == {1, 2, 4}
    assert any(sum(micro) < RANKS for micro in sizes), "an idle rank"
    assert any(group.sequences == (3, 4) for group in adaptive(BATCHES[0]).micro_steps[1].groups), "see BROKEN"
