"""The traffic that a rank receives: bytes and calls by purpose, from a plan and the shapes that layers ask with.

The formulas are those of the transports in `parallel/sequence`, message by message; `tests/parallel/test_volume.py`
holds every one to what a world has counted, byte for byte. With P ranks of R spans each, elements received by a rank,
a layer and direction, of states S = H·K·V and decays A:

    gather        (P-1)·R·(A + S + 1) forward, (P-1)·R·S backward                   2502.07563
    relay         S for each span whose neighbour is another rank's                 2404.02882
    allscan       the same, in blocks                                               2507.01004
    keys, gather  (P-1)·R·L·G·2W, three times: out, out again, gradients back       2407.21783
    ring          the same forward; backward as much again, and P times a rank's gradients
    ulysses       (P-1)/P of a rank's queries, keys, values and outputs             2309.14509

W is the wider of a key's and a value's channels (W + 1 bytes of each in 8 bits), L the longest span: spans are padded
to it, a rank's two to two rows. Where values are channels of the keys, as those of latents are, it is W and not 2W.
Only `gather`, `relay` and `allscan` of states do not depend on the length. What is accumulated over ranks (gradients of
halos, of keys and values) travels in at least fp32. An all-reduce counts as 2(P-1)/P of its bytes, which a ring
receives.

Legend: P ranks of a group, R spans a rank, H heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Protocol

from parallel.schedule.plan import Plan, Span

KeyFormatName = Literal["exact", "fp8", "int8"]
GradientFormat = Literal["high", "bf16"]  # of weights, between the ranks that add them up
SCALES = "weight scales"
GRADIENT = " gradient"  # ends the purpose of what a backward pass sends


@dataclass
class Traffic:
    """Bytes and calls by purpose."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, purpose: str, bytes: int, calls: int = 1) -> None:
        """Nothing where there is no call: a rank to which nothing was sent has no such purpose."""
        if calls:
            self.bytes[purpose] += bytes
            self.calls[purpose] += calls

    def include(self, other: Traffic, times: int = 1) -> None:
        for purpose, calls in other.calls.items():
            self.add(purpose, times * other.bytes[purpose], times * calls)


class Both(NamedTuple):
    """Traffic of one layer's forward and backward pass."""

    forward: Traffic
    backward: Traffic


@dataclass(frozen=True)
class How:
    """The transports by name. blocks: of allscan. heads: key/value heads that `gather` gathers at a time. keys: format
    of keys and values, exact or one of 8 bits."""

    recurrence: str = "gather"
    attention: str = "gather"
    blocks: int = 4
    heads: int = 1
    keys: str = "exact"


class PlacedSpan(NamedTuple):
    """A span, the rank of the group that holds it, and as which of its rows."""

    begin: int
    end: int
    rank: int


@dataclass(frozen=True)
class Layout:
    """The layout of a group's packed sequence: each rank's spans, where documents start; none of either is empty."""

    spans: tuple[tuple[Span, ...], ...]
    starts: tuple[int, ...] = (0,)

    @property
    def ranks(self) -> int:
        return len(self.spans)

    @property
    def links(self) -> list[PlacedSpan]:
        """All spans in the order of the sequence."""
        return sorted(PlacedSpan(b, e, r) for r, held in enumerate(self.spans) for b, e in held)

    @property
    def rows(self) -> int:
        return max(len(held) for held in self.spans)

    @property
    def longest(self) -> int:
        return max(end - begin for held in self.spans for begin, end in held)


class Ask(Protocol):
    """Something that a model asks of its sequence."""

    in_layer: ClassVar[bool]  # so that a backward pass that computes all of its layer again asks again

    def received(self, layout: Layout, rank: int, how: How) -> Both:
        """Traffic that the rank of that index in its group (of at least two) receives."""
        ...


@dataclass(frozen=True)
class Halo:
    """`Sequence.before`: `width` tokens of `channels` numbers."""

    in_layer: ClassVar[bool] = True
    width: int
    channels: int
    itemsize: int

    def received(self, layout: Layout, rank: int, how: How) -> Both:
        numbers = (layout.ranks - 1) * layout.rows * self.width * self.channels
        both = Both(Traffic(), Traffic())
        both.forward.add("halo", numbers * self.itemsize)
        both.backward.add("halo" + GRADIENT, numbers * _wide(self.itemsize))
        return both


@dataclass(frozen=True)
class ScanCall:
    """`Sequence.scan`: a span's effect, of `decay` and `state` numbers. extent: into how many blocks it can be cut.
    serial: a state that is handed from span to span whatever the transport."""

    in_layer: ClassVar[bool] = True
    kind: str
    decay: int
    state: int
    extent: int
    itemsize: int
    serial: bool = False

    def received(self, layout: Layout, rank: int, how: How) -> Both:
        both = Both(Traffic(), Traffic())
        if how.recurrence == "gather" and not self.serial:
            rows = (layout.ranks - 1) * layout.rows
            both.forward.add("state", rows * (self.decay + self.state + 1) * self.itemsize)
            both.backward.add("state" + GRADIENT, rows * self.state * self.itemsize)
            return both
        links = [link.rank for link in layout.links]
        calls = min(how.blocks, self.extent) if how.recurrence == "allscan" else 1
        for before, after in zip(links, links[1:], strict=False):
            if before != after and after == rank:
                both.forward.add("state", self.state * self.itemsize, calls)
            if before != after and before == rank:
                both.backward.add("state" + GRADIENT, self.state * self.itemsize, calls)
        return both


@dataclass(frozen=True)
class AttendCall:
    """`Sequence.attend`: heads H, kv_heads G, widths key K and value V; window, sinks, values_in_keys as there."""

    in_layer: ClassVar[bool] = True
    heads: int
    kv_heads: int
    key: int
    value: int
    itemsize: int
    window: int | None = None
    sinks: int = 0
    values_in_keys: bool = False

    @property
    def sent(self) -> int:
        """The numbers that a token has for others in a head of keys and values, without a window."""
        return max(self.key, self.value) * self.parts

    @property
    def parts(self) -> int:
        """The parts of these numbers, each with a scale of its own in 8 bits: keys and values, or one that is both."""
        return 1 if self.values_in_keys else 2

    def received(self, layout: Layout, rank: int, how: How) -> Both:
        if self.window is not None:
            return self._in_window(layout, rank, self.window, how)
        return self._gathered(layout, how) if how.attention == "gather" else self._meshed(layout, how)

    def here(self, tensor: int) -> AttendCall:
        """The same on one of `tensor` ranks that share out the heads."""
        return replace(self, heads=self.heads // tensor, kv_heads=max(1, self.kv_heads // tensor))

    def split(self, ranks: int, how: str) -> int:
        """Over how many ranks heads are split. Raises ValueError where the transport cannot split them."""
        if how == "ring":
            return 1
        fitting = [
            n
            for n in range(1, ranks + 1)
            if ranks % n == 0 and self.heads % n == 0 and (self.kv_heads % n == 0 or n % self.kv_heads == 0)
        ]
        if how == "ulysses" and fitting[-1] != ranks:
            raise ValueError(
                f"parallel.transport.attention=ulysses: must share out heads={self.heads}, kv_heads={self.kv_heads} to "
                f"{ranks} ranks, and cannot; gather, ring and usp can"
            )
        return fitting[-1]

    def _gathered(self, layout: Layout, how: How) -> Both:
        tokens = (layout.ranks - 1) * layout.rows * layout.longest * self.kv_heads
        numbers, calls = tokens * self.sent, -(-self.kv_heads // how.heads)
        both = Both(Traffic(), Traffic())
        for way in both:
            way.add("keys and values", tokens * self._bytes(self.sent, self.parts, how), calls)
        both.backward.add("keys and values" + GRADIENT, numbers * _wide(self.itemsize), calls)
        return both

    def _meshed(self, layout: Layout, how: How) -> Both:
        split = self.split(layout.ranks, how.attention)
        rows, others, tokens = layout.ranks // split, split - 1, layout.rows * layout.longest
        width = max(self.key, self.value)
        queries = tokens * self.heads // split * width  # of one rank for another
        held = tokens * max(self.kv_heads, split) // split  # tokens by key heads, of one rank for another
        keys, message = held * self.sent, held * self._bytes(self.sent, self.parts, how)
        block = split * keys  # numbers whose gradients travel around the ring
        both = Both(Traffic(), Traffic())
        for way in both:
            way.add("keys and values", others * message, others)
            way.add("keys and values", (rows - 1) * split * message, rows - 1)
        both.forward.add("queries", others * queries * self.itemsize, others)
        both.forward.add("outputs", others * queries * self.itemsize, others)
        # Their gradients, outputs and the queries themselves go to where the heads are; queries' gradients come back.
        both.backward.add("queries" + GRADIENT, 3 * others * queries * self.itemsize, 3 * others)
        both.backward.add("queries" + GRADIENT, others * queries * _wide(self.itemsize), others)
        both.backward.add("keys and values" + GRADIENT, others * keys * _wide(self.itemsize), others)
        if rows > 1:
            both.backward.add("keys and values" + GRADIENT, rows * block * _wide(self.itemsize), rows)
        return both

    def _bytes(self, numbers: int, parts: int, how: How) -> int:
        """Bytes of so many numbers of a token and head; in 8 bits each part has a byte more, for its scale."""
        return numbers * self.itemsize if how.keys == "exact" else numbers + parts

    def _in_window(self, layout: Layout, rank: int, window: int, how: How) -> Both:
        token = self.kv_heads * self._bytes(self.key + self.value, 2, how)
        back = self.kv_heads * (self.key + self.value) * self.itemsize
        both = Both(Traffic(), Traffic())
        for other in set(range(layout.ranks)) - {rank}:
            tokens = self._tokens(layout, rank, other, window)
            both.forward.add("keys and values", tokens * token, int(tokens > 0))
            given = self._tokens(layout, other, rank, window)
            both.backward.add("keys and values" + GRADIENT, given * back, int(given > 0))
        return both

    def _tokens(self, layout: Layout, asking: int, holding: int, window: int) -> int:
        """Tokens that the spans of one rank see of those of another."""
        total = 0
        for begin, _ in layout.spans[asking]:
            first = max(start for start in layout.starts if start <= begin)
            near = max(first, begin - window + 1)
            for low, high in ((first, min(first + self.sinks, near)), (near, begin)):
                total += sum(max(0, min(high, e) - max(low, b)) for b, e in layout.spans[holding])
        return total


@dataclass(frozen=True)
class KeysCall:
    """`Sequence.attend_selected`: keys, values and the index's keys of every token, `channels` numbers together. They
    are gathered whatever the transport: any query may select any of them."""

    in_layer: ClassVar[bool] = True
    channels: int
    itemsize: int

    def received(self, layout: Layout, rank: int, how: How) -> Both:
        numbers = (layout.ranks - 1) * layout.rows * layout.longest * self.channels
        both = Both(Traffic(), Traffic())
        both.forward.add("keys and values", numbers * self.itemsize)
        both.backward.add("keys and values" + GRADIENT, numbers * _wide(self.itemsize))
        return both


@dataclass(frozen=True)
class SumCall:
    """`Sequence.sum`, outside of the layers: `numbers` a document. graded: whether a gradient comes back."""

    in_layer: ClassVar[bool] = False
    numbers: int
    itemsize: int
    graded: bool

    def received(self, layout: Layout, rank: int, how: How) -> Both:
        reduced = 2 * (layout.ranks - 1) * (len(layout.starts) * self.numbers * self.itemsize) // layout.ranks
        both = Both(Traffic(), Traffic())
        both.forward.add("document sums", reduced)
        both.backward.add("document sums" + GRADIENT, reduced, int(self.graded))
        return both


def of_plan(
    plan: Plan, starts: Sequence[Sequence[int]], asks: Iterable[Ask], how: How, *, recompute: str = "none"
) -> dict[int, Traffic]:
    """Traffic that each rank receives on the sequence axis in a step of training.

    starts: of each of the batch's sequences, where its documents begin; the first is 0. recompute: `engine.recompute`.
    """
    several = Counter(asks)
    traffic: dict[int, Traffic] = {}
    for micro in plan.micro_steps:
        for group in micro.groups:
            layout = lay([plan.lengths[s] for s in group.sequences], [starts[s] for s in group.sequences], group.spans)
            again = recompute == "full" or recompute == "planned" and group.recompute
            for i, rank in enumerate(group.ranks):
                total = traffic.setdefault(rank, Traffic())
                for ask, times in several.items() if layout.ranks > 1 else ():
                    forward, backward = ask.received(layout, i, how)
                    total.include(forward, times * (2 if ask.in_layer and again else 1))
                    total.include(backward, times)
    return traffic


def lay(lengths: Sequence[int], starts: Sequence[Sequence[int]], spans: tuple[tuple[Span, ...], ...]) -> Layout:
    """Sequences joined end to end, with one masked token behind the end for each rank without a span."""
    begins, behind = [], 0
    for length, within in zip(lengths, starts, strict=True):
        begins += [behind + start for start in within]
        behind += length
    if not all(spans):
        begins.append(behind)  # the masked tokens share a document
    filled = []
    for held in spans:
        filled.append(held or ((behind, behind + 1),))
        behind += not held
    return Layout(tuple(filled), tuple(begins))


class Unit(NamedTuple):
    """Parameters that FSDP gathers together: rows and numbers a row of each, bytes a number. `stays`: gathered once a
    step, and not once for each forward and backward pass. few: those of `shapes` that are gathered in few bits, and
    their bytes a number; scales: theirs, on which ranks agree in each micro-step. gradients: their format on the
    way."""

    shapes: tuple[tuple[int, int], ...]
    itemsize: int
    stays: bool
    few: tuple[tuple[int, int, int], ...] = ()
    scales: int = 0
    gradients: GradientFormat = "high"

    def shard(self, ranks: int) -> int:
        """Bytes of a rank's part."""
        return _rows(self.shapes, ranks) * self.itemsize

    def sent(self, ranks: int) -> int:
        """Bytes of a rank's part as others get it."""
        spared = sum(_rows(((rows, rest),), ranks) * (self.itemsize - size) for rows, rest, size in self.few)
        return self.shard(ranks) - spared

    def returned(self, ranks: int) -> int:
        """Bytes of what another rank has of the gradients of a rank's part."""
        return _rows(self.shapes, ranks) * (2 if self.gradients == "bf16" else self.itemsize)


def _rows(shapes: tuple[tuple[int, int], ...], ranks: int) -> int:
    """Numbers of a rank: rows are padded to the ranks."""
    return sum(-(-rows // ranks) * rest for rows, rest in shapes)


def of_weights(units: Iterable[Unit], ranks: int, micro_steps: int) -> Traffic:
    """Traffic of weights and their gradients that each rank receives in a step: FSDP shards rows, padded to the
    ranks."""
    total, scales = Traffic(), 0
    for unit in units:
        if ranks > 1:
            gathers = 1 if unit.stays else 2 * micro_steps
            total.add("weights", gathers * (ranks - 1) * unit.sent(ranks), gathers)
            total.add("weights" + GRADIENT, (ranks - 1) * unit.returned(ranks))
            scales += unit.scales * _wide(unit.itemsize)
    if scales:
        total.add(SCALES, micro_steps * (2 * (ranks - 1) * scales // ranks), micro_steps)
    return total


def _wide(itemsize: int) -> int:
    return max(itemsize, 4)
