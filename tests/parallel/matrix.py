"""The matrix of parity: mixer × transport × layout × packing × ranks × precision, as data, and how a world runs it.

A cell is one packed sequence through a small model on some ranks. What is held to one process: the loss, the output and
the gradient at every layer's input for the tokens of each rank, and every parameter's gradient, on every rank. The
weights are moved from where they start, so that no path is closed. Starting a world costs seconds: one runs many cells.
"""

import inspect
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch

from models.axes import initialise
from models.lm import LM
from models.mixers import MIXERS
from models.nonlinear_recurrence import Serial
from models.recurrence import Recurrence
from models.sequence import Whole
from parallel.mesh import Groups
from parallel.schedule.plan import Group, MicroStep, Plan, Span
from parallel.sequence.attention import GatherKeys, MeshKeys, Ring, Ulysses
from parallel.sequence.attention.ring_ulysses import divides
from parallel.sequence.states import AllScan, GatherEffects, Relay
from tests.parity import BALANCE, DTYPE, VOCABULARY, differences, mixer_model, rounding
from train.execute import Executor
from train.loss import sums

LENGTH = 72  # tokens of a packing: as many for each of up to four ranks, with one span each or with two
RANKS = (1, 2, 3, 4)
EFFECTS = {"gather": GatherEffects(), "relay": Relay(), "allscan 2": AllScan(2), "allscan 3": AllScan(3)}
KEYS = {"gather": GatherKeys(), "ring": Ring(), "ulysses": Ulysses(), "usp": MeshKeys()}
FEW_BITS = {name: type(keys)(keys="int8") for name, keys in KEYS.items()}
ROUNDED = "attention, keys in int8"  # on more than one rank, and in the process that these are held to
NEEDED = {"heads": 2, "kv_heads": 1}
ATTENTION = {  # Ulysses splits a head a rank, or copies one; USP has rows and columns only with the second, on four
    "attention": {"heads": 12, "kv_heads": 12, "head_dim": 4},
    "attention, two key heads": {"heads": 6, "kv_heads": 2, "head_dim": 4},
    "attention, one key head": {"heads": 12, "kv_heads": 1, "head_dim": 4},
    "attention, capped": {"heads": 12, "kv_heads": 12, "head_dim": 4, "softcap": 0.5, "sink_logits": True},
    ROUNDED: {"heads": 6, "kv_heads": 2, "head_dim": 4},
    "attention, window": {"heads": 12, "kv_heads": 1, "head_dim": 4, "window": 9, "sinks": 3, "qk_norm": True},
}
# Titans: a dense A, a convolution, and weights that fp32 can solve; of five Gated DeltaNets none in 100 are.
OPTIONS = {
    "dsa": {"top_k": 6, "index_dim": 8},
    "lact": {"chunk": 64},
    "mom": {"memories": 3, "inner": partial(MIXERS["titans"], heads=2)},
}
# In fp64 only. Newton-Schulz enlarges small singular values, and with them what fp32 leaves there, to some 1e-4.
# Keys that differ in their last bit may be rounded to codes that differ.
IN_FP64 = {"lact", ROUNDED}
GATHERED = {"dsa", "gated_conv"}  # keys, or the inputs before a span, travel so whatever the transport
LAYOUTS = ("contiguous", "unequal", "zigzag", "idle rank")
# Of the weights, for mixers whose weights of seed 0 make a problem that fp32 solves to no better than 1e-5 in any order
# of summation: see `conditioned`.
SEEDS = {
    "deltanet": 4, "gated_deltanet": 74, "gated_deltanet2": 6, "gated_deltaproduct": 25, "gla": 11, "hgrn2": 1,
    "kda": 15, "lru": 25, "mamba2": 51, "mamba3": 3, "mlstm": 3, "mom": 3, "retnet": 55, "rwkv6": 8, "rwkv7": 1,
}  # fmt: skip
UNEQUAL = {2: (3,), 3: (40, 43), 4: (30, 31, 65)}  # a rank shorter than a convolution, one of a single token


class Cell(NamedTuple):
    mixer: str
    transport: str
    layout: str
    packing: str
    ranks: int
    precision: str


@dataclass(frozen=True)
class Packing:
    """A packed sequence, int64 [T] each: see `parallel.sequence.place.PackedSequence`."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    counted: np.ndarray


class Truth(NamedTuple):
    """Loss; gradients by parameter; by tensor [T, D] of the residual stream, what each token has in it."""

    loss: float
    gradients: dict[str, np.ndarray]
    streams: dict[str, np.ndarray]


def layout_spans(layout: str, ranks: int, length: int) -> tuple[tuple[Span, ...], ...] | None:
    """The spans of each rank; None where there is no such layout of so many ranks."""
    if layout == "contiguous":
        return tuple((span,) for span in _cut(length, ranks))
    if layout == "zigzag":
        parts = _cut(length, 2 * ranks)
        return tuple((parts[r], parts[-1 - r]) for r in range(ranks))
    if ranks == 1:
        return None
    if layout == "unequal":
        cuts = [0, *(cut * length // LENGTH for cut in UNEQUAL[ranks]), length]
        return tuple(((a, b),) for a, b in zip(cuts, cuts[1:], strict=False))
    working = [(span,) for span in _cut(length, ranks - 1)]
    return (working[0], (), *working[1:])


def _cut(length: int, parts: int) -> list[Span]:
    return [(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def edges() -> list[int]:
    """Where a span of any layout of any number of ranks begins, 0 left out."""
    laid = (layout_spans(layout, ranks, LENGTH) for layout in LAYOUTS for ranks in RANKS)
    return sorted({begin for spans in laid if spans for held in spans for begin, _ in held} - {0})


@cache
def packings() -> dict[str, Packing]:
    """Boundaries on the edges of all layouts at once, so that a packing and its truth serve them all."""

    def at(starts: Iterable[int]) -> tuple[int, ...]:
        return tuple(np.diff([0, *starts, LENGTH]).tolist())

    short = (3, 2, 1, 3, 3) * 6
    return {
        "one document": packed((72,)),
        "starts on edges": packed(at(edges())),
        "starts one before": packed(at(e - 1 for e in edges())),
        "starts one after": packed(at(e + 1 for e in edges())),
        "many in a rank, one over three": packed((2, 3, 1, 61, 2, 3)),
        "shorter than the convolution": packed(short),
        "one-token documents": packed((*[1] * 10, 17, *[1] * 20, 25)),
        "first ranks masked": packed((72,), drop=lambda t: t < 60),
        "last ranks masked": packed((30, 42), drop=lambda t: t >= 14),
        "uneven targets": packed((50, 22), drop=lambda t: np.random.default_rng(7).random(LENGTH) < t / LENGTH),
        "padding": packed((50, 3, 19), drop=lambda t: t >= 53, padding=19),
        "beyond a chunk": packed((150, 1, 137)),
    }


def packed(documents: tuple[int, ...], drop: Callable[[np.ndarray], Any] | None = None, padding: int = 0) -> Packing:
    """Random tokens in documents of these lengths, 0 in the last `padding`; targets are dropped at the places `drop`
    says."""
    length = sum(documents)
    tokens = np.random.default_rng(documents).integers(0, VOCABULARY, length)
    tokens[length - padding :] = 0
    positions = np.concatenate([np.arange(n) for n in documents])
    targets = np.where(np.roll(positions, -1) == 0, -100, np.roll(tokens, -1))
    if drop is not None:
        targets = np.where(drop(np.arange(length)), -100, targets)
    return Packing(tokens, targets, positions, np.arange(length) < length - padding)


@cache
def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """By row of the table: the mixer in the registry and its options."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, mixer in sorted(MIXERS.items()):
        asked = inspect.signature(mixer).parameters
        if name == "attention":
            found |= {variant: (name, options) for variant, options in ATTENTION.items()}
        else:
            found[name] = (name, {key: value for key, value in NEEDED.items() if key in asked} | OPTIONS.get(name, {}))
    return found


@cache
def kinds(mixer: str) -> set[type]:
    """What this row's recurrences are: affine ones, ones that are run; nothing for attention."""
    with torch.device("meta"):
        model = mixer_model(rows()[mixer][0], **rows()[mixer][1])
    declared = [getattr(m, "recurrence", None) for m in model.modules()]
    return {kind for kind in (Recurrence, Serial) if any(isinstance(each, kind) for each in declared)}


def recurrent(mixer: str) -> bool:
    """Whether states travel for this row, or keys."""
    return bool(kinds(mixer))


def transports(mixer: str) -> dict[str, Any]:
    """Where no span has an effect, states go from rank to rank whatever the transport of effects: `relay` stands for
    all."""
    if Serial in kinds(mixer):
        return {"relay": EFFECTS["relay"]}
    if mixer in GATHERED:
        return {"gather": KEYS["gather"]}
    if mixer == ROUNDED:
        return FEW_BITS
    return EFFECTS if recurrent(mixer) else KEYS


@cache
def cells() -> tuple[Cell, ...]:
    """All of them, in an order that keeps the models of a world in use."""
    found = []
    for mixer, (_, options) in rows().items():
        for transport in transports(mixer):
            for ranks in RANKS:
                if mixer == ROUNDED and ranks == 1:
                    continue
                if transport == "ulysses" and not divides(ranks, options["heads"], options.get("kv_heads", 1)):
                    continue
                for layout in LAYOUTS:
                    if layout_spans(layout, ranks, LENGTH) is not None:
                        found += [
                            Cell(mixer, transport, layout, p, ranks, d)
                            for p in packings()
                            for d in DTYPE
                            if d == "fp64" or mixer not in IN_FP64
                        ]
    return tuple(sorted(found, key=lambda cell: (cell.ranks, cell.mixer, cell.precision, cell.packing)))


def covering(seed: int = 0, tries: int = 40, *, packings_by_mixer: bool = False) -> list[Cell]:
    """Few cells in which every two values that some cell has together stand together (greedy, the same each time).

    packings_by_mixer: a mixer and a packing too, which takes three times the cells.
    """
    everything, pairs = cells(), every_pair if packings_by_mixer else quick_pairs
    holding: dict[tuple, list[Cell]] = {}
    for cell in everything:
        for pair in pairs(cell):
            holding.setdefault(pair, []).append(cell)
    rng = np.random.default_rng(seed)
    missing, chosen = dict.fromkeys(sorted(holding, key=str)), []
    while missing:
        able = holding[next(iter(missing))]
        drawn = [able[i] for i in rng.integers(0, len(able), tries)]
        best = max(drawn, key=lambda cell: sum(pair in missing for pair in pairs(cell)))
        for pair in pairs(best):
            missing.pop(pair, None)
        chosen.append(best)
    return [cell for cell in everything if cell in set(chosen)]


def quick_pairs(cell: Cell) -> list[tuple]:
    """All pairs but the mixer with the packing: a packing with each transport stands for it."""
    return [pair for pair in every_pair(cell) if {name for name, _ in pair} != {"mixer", "packing"}]


def every_pair(cell: Cell) -> Iterable[tuple]:
    """Two of the cell's values; a transport's name means another one for effects than for keys."""
    named = [(field, value) for field, value in cell._asdict().items()]
    named[1] = (f"transport of {'effects' if recurrent(cell.mixer) else 'keys'}", cell.transport)
    return combinations(named, 2)


@cache
def model(mixer: str, precision: str, seed: int | None = None) -> LM:
    """Two layers, so that gradients come to the first through the second. The same numbers in both precisions."""
    name, options = rows()[mixer]
    seed = SEEDS.get(mixer, 0) if seed is None else seed
    built = initialise(mixer_model(name, layers=2, **options), seed=1)
    with torch.no_grad():
        for name, p in built.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            p.mul_(0.7).add_(0.2 * torch.randn(p.shape, generator=generator))
    built.compute = DTYPE[precision]
    return built.to(DTYPE[precision])


def conditioned(mixer: str, seed: int | None = None, within: float = 7e-6) -> bool:
    """Whether one process in fp32 comes this close to itself in fp64, in every packing: what is then held to 1e-5 is
    the way that the work is spread, not how a sum that cancels is rounded."""

    def error(packing: str) -> float:
        fp32, fp64 = (truth(mixer, packing, precision, seed) for precision in DTYPE)
        return max(differences((fp32.loss, fp32.gradients), (fp64.loss, fp64.gradients)).values())

    return all(error(packing) <= within for packing in packings())


class Watch:
    """What passes between layers while it is open: the output, and the gradient of each layer's input, [B, T, D]."""

    def __init__(self, watched: LM):
        self.seen: dict[str, torch.Tensor] = {}
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._enter, f"layer {name} gradient"))
            for name, layer in watched.layers.items()
        ]
        self._hooks.append(watched.norm.register_forward_hook(lambda _, __, out: self._see("output", out)))

    def _see(self, name: str, x: torch.Tensor) -> None:
        self.seen[name] = x.detach()

    def _enter(self, name: str, _: Any, args: tuple) -> None:
        args[0].register_hook(partial(self._see, name))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def truth(mixer: str, packing: str, precision: str, seed: int | None = None) -> Truth:
    """One process, the whole sequence at once."""
    sample, whole = packings()[packing], model(mixer, precision, seed)
    tokens, targets, positions = (torch.from_numpy(x)[None] for x in (sample.tokens, sample.targets, sample.positions))
    whole.zero_grad()
    with Watch(whole) as watch, rounding("int8") if mixer == ROUNDED else nullcontext():
        seq = Whole.of(positions)
        seq.counted = torch.from_numpy(sample.counted)[None]
        seq.index_losses.weight = 1 / int(sample.counted.sum())
        part = sums(whole(tokens, seq), targets)
        loss = part.objective(targets=int((targets != -100).sum()), tokens=tokens.numel(), balance_weight=BALANCE)
        loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in whole.named_parameters()}
    return Truth(loss.item(), gradients, {name: x[0].numpy() for name, x in watch.seen.items()})


Known = dict[tuple[str, str, str], Truth]


def truths(chosen: Iterable[Cell]) -> Known:
    """By mixer, packing, precision: of all that these cells are held to."""
    return {key: truth(*key) for key in sorted({(c.mixer, c.packing, c.precision) for c in chosen})}


def run_cells(chosen: list[Cell], known: Known, before: Callable[[], None] | None = None) -> list[dict[str, float]]:
    """On each rank of a world: what of each cell differs, relative to one process. `before` may break something."""
    if before is not None:
        before()
    groups, found = Groups(), []
    for cell in chosen:
        try:
            found.append(run_cell(cell, known[cell.mixer, cell.packing, cell.precision], groups))
        except Exception as error:
            raise RuntimeError(f"{cell}: {error}") from error
    return found


def run_cell(cell: Cell, want: Truth, groups: Groups) -> dict[str, float]:
    """The relative differences of one cell on this rank, by what differs."""
    sample, local = packings()[cell.packing], model(cell.mixer, cell.precision)
    length = len(sample.tokens)
    spans = layout_spans(cell.layout, cell.ranks, length)
    assert spans is not None
    plan = Plan(0, (length,), (MicroStep((Group(tuple(range(cell.ranks)), (0,), spans),)),))
    plan.check(groups.world)
    transport = transports(cell.mixer)[cell.transport]
    effects, keys = (transport, KEYS["gather"]) if recurrent(cell.mixer) else (EFFECTS["gather"], transport)
    local.zero_grad()
    executor = Executor(local, groups, torch.device("cpu"), effects, keys, BALANCE)
    with Watch(local) as watch:
        tally = executor.train(plan, [sample])
    parts = [p.grad for p in local.parameters()]
    both = torch.cat([tally.cross_entropy.to(parts[0].dtype).view(1), *(g.flatten() for g in parts)])
    total = groups.world_comm.all_reduce(both, purpose="gradients")
    loss = total[0].item() / max(int((sample.targets != -100).sum()), 1)
    flat = total[1:].split([g.numel() for g in parts])
    named = zip(local.named_parameters(), flat, strict=True)
    gradients = {name: g.view_as(p).numpy() for (name, p), g in named}
    return differences((loss, gradients), (want.loss, want.gradients)) | _streams(watch, want, spans[groups.rank])


def _streams(watch: Watch, want: Truth, mine: tuple[Span, ...]) -> dict[str, float]:
    """Of this rank's tokens, relative to the norm over all tokens."""
    found = {}
    for name, expected in want.streams.items():
        errors = [watch.seen[name][row].numpy() - expected[begin:end] for row, (begin, end) in enumerate(mine)]
        found[name] = float(np.linalg.norm(errors) / np.linalg.norm(expected))
    return found
