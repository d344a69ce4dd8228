"""The sampler: which sequences a step has, as a pure function of (seed, step).

A part is the pool of one length of one source (of its documents of some lengths). A lane is the parts of one length. A
step takes one lane (`data.curriculum.Buckets`), and its sequences are shared out among the lane's parts by weight
(`data.samplers.apportion`). Both are closed forms, and a pool's order is computed, so every step costs the same to
reach.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from data.curriculum import Buckets, Curriculum
from data.samplers import PACKINGS
from data.samplers.apportion import Shares
from data.samplers.documents import Documents
from data.samplers.index import Ints, StoredDocuments
from data.samplers.pool import Cut, Key, Pool


@dataclass(frozen=True)
class Source:
    """A store and its part in a run.

    weight: (token, weight) from that token of the run on; beside the other sources' weights. epochs: the most often
    that a sequence is seen, None for no limit. long: (tokens, factor): documents of at least so many tokens are drawn
    so many times as often as their tokens say. order: another number is another order of the same documents. old:
    whether the weights that a run starts from were trained on it. longest: tokens beyond which a document is left out
    of training, None for no limit.
    """

    name: str
    store: StoredDocuments
    weight: tuple[tuple[int, Fraction], ...] = ((0, Fraction(1)),)
    epochs: Fraction | None = None
    long: tuple[tuple[int, Fraction], ...] = ()
    order: int = 0
    old: bool = False
    longest: int | None = None

    def classes(self) -> list[tuple[int, int | None, Fraction]]:
        """(least tokens, below, factor) of documents, None for no limit."""
        begins = [(0, Fraction(1)), *self.long]
        ends: list[int | None] = [*(least for least, _ in self.long), None]
        classes = [(least, below, factor) for (least, factor), below in zip(begins, ends, strict=True)]
        if (end := self.longest) is None:
            return classes
        return [(a, end + 1 if b is None else min(b, end + 1), factor) for a, b, factor in classes if a <= end]

    def documents(self, side: str, heldout: float) -> list[tuple[Documents, Fraction]]:
        """The documents of each class that has any, and its factor. Held out, there is one class."""
        if side == "heldout":
            return [(Documents(self.store, side=side, heldout=heldout), Fraction(1))]
        runs = [
            (Documents(self.store, side=side, heldout=heldout, lengths=(least, below)), factor)
            for least, below, factor in self.classes()
        ]
        return [(documents, factor) for documents, factor in runs if len(documents.ids)]

    def weight_at(self, token: int) -> Fraction:
        return next(weight for begin, weight in reversed(self.weight) if begin <= token)


class SourcePart(NamedTuple):
    """name: source, lengths of documents if there are several classes, length of sequences. weight: in its source."""

    name: str
    source: Source
    pool: Pool
    key: Key
    weight: Fraction

    @property
    def cap(self) -> int | None:
        return None if self.source.epochs is None else int(self.source.epochs * self.pool.count)


class Lane(NamedTuple):
    length: int
    per_step: int
    parts: list[SourcePart]
    shares: Shares


@dataclass(frozen=True)
class Slot:
    """One sequence of a batch: sequence `index` of the endless row of a part's epochs."""

    part: SourcePart
    index: int

    def pieces(self, seed: int) -> Ints:
        return self.part.pool.pieces((seed, *self.part.key), self.index)


class Sampler:
    """Steps of `batch_tokens` tokens from some sources, cut by one packing. Raises ValueError for what does not fit."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        packing: str,
        cut: Cut,
        batch_tokens: int,
        heldout: float,
        curriculum: Curriculum,
        key: Key = (),
    ) -> None:
        parts = [part for s in sources for part in _parts(s, packing, cut, heldout, key)]
        begins = sorted({token for s in sources for token, _ in s.weight})
        weighted = [[part.weight * part.source.weight_at(token) for part in parts] for token in begins]
        used = [i for i in range(len(parts)) if any(row[i] for row in weighted)]
        parts, weighted = [parts[i] for i in used], [[row[i] for i in used] for row in weighted]
        steps = [-(-token // batch_tokens) for token in begins]
        lengths = sorted({part.pool.length for part in parts})
        lanes = [[i for i, part in enumerate(parts) if part.pool.length == length] for length in lengths]
        per_step = [batch_tokens // length for length in lengths]
        caps = [_together(parts[i].cap for i in lane) for lane in lanes]
        epoch = sum(part.pool.count * part.pool.length for part in parts)
        cycle = (curriculum.tokens or epoch) // curriculum.cycles // batch_tokens
        self.buckets = Buckets(
            list(
                dict(
                    zip(steps, ([sum(row[i] for i in lane) for lane in lanes] for row in weighted), strict=True)
                ).items()
            ),
            odds=curriculum.odds_of(len(lanes)),
            cycle=max(cycle, 1),
            caps=[None if cap is None else cap // n for cap, n in zip(caps, per_step, strict=True)],
        )
        self.lanes = []
        for k, (lane, length, n) in enumerate(zip(lanes, lengths, per_step, strict=True)):
            phases: dict[int, list[Fraction]] = {}
            for step, row in zip(steps, weighted, strict=True):
                if sum(own := [row[i] for i in lane]):  # else what is still due comes as before
                    reached = self._reached(step)
                    phases[reached[k] * n if phases and reached else 0] = own
            self.lanes.append(
                Lane(length, n, [parts[i] for i in lane], Shares(list(phases.items()), [parts[i].cap for i in lane]))
            )

    def _reached(self, step: int) -> tuple[int, ...]:
        total = self.buckets.total
        return self.buckets.before(step if total is None else min(step, total))

    def slots(self, step: int) -> list[Slot]:
        """The sequences of a step. Raises ValueError where the sources have no more to give."""
        try:
            k, given = self.buckets.at(step)
            lane = self.lanes[k]
            drawn = lane.shares.draws(given * lane.per_step, lane.per_step)
        except IndexError:
            raise ValueError(
                f"train.tokens: the sources are used up after {self.buckets.total} steps; their epochs must allow more"
            ) from None
        return [Slot(lane.parts[p], index) for p, index in drawn]

    def drawn(self, step: int) -> dict[str, int]:
        """The tokens that each part has given before a step, padding included."""
        counts: dict[str, int] = {}
        for lane, steps in zip(self.lanes, self.buckets.before(step), strict=True):
            for part, count in zip(lane.parts, lane.shares.before(steps * lane.per_step), strict=True):
                counts[part.name] = count * lane.length
        return counts


def _parts(source: Source, packing: str, cut: Cut, heldout: float, key: Key) -> list[SourcePart]:
    parts = [
        (documents.spec["lengths"][0], pool, pool.tokens * factor)
        for documents, factor in source.documents("train", heldout)
        for pool in PACKINGS[packing](documents, cut)
    ]
    total = sum(weight for *_, weight in parts)
    return [
        SourcePart(
            "/".join(filter(None, [source.name, f"from {least}" if source.long else "", str(pool.length)])),
            source,
            pool,
            (*key, source.name, source.order, least, pool.length),
            weight / total,
        )
        for least, pool, weight in parts
    ]


def _together(caps: Iterable[int | None]) -> int | None:
    caps_together = list(caps)
    known = [cap for cap in caps_together if cap is not None]
    return sum(known) if len(known) == len(caps_together) else None
