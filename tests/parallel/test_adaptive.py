"""Adaptive plans against a checker that is written from the published formulas, in milliseconds and MiB, and against
what was measured elsewhere with them. `wikipedia_lengths.txt` holds the first 3,072 lengths of those that the authors
of 2412.01523 published; the whole table is `python -m tests.benchmarks.planner`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule.adaptive import planner, search
from parallel.schedule.adaptive.bound import lower_bound
from parallel.schedule.adaptive.cost import NONE, Cluster, Costs, Layer, Model, Recompute, Wire
from parallel.schedule.adaptive.packing import Packing, Share, place
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.profiles import flexsp, flexsp_cluster, hybrid
from parallel.schedule.adaptive.rivals import BestFit, LongestFirst, OneSize, WorkByPairs
from parallel.schedule.adaptive.search import TooLongError
from parallel.schedule.adaptive.simulate import seconds, timing

LENGTHS = np.array(Path(__file__).with_name("wikipedia_lengths.txt").read_text().split(), dtype=np.int64)
BATCHES = [(-(-LENGTHS[i : i + 512] // 128) * 128).tolist() for i in range(0, len(LENGTHS), 512)]

# arXiv 2412.01523 and its solver: T = (1/sp)·sum(a1 s² + a2 s) + beta + 8·2·L·h·s/sp/2^20/v; M = 16 P/N + act·s/sp
A1, A2, BETA, ACT, HIDDEN, DEPTH, BILLIONS, LIMIT = 5.128e-6, 183.9576e-3, 629.3563, 4.4804, 4096, 32, 7.1174, 28 * 1024
V = {1: 1e10, 2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}


def audited(
    packing: Packing,
    lengths: list[int],
    ranks: int = 64,
    softmax: int = DEPTH,
    state_mib: float = 0.0,
    speeds: tuple[float, ...] | None = None,
) -> float:
    """Milliseconds of the step; AssertionError for what the formulation forbids.

    softmax: layers with attention; the others send `state_mib` each way, whatever a group of several ranks holds.
    """
    left, step = list(range(len(lengths))), 0.0
    a1, comm = A1 * softmax / DEPTH, softmax / DEPTH
    for shares in packing.micro_steps:
        busy, slowest = [0] * ranks, 0.0
        for share in shares:
            sp = share.size
            assert sp & (sp - 1) == 0 and share.first % sp == 0, "groups are aligned powers of two"
            for rank in range(share.first, share.first + sp):
                busy[rank] += 1
            tokens = 0
            for s in share.sequences:
                left.remove(s)
                tokens += lengths[s]
            again = share.recompute != "none"
            act, a2 = ACT / (1 + again), A2 * (1.222 if again else 1)  # twice the tokens, 22.2% more of their time
            assert 16 * BILLIONS * 1024 / ranks + act * tokens / sp <= LIMIT * (1 + 1e-9), "memory"
            ms = sum(a1 * lengths[s] ** 2 + a2 * lengths[s] for s in share.sequences) / sp
            ms /= min(speeds[share.first : share.first + sp]) if speeds else 1
            if sp > 1:
                ms += comm * 4 * 2 * DEPTH * HIDDEN * tokens * 2 / 2**20 / sp / V[sp]
                ms += 2 * (DEPTH - softmax) * state_mib / V[sp]
            slowest = max(slowest, ms)
        assert max(busy) <= 1, "a rank is in one group"
        step += slowest + BETA
    assert not left, "every sequence runs"
    return step


def published(**changes: object) -> Costs:
    return Costs(flexsp("7b", **changes), flexsp_cluster())  # type: ignore[arg-type]


@pytest.mark.parametrize("rival", [None, BestFit, LongestFirst, OneSize, WorkByPairs])
def test_no_plan_violates_the_formulation_and_its_time_is_the_formulas(rival):
    costs = published()
    for lengths in BATCHES[:2]:
        packing = Planner(costs).plan(lengths).packing if rival is None else rival(costs).pack(lengths)
        packing.check(64, len(lengths))
        assert audited(packing, lengths) == pytest.approx(1e3 * seconds(costs, packing, lengths), rel=1e-9)


def test_nor_does_any_with_linear_layers_recomputation_or_slow_ranks():
    speeds = tuple(np.random.default_rng(0).uniform(0.6, 1.0, 64).tolist())
    cluster = flexsp_cluster()
    slow = Cluster("slow", 64, cluster.memory, cluster.wires, speeds)
    mixed = hybrid(flexsp("7b"), 3, 1)
    for costs, known in (
        (published(recompute=True), {}),
        (Costs(mixed, cluster), {"softmax": 8, "state_mib": 1.0}),
        (Costs(hybrid(flexsp("7b"), 1, 0), cluster), {"softmax": 0, "state_mib": 1.0}),
        (Costs(flexsp("7b"), slow), {"speeds": speeds}),
    ):
        for lengths in BATCHES[1:3]:
            plan = Planner(costs).plan(lengths)
            assert audited(plan.packing, lengths, **known) == pytest.approx(1e3 * plan.seconds, rel=1e-9)


def _ms(costs: Costs, plan: Callable[[list[int]], Packing]) -> np.ndarray:
    return np.array([1e3 * seconds(costs, plan(lengths), lengths) for lengths in BATCHES])


def test_published_constants_give_the_baselines_and_the_lead_that_were_measured():
    """The first six of the forty batches, whose ratios are not those of all (docs/scheduling.md): static-64 6,434 ms,
    its own packing held to one size 1.159 times ours."""
    costs = published()
    began = time.process_time()
    plans = [Planner(costs).plan(lengths) for lengths in BATCHES]
    took = (time.process_time() - began) / len(BATCHES)
    ours = np.array([1e3 * plan.seconds for plan in plans])
    bounds = np.array([1e3 * plan.bound for plan in plans])
    assert took < 0.2  # four times the goal: this machine is shared
    again = [1e3 * seconds(costs, plan.packing, lengths) for plan, lengths in zip(plans, BATCHES, strict=True)]
    assert again == pytest.approx(ours)
    static, best = _ms(costs, BestFit(costs, 64).pack), _ms(costs, BestFit(costs).pack)
    assert static.mean() / ours.mean() >= 1.75 and best.mean() / ours.mean() >= 1.40
    assert _ms(costs, OneSize(costs).pack).mean() / ours.mean() >= 1.15
    assert _ms(costs, WorkByPairs(costs).pack).mean() / ours.mean() >= 1.25
    assert (ours / bounds - 1).mean() <= 0.03 and (ours / bounds - 1).max() <= 0.05 and (ours >= bounds).all()
    for plan, lengths in zip(plans, BATCHES, strict=True):
        assert timing(costs, plan.packing, lengths).imbalance < 1.25


def test_a_hybrid_needs_less_of_it_and_a_linear_model_none():
    mixed, linear = (Costs(hybrid(flexsp("7b"), *kinds), flexsp_cluster()) for kinds in ((3, 1), (1, 0)))
    ours = _ms(mixed, lambda lengths: Planner(mixed).plan(lengths).packing)
    assert _ms(mixed, WorkByPairs(mixed).pack).mean() / ours.mean() >= 1.14
    assert 1.0 <= _ms(mixed, OneSize(mixed).pack).mean() / ours.mean() <= 1.10
    ours = _ms(linear, lambda lengths: Planner(linear).plan(lengths).packing)
    assert 0.99 <= _ms(linear, OneSize(linear).pack).mean() / ours.mean() <= 1.03


def test_recomputation_where_memory_asks_for_it():
    plain, choosing = published(), published(recompute=True)
    without = _ms(plain, lambda lengths: Planner(plain).plan(lengths).packing)
    plans = [Planner(choosing).plan(lengths) for lengths in BATCHES]
    with_it = np.array([1e3 * plan.seconds for plan in plans])
    assert with_it.mean() <= 0.92 * without.mean() and (with_it <= without * 1.0001).all()
    assert {s.recompute for p in plans for shares in p.packing.micro_steps for s in shares} == {"none", "mlp"}
    for plan, lengths in zip(plans, BATCHES, strict=True):
        plan.packing.check(64, 512)
        assert timing(choosing, plan.packing, lengths).peak.max() <= 28 * 2**30
    gaps = np.array([plan.seconds / plan.bound - 1 for plan in plans])
    assert 0 <= gaps.min() and gaps.mean() <= 0.045 and gaps.max() <= 0.1


def test_plans_are_deterministic():
    costs = published(recompute=True)
    assert Planner(costs).plan(BATCHES[3]) == Planner(costs).plan(list(BATCHES[3]))


def test_short_sequences_beside_long_ones_are_spread():
    """Megatron's BalancedCPScheduler puts the 500 on two ranks: 11 times the mean load (notes of this project)."""
    lengths = [90_000] * 2 + [45_000] + [22_000] * 2 + [11_000] * 7 + [640] * 500
    costs = published()
    plan = Planner(costs).plan(lengths)
    padded = [-(-n // 128) * 128 for n in lengths]
    assert timing(costs, plan.packing, padded).imbalance < 1.1


def test_too_long_a_sequence_names_itself_and_what_would_help():
    with pytest.raises(
        TooLongError, match=r"400,000 tokens fits no group: .* 64 ranks is 383,\d\d\d; .* recomputation"
    ):
        Planner(published()).plan([100, 400_000])
    with pytest.raises(ValueError, match="takes .* GiB of states on each of 2 ranks"):
        Costs(flexsp("7b"), flexsp_cluster(2))


def _small(ranks: int, room: float, speeds: tuple[float, ...] | None = None, **kinds: object) -> Costs:
    """Costs in seconds that are easy to read: a pair 1e-3, a token 0.1, a launch 1."""
    layer = Layer(1, pair=2e-3, token=0.1, token_bytes=1.0)
    model = Model("small", (layer,), launch=1.0, state_bytes=0.0, activation_bytes=1.0, **kinds)  # type: ignore[arg-type]
    return Costs(model, Cluster("c", ranks, room, {1: Wire(1e9), 2: Wire(20.0), 4: Wire(4.0)}, speeds))


def _best(costs: Costs, lengths: list[int]) -> float:
    """The least time of all plans, by trying them: every partition into micro-steps, sizes, and groups."""

    def partitions(items: tuple[int, ...]):
        if not items:
            yield ()
            return
        for n in range(len(items)):
            for others in itertools.combinations(items[1:], n):
                block = (items[0], *others)
                for rest in partitions(tuple(i for i in items[1:] if i not in others)):
                    yield (block, *rest)

    ways_of_all = list(itertools.product(costs.sizes, range(len(costs.names))))

    @cache
    def alone(block: tuple[int, ...], size: int, choice: int) -> float:
        """Seconds of a group; infinite where it does not fit."""
        held = [lengths[i] for i in block]
        fits = sum(held) <= costs.room(choice, 0, size)
        return float(costs.group(held, 0, size, choice).sum()) if fits else np.inf

    def step(items: tuple[int, ...]) -> float:
        least = np.inf
        for blocks in partitions(items):
            for ways in itertools.product(ways_of_all, repeat=len(blocks)):
                if sum(size for size, _ in ways) <= costs.cluster.ranks:
                    least = min(least, max(alone(b, *way) for b, way in zip(blocks, ways, strict=True)))
        return least + costs.model.launch

    every = {
        items: step(items)
        for n in range(1, len(lengths) + 1)
        for items in itertools.combinations(range(len(lengths)), n)
    }
    return min(sum(every[block] for block in blocks) for blocks in partitions(tuple(range(len(lengths)))))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=4), st.sampled_from([2, 4]), st.sampled_from([40.0, 130.0]))
def test_between_the_bound_and_the_best_of_all_plans(lengths, ranks, room):
    costs = _small(ranks, room)
    try:
        plan = Planner(costs, quantum=1).plan(lengths)
    except TooLongError:
        assert max(lengths) > ranks * room
        return
    best = _best(costs, lengths)
    assert plan.bound <= best * (1 + 1e-9) and best <= plan.seconds * (1 + 1e-9)
    assert plan.seconds <= 1.05 * best


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=3), st.sampled_from([20.0, 40.0]), st.floats(1.01, 1.5))
def test_the_same_where_groups_may_compute_again(lengths, room, dearer):
    costs = _small(4, room, recompute=(NONE, Recompute("full", activations=0.5, tokens=dearer, pairs=1.1)))
    try:
        plan = Planner(costs, quantum=1).plan(lengths)
    except TooLongError:
        assert max(lengths) > 8 * room
        return
    best = _best(costs, lengths)
    assert plan.bound <= best * (1 + 1e-9) and best <= plan.seconds * (1 + 1e-9)
    assert plan.seconds <= 1.25 * best


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    ranks=st.sampled_from([1, 2, 6, 8, 48]),
    speeds=st.booleans(),
    recompute=st.booleans(),
    meets=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_sequence_runs_once_within_memory_whatever_the_lengths(lengths, ranks, speeds, recompute, meets, seed):
    rng = np.random.default_rng(seed)
    again = (NONE, Recompute("full", activations=0.3, tokens=1.3, pairs=1.2)) if recompute else (NONE,)
    layers = (Layer(2, pair=1e-6, token=1e-3, token_bytes=10.0, calls=3), Layer(6, token=1e-3, state_bytes=100.0))
    model = Model("any", layers, 0.5, 10.0, activation_bytes=1.0, logit_bytes=0.5, recompute=again, meets=meets)
    own = tuple(rng.uniform(0.4, 1.0, ranks)) if speeds else None
    memories = tuple(rng.uniform(2000, 4000, ranks)) if speeds else None
    cluster = Cluster("c", ranks, 3000.0, {1: Wire(1e4, 1e-3), 4: Wire(1e3, 1e-2)}, own, memories)
    costs = Costs(model, cluster)
    try:
        plan = Planner(costs, quantum=16).plan(lengths)
    except TooLongError as error:
        assert error.length > error.limit
        return
    plan.packing.check(ranks, len(lengths))
    plan.packing.plan(3, lengths, ranks).check(ranks)  # what the executor asks for
    held = timing(costs, plan.packing, lengths)
    full = np.array(memories or (3000.0,) * ranks)
    assert (held.peak <= full + 1e-6).all()
    assert plan.bound * (1 - 1e-9) <= plan.seconds
    assert held.seconds <= plan.seconds * (1 + 1e-9)  # lengths are rounded up for the plan


def test_a_slow_rank_gets_less_and_most_of_the_loss_is_recovered():
    lengths = BATCHES[0]
    alike = flexsp_cluster()
    slow = Cluster("slow", 64, alike.memory, alike.wires, speeds=(1.0,) * 5 + (0.5,) + (1.0,) * 58)
    known, costs = Planner(published()).plan(lengths), Costs(flexsp("7b"), slow)
    suffered = seconds(costs, known.packing, lengths)
    adapted = Planner(costs).plan(lengths)
    assert adapted.seconds < suffered and adapted.bound <= adapted.seconds
    assert suffered - adapted.seconds >= 0.5 * (suffered - known.seconds)
    loads = timing(costs, adapted.packing, lengths)
    tokens = np.zeros(64)
    for shares in adapted.packing.micro_steps:
        for share in shares:
            tokens[share.first : share.first + share.size] += sum(lengths[s] for s in share.sequences) / share.size
    assert tokens[5] < 0.75 * np.median(tokens) and loads.imbalance < 1.4


def test_groups_lie_on_aligned_blocks_and_slow_ranks_in_small_ones():
    assert place([4, 2, 1, 1], [1.0] * 8) == [0, 4, 6, 7]
    assert place([4, 2, 1, 1], [0.5] + [1.0] * 7) == [4, 2, 1, 0]
    with pytest.raises(ValueError, match="no 4 aligned ranks"):
        place([4, 4], [0.5] + [1.0] * 6)
    with pytest.raises(ValueError, match="not aligned"):
        Packing(((Share(1, 2, (0,)),),)).check(4, 1)
    with pytest.raises(ValueError, match="overlap"):
        Packing(((Share(0, 2, (0,)), Share(1, 1, (1,))),)).check(4, 2)
    with pytest.raises(ValueError, match="runs 1 sequences of 2"):
        Packing(((Share(0, 2, (0,)),),)).check(4, 2)


def test_what_a_step_sends_once_changes_no_plan():
    costs, lengths = _small(4, 20.0), [30, 20, 9, 9, 3]
    sending = _small(4, 20.0, once=7.0)
    without, with_it = (Planner(each, quantum=1).plan(lengths) for each in (costs, sending))
    assert with_it.packing == without.packing
    assert with_it.seconds == pytest.approx(without.seconds + 7) and with_it.bound == pytest.approx(without.bound + 7)


def test_costs_by_hand():
    window = Layer(2, pair=1.0, token=10.0, window=4, token_bytes=6.0, calls=2)
    linear = Layer(3, token=5.0, state_bytes=7.0, states="gather")
    model = Model("m", (window, linear), launch=100.0, state_bytes=8.0, activation_bytes=1.0, resident_bytes=1.0)
    costs = Costs(model, Cluster("c", 4, 10.0, {1: Wire(1.0, 0.5), 4: Wire(2.0, 0.25)}))
    assert costs.states == 3.0 and costs.room(0, 0, 2) == 14.0
    # ten tokens: 4²/2 + 6·4 = 32 pairs a windowed layer
    assert costs.computing([10]).tolist() == [[2 * (32 + 100)], [150.0]]
    assert costs.group([10], 0, 1).tolist() == [264.0, 150.0]
    # on four ranks: a quarter of that, 2·6·10/4 bytes at 2 a second, 2·2 calls of 0.25 s; 3 layers of 2·7·3 bytes
    assert costs.group([10], 0, 4).tolist() == [66 + 15 + 1, 37.5 + 63]
    assert costs.micro_step([costs.group([10], 0, 4)]) == 100 + 66 + 16 + 37.5 + 63
    together = Costs(Model("m", model.layers, 100.0, 8.0, 1.0, meets=True), costs.cluster)
    assert together.micro_step([np.array([5.0, 1.0]), np.array([2.0, 3.0])]) == 108.0  # experts meet in every layer
    assert costs.micro_step([np.array([5.0, 1.0]), np.array([2.0, 3.0])]) == 106.0
    cluster = Cluster.of_machines("two", 2, 8, 1.0, Wire(9.0), Wire(1.0))
    assert [cluster.wire(size).bandwidth for size in (1, 2, 8, 16)] == [9.0, 9.0, 9.0, 1.0]


def test_a_packing_that_is_given_up_early_would_have_failed():
    """Where all must fit, `pack` ends once too much time is lost; without that it fails a little later."""
    rng = np.random.default_rng(3)
    ended = 0
    for choices in (False, True):
        costs = Costs(flexsp("7b", recompute=choices), flexsp_cluster())
        for _ in range(10):
            lengths = np.unique(rng.lognormal(8, 1.4, 30).astype(int).clip(128, 30_000))[::-1].tolist()
            counts = rng.integers(1, 4, len(lengths)).tolist()
            early, late = search.Search(costs, lengths, counts), search.Search(costs, lengths, counts)
            late.least_work = lambda counts: -math.inf  # so that nothing counts as lost
            least = max(early.longest(counts), early.least_work(counts) / early.ranks)
            for times in np.linspace(1, 1.25, 12):
                one, other = (one.pack(times * least, counts, all_or_none=True) for one in (early, late))
                assert (one is None) == (other is None)
                assert one is None or one.seconds == other.seconds
                ended += one is None
    assert 0 < ended < 240


def _forget_memory(monkeypatch):
    honest = search.Search.__init__

    def wide(self, *args):
        honest(self, *args)
        self.room = [[100 * room for room in rooms] for rooms in self.room]
        self.total_tokens *= 100

    monkeypatch.setattr(search.Search, "__init__", wide)


def _run_one_twice(monkeypatch):
    honest = Planner._ranks

    def twice(self, search, found, padded):
        packing = honest(self, search, found, padded)
        (first, *rest), *others = packing.micro_steps
        again = Share(first.first, first.size, (*first.sequences, rest[-1].sequences[0]), first.recompute)
        return Packing(((again, *rest), *others))

    monkeypatch.setattr(Planner, "_ranks", twice)
    monkeypatch.setattr(planner, "improve", lambda costs, packing, lengths, rounds: packing)


def _lose_one(monkeypatch):
    honest = Planner._ranks

    def lost(self, search, found, padded):
        (first, *rest), *others = honest(self, search, found, padded).micro_steps
        return Packing(((Share(first.first, first.size, first.sequences[1:]), *rest), *others))

    monkeypatch.setattr(Planner, "_ranks", lost)
    monkeypatch.setattr(planner, "improve", lambda costs, packing, lengths, rounds: packing)


def _place_all_on_the_first_ranks(monkeypatch):
    monkeypatch.setattr(planner, "place", lambda sizes, speeds: [0] * len(sizes))


def _shift_by_one(monkeypatch):
    monkeypatch.setattr(planner, "place", lambda sizes, speeds: [1 + first for first in place(sizes, speeds)])


def _send_for_nothing(monkeypatch):
    monkeypatch.setattr(Costs, "_sending", lambda self, size: np.zeros(len(self.model.layers)))


def _count_a_pair_once(monkeypatch):
    monkeypatch.setattr(Layer, "pairs", lambda self, lengths: lengths * lengths / 4)


def _forget_the_launch(monkeypatch):
    honest = Costs.micro_step
    monkeypatch.setattr(Costs, "micro_step", lambda self, groups: honest(self, groups) - self.model.launch)


MUTATIONS = [
    _forget_memory,
    _run_one_twice,
    _lose_one,
    _place_all_on_the_first_ranks,
    _shift_by_one,
    _send_for_nothing,
    _count_a_pair_once,
    _forget_the_launch,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.__name__.strip("_") for m in MUTATIONS])
def test_the_checker_turns_red(monkeypatch, mutation):
    mutation(monkeypatch)
    costs = published()
    with pytest.raises((AssertionError, ValueError)):
        plan = Planner(costs).plan(BATCHES[0])
        assert audited(plan.packing, BATCHES[0]) == pytest.approx(1e3 * plan.seconds, rel=1e-9)


def test_the_bound_holds_for_rivals_too():
    costs = published()
    for lengths in BATCHES[:3]:
        values, counts = np.unique(lengths, return_counts=True)
        bound = lower_bound(costs, values[::-1].tolist(), counts[::-1].tolist())
        for rival in (BestFit(costs), LongestFirst(costs), OneSize(costs), WorkByPairs(costs)):
            assert bound <= seconds(costs, rival.pack(lengths), lengths)
