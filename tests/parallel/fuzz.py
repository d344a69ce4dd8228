"""Plans that nobody would write, against one process: any that `Plan.check` lets through gives the same loss and the
same gradients.

A case is a batch (documents, padding, targets left out), a plan of four ranks (groups, spans and idle ranks as they
come, listed in any order), a model, transports, and whether spans follow in time. The world that runs cases stays up:
hypothesis sends it one after another, and makes a failing one small.

    make plans        two thousand of them
"""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import assume
from hypothesis import strategies as st
from torch.distributed import TCPStore

from models.axes import initialise
from models.lm import LM
from models.sequence import Whole
from parallel.mesh import Groups
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.sequence.attention import GatherKeys, MeshKeys, Ring, Ulysses
from parallel.sequence.states import AllScan, GatherEffects, Relay
from tests.parallel import matrix
from tests.parity import BALANCE, Sample, differences, small_model
from train.execute import Executor
from train.loss import sums
from train.time_spans import Spans

WORLD, PATIENCE = 4, 120.0  # seconds, the start of a world among them
Z = 0.01
HEADS = {"heads": 12, "kv_heads": 12, "head_dim": 4}  # of which every number of ranks gets as many
EFFECTS = {"gather": GatherEffects(), "relay": Relay(), "allscan": AllScan(2)}
KEYS = {"gather": GatherKeys(2), "ring": Ring(), "ulysses": Ulysses(), "usp": MeshKeys()}
HYBRIDS: dict[str, dict[str, Any]] = {
    "hybrid": HEADS,
    "hybrid, one key head": HEADS | {"kv_heads": 1},
    "hybrid, window": HEADS | {"window": 5},
    "hybrid, window and sinks": HEADS | {"window": 7, "sinks": 2, "qk_norm": True},
}
ALONE = ("linear", "lru", "mlstm", "lightnet", "longhorn", "mamba2", "rwkv7", "slstm", "lact", "mom")


@dataclass(frozen=True)
class Case:
    """span_tokens: of a span in time on a rank; None: none follow."""

    batch: tuple[Sample, ...]
    plan: Plan
    model: str
    effects: str
    keys: str
    span_tokens: int | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.lists(samples(), min_size=1, max_size=3).map(tuple))
    assume(any((s.targets != -100).any() for s in batch))
    lengths = tuple(len(s.tokens) for s in batch)
    steps = draw(st.integers(1, 2))
    cuts = [draw(st.sets(st.integers(1, WORLD - 1))) for _ in range(steps)]
    ranks = [np.split(draw(st.permutations(range(WORLD))), sorted(cut)) for cut in cuts]
    where = st.sampled_from([(m, g) for m, groups in enumerate(ranks) for g in range(len(groups))])
    places = [draw(where) for _ in batch]
    order = draw(st.permutations(range(len(batch))))
    micro_steps = []
    for m, groups in enumerate(ranks):
        held = [tuple(s for s in order if places[s] == (m, g)) for g in range(len(groups))]
        made = [draw(placed(tuple(map(int, r)), own, lengths)) for r, own in zip(groups, held, strict=True)]
        micro_steps.append(MicroStep(tuple(made)))
    return Case(
        batch,
        Plan(draw(st.integers(0, 9)), lengths, tuple(micro_steps)),
        draw(st.sampled_from([*HYBRIDS, *ALONE])),
        draw(st.sampled_from(sorted(EFFECTS))),
        draw(st.sampled_from(sorted(KEYS))),
        draw(st.none() | st.integers(1, 6).map(lambda n: -(-sum(lengths) // n))),
    )


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    documents = draw(st.lists(st.integers(1, 4) | st.integers(1, 25), min_size=1, max_size=4))
    padding = draw(st.sampled_from([0, 0, 1, 13]))
    first = draw(st.integers(0, sum(documents)))
    return Sample((*documents, *[padding] * (padding > 0)), draw(st.integers(0, 9)), (first, first + 20), padding)


@st.composite
def placed(draw: st.DrawFn, ranks: tuple[int, ...], sequences: tuple[int, ...], lengths: tuple[int, ...]) -> Group:
    """A group whose ranks hold none, one or several spans of the sequences, each rank's own of one length."""
    left = sum(lengths[s] for s in sequences)
    own: dict[int, int] = {}  # tokens of each span of a rank
    pieces: list[int] = []  # whose each span is, in the order of the sequence
    for rank in draw(st.permutations(ranks)):
        count = draw(st.integers(0, 3))
        if count and left >= count:
            own[rank] = draw(st.integers(1, left // count))
            pieces += [rank] * count
            left -= count * own[rank]
    if left:  # what is left over lies with the last rank, as one span
        last = ranks[-1]
        left += own.get(last, 0) * pieces.count(last)
        pieces = [*(rank for rank in pieces if rank != last), last]
        own[last] = left
    spans: dict[int, list[tuple[int, int]]] = {rank: [] for rank in ranks}
    at = 0
    for rank in draw(st.permutations(pieces)):
        spans[rank].append((at, at + own[rank]))
        at += own[rank]
    return Group(ranks, sequences, tuple(tuple(draw(st.permutations(spans[rank]))) for rank in ranks))


@cache
def model(name: str) -> LM:
    """In fp64, with its numbers."""
    if name not in HYBRIDS:
        return matrix.model(name, "fp64")
    built = initialise(small_model(HYBRIDS[name]).double(), seed=1)
    built.compute = torch.float64
    return built


def alone(case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one process, a sequence at a time, without its padding."""
    whole, total = model(case.model), 0.0
    whole.zero_grad()
    targets, tokens = _counts(case)
    for s in case.batch:
        real, asked, positions = (torch.from_numpy(x[s.counted])[None] for x in (s.tokens, s.targets, s.positions))
        part = sums(whole(real, Whole.of(positions)), asked)
        loss = part.objective(targets=targets, tokens=tokens, balance_weight=BALANCE, z_weight=Z)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.numpy().copy() for name, p in whole.named_parameters()}


def together(case: Case, groups: Groups) -> tuple[float, dict[str, np.ndarray]]:
    """The same of this world."""
    local = model(case.model)
    local.zero_grad()
    executor = Executor(
        local,
        groups,
        torch.device("cpu"),
        EFFECTS[case.effects],
        KEYS[case.keys],
        BALANCE,
        z_weight=Z,
        spans=None if case.span_tokens is None else Spans(case.span_tokens),
    )
    tally = executor.train(case.plan, case.batch)
    targets, tokens = _counts(case)
    loss = tally.cross_entropy / max(targets, 1) + (BALANCE * tally.balance + Z * tally.z) / max(tokens, 1)
    parts = [loss.double().view(1), *(p.grad.flatten() for p in local.parameters())]
    first, *flat = groups.world_comm.all_reduce(torch.cat(parts), purpose="sums").split([len(x) for x in parts])
    named = zip(local.named_parameters(), flat, strict=True)
    return first.item(), {name: g.view_as(p).numpy() for (name, p), g in named}


def _counts(case: Case) -> tuple[int, int]:
    return sum(int((s.targets != -100).sum()) for s in case.batch), sum(int(s.counted.sum()) for s in case.batch)


def answer(case: Case, groups: Groups) -> tuple[float, dict[str, np.ndarray]]:
    case.plan.check(WORLD)
    return together(case, groups)


class World:
    """Ranks that answer one case after another; begun anew once one has failed, since the others may wait for it."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "tests.parallel.fuzz"])
        self._ranks: list[tuple[Any, Any]] = []

    def run(self, case: Case) -> list[tuple[float, dict[str, np.ndarray]]]:
        """What each rank says. Raises AssertionError with the first traceback, or where time runs out."""
        if not self._ranks:
            self._begin()
        for pipe, _ in self._ranks:
            pipe.send(case)
        answers, waiting, end = {}, {pipe: r for r, (pipe, _) in enumerate(self._ranks)}, time.monotonic() + PATIENCE
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            for pipe in ready:
                ok, answers[waiting.pop(pipe)] = pipe.recv()
                if not ok:
                    self.end()
                    raise AssertionError(list(answers.values())[-1])
            if not ready:
                self.end()
                raise AssertionError(f"ranks {sorted(waiting.values())} still run after {PATIENCE} s")
        return [answers[rank] for rank in range(WORLD)]

    def _begin(self) -> None:
        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        for rank in range(WORLD):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, store.port, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((here, process))
        self._store = store

    def end(self) -> None:
        for _, process in self._ranks:
            process.kill()
            process.join()
        self._ranks = []


def _serve(rank: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=TCPStore("127.0.0.1", port, WORLD, False), rank=rank, world_size=WORLD)
    groups = Groups()
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, answer(case, groups)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@contextmanager
def world() -> Iterator[World]:
    running = World()
    try:
        yield running
    finally:
        running.end()


def wrong(case: Case, running: World, tolerance: float = 1e-10) -> str | None:
    """What differs on some rank, None where nothing does."""
    want = alone(case)
    for rank, got in enumerate(running.run(case)):
        for name, error in differences(got, want).items():
            if not error <= tolerance:
                return f"rank {rank}, {name}: {error:.2e} of its norm"
    return None


def main(count: int) -> None:
    from hypothesis import HealthCheck, given, settings

    with world() as running:

        @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
        @given(cases())
        def holds(case: Case) -> None:
            assert wrong(case, running) is None, wrong(case, running)

        holds()
    print(f"{count:,} plans: the loss and every gradient of each are those of one process")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
