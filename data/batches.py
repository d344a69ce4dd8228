"""`Batches`, what the training loop reads: global batches, held-out windows, and what tells one order from another."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from data.curriculum import Curriculum
from data.pack import Packed, read
from data.roles import roles_of
from data.samplers import PACKINGS
from data.samplers.decompose import OVERLONG
from data.samplers.divided import Divided, divided
from data.samplers.documents import Documents
from data.samplers.index import Ints
from data.samplers.permute import Permutation
from data.samplers.pool import Cut
from data.samplers.sampler import Sampler, Slot, Source
from data.stores.checks import known

TooLong = Literal["split", "skip", "error"]
TOO_LONG = get_args(TooLong)
VERSION = 2  # of the order: any change of what a step holds


@dataclass(frozen=True, kw_only=True)
class Sequencing:
    """Rules by which documents become sequences or are held out: the keys that `Data` and `Mixture` share.

    Raises ValueError, one line that opens with the key, for a value out of range.
    """

    max_length: int
    packing: str
    min_length: int
    overlong: str
    document_mask: bool
    heldout: float
    heldout_tokens: int
    too_long: str = "split"

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise ValueError(f"data.too_long={self.too_long}: must be one of {', '.join(TOO_LONG)}")
        for key in ("max_length", "min_length", "heldout_tokens"):
            tokens = getattr(self, key)
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                raise ValueError(f"data.{key}={tokens}: expected a positive whole number of tokens")
        if not isinstance(self.heldout, float) or not 0 < self.heldout < 1:
            raise ValueError(
                f"data.heldout={self.heldout}: expected a fraction of documents between 0 and 1, exclusive"
            )
        if self.packing not in PACKINGS:
            raise ValueError(f"data.packing={self.packing}: must be one of {', '.join(PACKINGS)}")
        if self.overlong not in OVERLONG:
            raise ValueError(f"data.overlong={self.overlong}: must be one of {', '.join(OVERLONG)}")
        if self.packing == "decomposition":
            for key in ("max_length", "min_length"):
                if (tokens := getattr(self, key)) & (tokens - 1):
                    near = 1 << max((tokens * 2 // 3).bit_length(), 0)
                    raise ValueError(f"data.{key}={tokens}: must be a power of two to decompose; nearest {near}")
            if self.min_length > self.max_length:
                raise ValueError(
                    f"data.min_length={self.min_length}: must be at most data.max_length={self.max_length}"
                )

    def order(self) -> dict[str, Any]:
        """Every key that a batch depends on."""
        settings = {"data.packing": self.packing, "data.max_length": self.max_length, "data.heldout": self.heldout}
        if self.packing == "decomposition":
            settings |= {"data.min_length": self.min_length, "data.overlong": self.overlong}
        else:
            settings |= {"data.document_mask": self.document_mask}
        if self.too_long == "skip":  # the others read the same
            settings |= {"data.too_long": self.too_long}
        return settings


class Batches:
    """Global batches of `batch_tokens` tokens, as a pure function of (seed, step), of one length each.

    A document is held out if its hash, as a fraction of 2^64, is below `heldout`: the same in every run, and the same
    for all copies of it; of very few documents, where that leaves a side without any, a part of the longest is
    (`data.samplers.divided`). `order` is everything that decides a batch or the split, by its key in the configuration,
    and `fingerprint` (hex sha256) is of that. Raises ValueError if the sizes do not fit each other or the stores.
    `chance` is None: of text, nobody asks how much of it a guess gets right.
    """

    chance = None

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        tokenizer: Any,
        batch_tokens: int,
        sequencing: Sequencing,
        curriculum: Curriculum | None = None,
    ) -> None:
        curriculum = curriculum or Curriculum()
        longest = sequencing.max_length
        stages = curriculum.context or ((0, longest, None),)
        self.sequencing, self.tokenizer = sequencing, tokenizer
        limit = longest if sequencing.too_long == "skip" else None
        self.sources = tuple(replace(s, store=divided(s.store, sequencing.heldout), longest=limit) for s in sources)
        self.vocab_size = tokenizer.size
        self.batch_tokens = batch_tokens
        self.windows_per_batch = batch_tokens // longest
        self._check_curriculum(curriculum)
        self.too_long = self._too_long()
        for length in (longest, *(stage[1] for stage in stages)):
            if batch_tokens < length or batch_tokens % length:
                raise ValueError(
                    f"train.batch_tokens={batch_tokens}: expected a multiple of data.max_length={length}; "
                    f"nearest {max(round(batch_tokens / length), 1) * length}"
                )
        self.heldout_documents = [self._held_out(source) for source in self.sources]
        self.stages = [
            (
                -(-token // batch_tokens),
                Sampler(
                    self.sources,
                    packing=sequencing.packing,
                    cut=Cut(length, sequencing.min_length, sequencing.overlong),
                    batch_tokens=batch_tokens,
                    heldout=sequencing.heldout,
                    curriculum=curriculum,
                    key=(i,) if i else (),
                ),
                theta,
            )
            for i, (token, length, theta) in enumerate(stages)
        ]
        self.order = self._order(curriculum)
        self.fingerprint = hashlib.sha256(json.dumps(self.order, sort_keys=True).encode()).hexdigest()

    def _check_curriculum(self, curriculum: Curriculum) -> None:
        sequencing = self.sequencing
        if curriculum.odds != "uniform" and sequencing.packing != "decomposition":
            raise ValueError(
                f"data.packing={sequencing.packing}: must be decomposition for curriculum.odds={curriculum.odds}"
            )
        for _, length, _ in curriculum.context or ():
            if length > sequencing.max_length:
                raise ValueError(
                    f"data.max_length={sequencing.max_length}: must be at least {length}, which curriculum.context "
                    f"comes to"
                )
            if sequencing.packing == "decomposition" and (length & (length - 1) or length < sequencing.min_length):
                raise ValueError(
                    f"curriculum.context: {length} must be a power of two from data.min_length="
                    f"{sequencing.min_length} to decompose"
                )

    def _too_long(self) -> list[str]:
        """Lines about documents of training that have more than data.max_length tokens. Raises ValueError where none
        may, and where no others are left."""
        how, limit = self.sequencing.too_long, self.sequencing.max_length
        lines: list[str] = []
        if how == "split" and self.sequencing.packing != "best_fit":  # which cuts documents wherever they lie
            return lines
        for source in self.sources:
            lengths = (limit + 1, None)
            long = Documents(source.store, side="train", heldout=self.sequencing.heldout, lengths=lengths)
            if not (count := len(long.ids)):
                continue
            whose = f" of data.sources.{source.name}" if source.name else ""
            many = f"{count:,} document{'s' * (count > 1)}{whose} with more than data.max_length={limit} tokens"
            if how == "error":
                longest = int(max(lengths.max() for _, lengths in long.blocks()))
                raise ValueError(
                    f"data.too_long=error: there {'are' if count > 1 else 'is'} {many}, the longest has {longest:,}; "
                    f"must be skip or split, or data.max_length at least {longest}"
                )
            done = "left out" if how == "skip" else "cut"
            lines.append(f"data.too_long={how}: {many}, {len(long):,} together, {'are' if count > 1 else 'is'} {done}")
            if how == "skip" and not source.documents("train", self.sequencing.heldout):
                raise ValueError(f"data.too_long=skip: leaves no documents: all have more than data.max_length={limit}")
        return lines

    def _held_out(self, source: Source) -> Documents:
        heldout = self.sequencing.heldout
        ((held, _),) = source.documents("heldout", heldout)
        sides = (("training", source.documents("train", heldout)), ("held-out", [(held, 1)] if len(held.ids) else []))
        for side, choices in sides:
            if not choices:
                raise ValueError(
                    f"data.heldout={heldout}: leaves no {side} documents of the corpus' {len(source.store.hashes)}"
                )
        return held

    def _order(self, curriculum: Curriculum) -> dict[str, Any]:
        versions = [VERSION, Permutation.version, self._lanes()[0].parts[0].pool.version]
        order: dict[str, Any] = {"version": versions, "train.batch_tokens": self.batch_tokens}
        order |= self.sequencing.order()
        for source in self.sources:
            at = f"data.sources.{source.name}" if source.name else "data"
            order[f"{at}.corpus"] = source.store.fingerprint
            if (cut := getattr(source.store, "cut", None)) is not None:
                order[f"{at}.cut"] = list(cut)
            if source.name:
                order[f"{at}.weight"] = [[token, str(weight)] for token, weight in source.weight]
                order[f"{at}.epochs"] = str(source.epochs)
                order[f"{at}.long"] = [[least, str(factor)] for least, factor in source.long]
                order[f"{at}.order"] = source.order
        if curriculum.odds != "uniform":
            order |= {f"curriculum.{key}": getattr(curriculum, key) for key in ("odds", "cycles", "tokens")}
        if curriculum.context is not None:
            order["curriculum.context"] = [list(stage) for stage in curriculum.context]
        return order

    def report(self) -> list[str]:
        """Describes the split and documents too long, a line each: one that is cut, less than a window held out."""
        lines, longest = [], self.sequencing.max_length
        for source, held in zip(self.sources, self.heldout_documents, strict=True):
            at = f"data.sources.{source.name}.data.path" if source.name else "data.path"
            if isinstance(store := source.store, Divided):
                count = len(store.whole.hashes)
                whole = "the document" if count == 1 else f"the longest of {count} documents"
                lines.append(
                    f"{at}: too few documents to hold out whole ones by data.heldout={self.sequencing.heldout}: of "
                    f"{whole} the first {store.cut[1]:,} tokens are trained on, and those behind them are held out"
                )
            if len(held) <= longest:
                lines.append(
                    f"{at}: {len(held):,} tokens are held out, less than a sequence of data.max_length={longest}: "
                    "evaluations read no more than those"
                )
        return lines + self.too_long

    def _lanes(self) -> list[Any]:
        return [lane for _, sampler, _ in self.stages for lane in sampler.lanes]

    def card(self) -> dict[str, Any]:
        """The card of the corpus that a run and its checkpoints save: the stores' cards, and how they are split and
        cut."""
        counts = [
            (sum(len(d.ids) for d, _ in source.documents("train", self.sequencing.heldout)), len(held.ids))
            for source, held in zip(self.sources, self.heldout_documents, strict=True)
        ]
        cards = {
            source.name: {**getattr(source.store, "card", {}), "train_documents": train, "heldout_documents": held}
            for source, (train, held) in zip(self.sources, counts, strict=True)
        }
        head = cards[""] if set(cards) == {""} else {"sources": cards}
        return {
            **head,
            "max_length": self.sequencing.max_length,
            "packing": self.sequencing.packing,
            "epoch": {
                part.name: {"sequences": part.pool.count, "tokens": part.pool.tokens}
                for lane in self._lanes()
                for part in lane.parts
            },
            "order": self.order,
            "batches": self.fingerprint,
        }

    def slots(self, step: int, skips: int = 0) -> list[Slot]:
        """Chooses the sequences of a step."""
        begin, sampler, _ = self._stage(step + skips)
        return sampler.slots(step + skips - begin)

    def tokens(self, step: int, skips: int = 0) -> int:
        """Tokens of a step: of every one as many."""
        return self.batch_tokens

    def batch(self, seed: int, step: int, skips: int = 0) -> list[Packed]:
        """The global batch of a step, `skips` batches having been skipped before it."""
        masked = self.sequencing.document_mask or self.sequencing.packing == "decomposition"
        return [
            self._read(slot.part.source.store, slot.pieces(seed), slot.part.pool.length, masked=masked)
            for slot in self.slots(step, skips)
        ]

    def _read(self, store: Any, pieces: Ints, length: int, *, masked: bool = True) -> Packed:
        """A sequence (`data.pack.read`). Raises ValueError, which names store and document, for a token out of range:
        the start of a run does not read every part of a large store."""
        packed = read(store, pieces, length, document=roles_of(self.tokenizer).fill, masked=masked)
        if int(packed.tokens.max()) >= self.vocab_size or int(packed.tokens.min()) < 0:
            for begin, end in pieces.tolist():
                known(getattr(store, "whole", store), begin, end, self.vocab_size)
        return packed

    def drawn(self, step: int, skips: int = 0) -> dict[str, int]:
        """The tokens that each source and bucket has given before a step: they sum to those of all steps before."""
        counts: dict[str, int] = {}
        at = step + skips
        ends = [begin for begin, _, _ in self.stages[1:]] + [at]
        for (begin, sampler, _), end in zip(self.stages, ends, strict=True):
            if begin < at:
                for name, tokens in sampler.drawn(min(end, at) - begin).items():
                    counts[name] = counts.get(name, 0) + tokens
        return counts

    def filled(self, step: int) -> float:
        """The share of the places before a step that hold a token, as it is in whole epochs; the others are padding."""
        pools = {part.name: part.pool for lane in self._lanes() for part in lane.parts}
        drawn = self.drawn(step)
        held = sum(n * pools[name].tokens / (pools[name].count * pools[name].length) for name, n in drawn.items())
        return held / max(sum(drawn.values()), 1) if held else 1.0

    def rope_theta(self, step: int, skips: int = 0) -> float | None:
        """The base of rotary positions that the curriculum has at a step; None: the model's own."""
        return self._stage(step + skips)[2]

    @property
    def sides(self) -> dict[str, bool]:
        """Maps each source of a run that replays one to True where it is old; {} where none is."""
        sides = {source.name: source.old for source in self.sources}
        return sides if any(sides.values()) else {}

    def shapes(self) -> list[list[int]]:
        """The lengths of every kind of batch that there is."""
        shapes = {lane.length: [lane.length] * lane.per_step for lane in self._lanes()}
        return [shapes[length] for length in sorted(shapes)]

    @property
    def longest_piece(self) -> int:
        """Tokens of the longest piece that a step may have: of a document, or of a window whose documents see each
        other."""
        masked = self.sequencing.document_mask or self.sequencing.packing == "decomposition"
        longest = self.sequencing.max_length
        if not masked:
            return longest
        return min(longest, max(int(np.diff(source.store.offsets).max()) for source in self.sources))

    def heldout(self) -> list[Packed]:
        """Windows of `max_length` tokens of held-out documents end to end: always the same, whatever the packing.

        `heldout_tokens` over all sources, evenly spread; of each source at least one window, at most all. Fewer tokens
        than a window are one, padded.
        """
        return [window for windows in self.heldout_by_source().values() for window in windows]

    def heldout_by_source(self) -> dict[str, list[Packed]]:
        """The same, by the name of the source; that of a single corpus is ""."""
        longest, sources = self.sequencing.max_length, {}
        wanted = max(self.sequencing.heldout_tokens // len(self.sources) // longest, 1)
        for source, held in zip(self.sources, self.heldout_documents, strict=True):
            there = max((len(held) - 1) // longest, 1)
            count = min(wanted, there)
            begins = [i * there // count * longest for i in range(count)]
            sources[source.name] = [
                self._read(held.store, held.pieces(n, min(n + longest, len(held))), longest) for n in begins
            ]
        return sources

    def _stage(self, step: int) -> tuple[int, Sampler, float | None]:
        return next(stage for stage in reversed(self.stages) if stage[0] <= step)


def checked_audit(steps: int | None) -> int | None:
    """A number of steps to audit. Raises ValueError for none of them."""
    if steps is not None and steps < 1:
        raise ValueError(f"data.audit={steps}: must be at least 1, or null")
    return steps


def changed(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """Lists the differences between two `order`s; None for an order that was not saved."""
    if before is None:
        return "its corpus, data.max_length or train.batch_tokens, or it is of another version of farspan"
    changes = []
    for key in sorted({*before, *after}):
        a, b = before.get(key), after.get(key)
        if a != b and key.endswith(".corpus"):
            changes.append(f"{key}: other documents" if a and b else f"{key}: {'gone' if a else 'new'}")
        elif a != b:
            changes.append("this version of farspan has another" if key == "version" else f"{key} was {a}, is {b}")
    return "; ".join(changes)
