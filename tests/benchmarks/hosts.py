"""Transports between hosts on a slow network: four network namespaces on a bridge, each with a link of limited rate.

    python -m tests.benchmarks.hosts [megabits a second …]      Linux, as root

One layer, forward and backward, of a packed sequence over four ranks: gated linear attention through the transports of
states, softmax attention through those of keys and values. A step is all of it; "none" is the same work with messages
that nobody sends. What is communicated is timed by itself as well: the same messages with no work between them. A time
is the slowest rank's, the least of the rounds, transports in turn. Links are limited with tc's tbf, both ways;
namespaces go with the program, also when it is interrupted. Writes a section and a plot of docs/transports.md.

Legend: B spans, T tokens, H heads, G key/value heads, K key width, V value width.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.kernels.chunking import Effect
from models.recurrence import Diagonal
from parallel.collectives import LEDGER, Comm
from parallel.sequence.attention import GatherKeys, MeshKeys, Ring, Ulysses, ring_ulysses
from parallel.sequence.attention import all_gather as gathered
from parallel.sequence.span_layout import SpanLayout
from parallel.sequence.spread import Spread
from parallel.sequence.states import AllScan, GatherEffects, Relay, cross
from tests.benchmarks.published import DOCUMENT
from tests.benchmarks.section import write

RANKS, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 64
LENGTHS = (1024, 4096, 16384)
RATES = (50, 400)  # megabits a second
WORKED = 4096  # the longest at which softmax attention is also computed
ROUNDS = 3  # the first warms up
SECONDS = 150.0  # of a rate; the rounds left then are not run
PLOT = DOCUMENT.parent / "images/transports.png"


class Rows(MeshKeys):
    """USP on a mesh of two by two, whatever the heads would allow."""

    def split(self, ranks: int, heads: int, kv_heads: int) -> int:
        return 2


class Blank:
    """A kernel of softmax attention that computes nothing."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:-1])

    @staticmethod
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


class Done:
    def wait(self) -> None:
        pass


class Silent(Comm):
    """Everybody sends what this rank does, at once: the work of a transport without its messages."""

    def all_gather(self, x: Tensor, *, purpose: str) -> Tensor:
        return x.expand(self.size, *x.shape).contiguous()

    def reduce_scatter(self, x: Tensor, *, purpose: str) -> Tensor:
        return x[self.rank].clone()

    def send(self, x: Tensor, to: int, *, purpose: str) -> Any:
        return Done()

    def start_receive(self, like: Tensor, source: int, *, purpose: str) -> Any:
        return Done(), torch.zeros_like(like)


STATES = {"none": GatherEffects(), "gather": GatherEffects(), "relay": Relay(), "allscan": AllScan()}
KEYS = {"none": GatherKeys(), "gather": GatherKeys(), "ring": Ring(), "ulysses": Ulysses(), "usp": Rows()}
CASES = [("states", name) for name in STATES] + [("keys", name) for name in KEYS]

Run = tuple[str, str, bool, int, float, float]  # kind, transport, with its work, tokens, seconds, bytes received
Times = dict[tuple[str, str, bool, int], tuple[float, float]]


def sequence(length: int, rank: int, recurrence: Any, attention: Any, comm: Comm) -> Spread:
    """One document; states travel along contiguous spans, keys between two spans a rank, which balances causal work."""
    T = length // RANKS
    spans = tuple(((r * T, (r + 1) * T),) for r in range(RANKS))
    if attention is not None:
        half, last = T // 2, 2 * RANKS - 1
        spans = tuple(
            ((r * half, r * half + half), ((last - r) * half, (last - r) * half + half)) for r in range(RANKS)
        )
    positions = torch.stack([torch.arange(begin, end) for begin, end in spans[rank]])
    return Spread(
        positions=positions,
        documents=torch.zeros_like(positions),
        num_documents=1,
        counted=torch.ones_like(positions, dtype=torch.bool),
        chain=SpanLayout(comm, spans),
        recurrence=recurrence or STATES["gather"],
        attention=attention or KEYS["gather"],
    )


def case(kind: str, name: str, works: bool, length: int, rank: int, group: dist.ProcessGroup) -> Callable[[], None]:
    """A layer's forward and backward; its messages alone where it does not work."""
    comm = (Silent if name == "none" else Comm)(tuple(range(RANKS)), rank, group)
    states = kind == "states"
    seq = sequence(length, rank, STATES[name] if states else None, None if states else KEYS[name], comm)
    B, T = seq.positions.shape

    def leaf(heads: int) -> Tensor:
        return torch.randn(B, T, heads, WIDTH, requires_grad=True)

    q, k, v = leaf(HEADS), leaf(HEADS if states else KV_HEADS), leaf(HEADS if states else KV_HEADS)
    decay = torch.full((B, T, HEADS, WIDTH), -0.01)
    recurrence, effect = Diagonal("gla"), Effect(torch.zeros(B, HEADS, WIDTH), leaf_state(B), torch.ones(B))

    def run() -> None:
        if states:
            out = seq.scan(recurrence, q, k, v, decay, slot="x")
        else:
            out = seq.attend(q, k, v, slot="x")
        out.sum().backward()

    def messages() -> None:
        with blank():
            if states:
                out = cross(seq.recurrence, seq.chain, recurrence, effect)()
            else:
                out = seq.attend(q, k, v, slot="x")
        out.sum().backward()

    return run if works else messages


def leaf_state(B: int) -> Tensor:
    return torch.zeros(B, HEADS, WIDTH, WIDTH, requires_grad=True)


@contextlib.contextmanager
def blank() -> Iterator[None]:
    """Attention that is asked for in here computes nothing, its backward neither."""
    honest = ring_ulysses.tile_for
    ring_ulysses.tile_for = gathered.tile_for = lambda device, softcap=None: Blank  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        ring_ulysses.tile_for = gathered.tile_for = honest


def ranks_part(rank: int, space: str, report: Any) -> None:
    """What the process of a rank does, in its namespace."""
    with open(f"/var/run/netns/{space}") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {space}")
    os.environ["GLOO_SOCKET_IFNAME"] = "wire"
    torch.set_num_threads(1)
    store = dist.TCPStore("10.99.0.1", 29400, RANKS, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=90))
    assert dist.group.WORLD is not None
    group, deadline = dist.group.WORLD, time.monotonic() + SECONDS
    for length in LENGTHS:
        asked = [
            (kind, name, works)
            for works in (False, True)
            for kind, name in CASES
            if (works or name != "none") and (not works or kind == "states" or length <= WORKED)
        ]
        runs = [case(*each, length, rank, group) for each in asked]
        for _ in range(ROUNDS):
            for each, run in zip(asked, runs, strict=True):
                late = torch.tensor([float(time.monotonic() > deadline)])
                dist.all_reduce(late, op=dist.ReduceOp.MAX)  # also a barrier
                if late.item():
                    break
                LEDGER.take()
                began = time.perf_counter()
                run()
                took = torch.tensor([time.perf_counter() - began, float(sum(LEDGER.take()[0].values()))])
                dist.all_reduce(took, op=dist.ReduceOp.MAX)
                if rank == 0:
                    report.put((*each, length, *took.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def shell(line: str) -> None:
    subprocess.run(line.split(), check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def namespaces(rate: int) -> Iterator[list[str]]:
    """A namespace for each rank, whose interface `wire` has 10.99.0.(rank + 1), and a hub with their bridge."""
    mark = f"farspan-{os.getpid()}"
    hub, spaces = f"{mark}-hub", [f"{mark}-{rank}" for rank in range(RANKS)]
    limit = f"root tbf rate {rate}mbit burst 256kb latency 200ms"
    try:
        for space in (hub, *spaces):
            shell(f"ip netns add {space}")
        shell(f"ip -n {hub} link add bridge type bridge")
        shell(f"ip -n {hub} link set bridge up")
        for rank, space in enumerate(spaces):
            shell(f"ip -n {hub} link add port{rank} type veth peer name wire netns {space}")
            shell(f"ip -n {hub} link set port{rank} master bridge up")
            shell(f"ip -n {space} addr add 10.99.0.{rank + 1}/24 dev wire")
            shell(f"ip -n {space} link set wire up")
            shell(f"ip -n {space} link set lo up")
            shell(f"tc -n {hub} qdisc add dev port{rank} {limit}")
            shell(f"tc -n {space} qdisc add dev wire {limit}")
        yield spaces
    finally:
        for space in (*spaces, hub):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=20)


def measure(rate: int) -> list[Run]:
    """All runs over links of that rate."""
    context = multiprocessing.get_context("fork")
    report, found = context.SimpleQueue(), []
    with namespaces(rate) as spaces:
        workers = [context.Process(target=ranks_part, args=(r, space, report)) for r, space in enumerate(spaces)]
        try:
            for worker in workers:
                worker.start()
            deadline = time.monotonic() + SECONDS + 120
            while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
                while not report.empty():
                    found.append(report.get())
                if any(worker.exitcode for worker in workers):
                    break
                time.sleep(0.1)
            while not report.empty():
                found.append(report.get())
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
                    worker.join()
    return found


def least(found: list[Run]) -> Times:
    """The least seconds of the runs of a case but the first, where there are several; and its bytes."""
    runs: dict[tuple[str, str, bool, int], list[tuple[float, float]]] = {}
    for *key, seconds, size in found:
        runs.setdefault(tuple(key), []).append((seconds, size))  # type: ignore[arg-type]
    return {key: min(each[1:] or each) for key, each in runs.items()}


def table(times: dict[int, Times]) -> str:
    lines = [
        "| Mbit/s | tokens | | transport | received | communication | of `gather`'s | step | over no communication |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rate, found in times.items():
        for length in LENGTHS:
            for kind, name in CASES:
                if name == "none" or (kind, name, False, length) not in found:
                    continue
                seconds, size = found[kind, name, False, length]
                share = seconds / found[kind, "gather", False, length][0]
                step, none = (found.get((kind, n, True, length), (0.0, 0))[0] for n in (name, "none"))
                whole = f"{step * 1e3:.0f} ms | {step / none:.2f}" if step and none else "– | –"
                lines.append(
                    f"| {rate} | {length:,} | {kind} | `{name}` | {size / 1e6:.2f} MB | {seconds * 1e3:.0f} ms "
                    f"| {share:.2f} | {whole} |"
                )
    return "\n".join(lines)


def plot(times: dict[int, Times]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(times), figsize=(5 * len(times), 4), sharey=True, squeeze=False)
    for axis, (rate, found) in zip(axes[0], times.items(), strict=True):
        for kind, name in CASES:
            points = [(n, found[kind, name, False, n][0]) for n in LENGTHS if (kind, name, False, n) in found]
            if points:
                style = "-o" if kind == "states" else "--s"
                axis.plot(*zip(*points, strict=True), style, label=f"{kind}: {name}", markersize=4)
        axis.set(title=f"{rate} Mbit/s", xlabel="tokens, over 4 ranks", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds of communication, a layer")
    axes[0][-1].legend(fontsize=7)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110, bbox_inches="tight")


def main(rates: list[int]) -> None:
    if os.geteuid() or not Path("/sys/class/net").exists():
        sys.exit("hosts: network namespaces need Linux and root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces go on the way out
    times = {rate: least(measure(rate)) for rate in rates}
    plot(times)
    write(DOCUMENT, "Between hosts on a slow network", text := describe(times))
    print(text)


def describe(times: dict[int, Times]) -> str:
    load = os.getloadavg()[0]
    return f"""
`python -m tests.benchmarks.hosts` writes this section: four network namespaces on a bridge, links limited by tbf, one
layer forward and backward, {HEADS} heads of {WIDTH} ({KV_HEADS} of keys and values), fp32, `usp` as two by two ranks.
Communication: a layer's messages alone, with no work between them. Step: the whole layer, over that of the same work
without messages. A figure that is missing was not reached in {SECONDS:.0f} seconds a rate.

{os.cpu_count()} cores for four ranks and for all else that ran there, load {load:.0f}: what is communicated can be read
where it takes more than some 50 ms, bytes are exact. A ratio of steps below 1 is that load and nothing else, and those
above it are no better: on a loaded machine they say little.

![Communication against length](images/transports.png)

{table(times)}

States take the same bytes at every length, those of the busiest rank: the three ways to send them stay flat. Keys and
values grow with the length, by every way.
"""


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or list(RATES))
