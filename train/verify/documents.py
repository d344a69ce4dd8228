"""Packed documents of unequal lengths, with every edge that a layout can get wrong.

Documents begin on the border of two ranks, one token before and one behind it; they have one token, fewer than a
convolution reads, or nearly all of a sequence. A sequence is padded, another has no target on its first ranks, one has
fewer tokens than there may be ranks.
"""

from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np

from data.pack import NO_TARGET, Packed
from models.sequence import DocumentKey

PADDING = 3  # tokens of a padded sequence that only fill a place
SHORTEST = 5  # tokens of the shortest sequence


@dataclass(frozen=True, eq=False)
class Document:
    """A document by itself: tokens and targets, int64 [L], and its name in training."""

    tokens: Any
    targets: Any
    key: DocumentKey


class EdgeCases:
    """The data of a run that is held to one process.

    vocabulary: tokens are drawn from so many. length: tokens of a sequence. sequences: number of them in a step.
    pieces: spans into which the ranks cut a sequence. equal: true gives all sequences of all steps one length; false
    has them differ in every second step.
    """

    def __init__(self, *, vocabulary: int, length: int, sequences: int, pieces: int, equal: bool = False):
        if length < 4 * pieces or length < 16:
            raise ValueError(f"data.length={length}: must be at least 16, and four tokens for each of {pieces} pieces")
        self.vocabulary, self.length, self.sequences = vocabulary, length, sequences
        self.pieces, self.equal = pieces, equal

    def open(self, batch_tokens: int, curriculum: Any) -> "EdgeBatches":
        """The batches; their size is their own."""
        return EdgeBatches(self)


class EdgeBatches:
    """The batches of `EdgeCases`, with what `train.build` asks of any."""

    chance = None
    fingerprint = "verify"
    order: dict[str, Any] = {}  # noqa: RUF012
    sides: dict[str, bool] = {}  # noqa: RUF012
    windows_per_batch = 1
    tokenizer = SimpleNamespace(card=lambda: {"name": "verify"})

    def __init__(self, cases: EdgeCases):
        self.cases = cases

    def card(self) -> dict[str, Any]:
        """The card of a corpus; this one has none."""
        return {}

    def heldout_by_source(self) -> dict[str, list[Packed]]:
        """The held-out windows of each source: there are none."""
        return {}

    def lengths(self, step: int) -> list[int]:
        """The tokens of each sequence of a step."""
        cases = self.cases
        if cases.equal or step % 2 == 0:
            return [cases.length] * cases.sequences
        shorter = [cases.length - (7 * s + 3) % (cases.length // 2) for s in range(cases.sequences - 1)]
        return [*shorter, SHORTEST]

    def shapes(self) -> list[list[int]]:
        """The lengths of every kind of batch that there is."""
        return [self.lengths(0), self.lengths(1)]

    def drawn(self, step: int, skips: int = 0) -> dict[str, int]:
        """The tokens that each source has given before a step."""
        return {"": sum(sum(self.lengths(i)) for i in range(step + skips))}

    def slots(self, step: int, skips: int = 0) -> list[Any]:
        """The source of each sequence of a step: there is one."""
        return [SimpleNamespace(part=SimpleNamespace(name=""))] * self.cases.sequences

    def rope_theta(self, step: int, skips: int = 0) -> None:
        """The base of rotary positions is the model's own."""
        return

    def batch(self, seed: int, step: int, skips: int = 0) -> list[Packed]:
        """The global batch of a step."""
        return [self._packed(documents) for documents in self._documents(seed, step + skips)]

    def documents(self, seed: int, step: int) -> list[list[Document]]:
        """The same, each document by itself, in its sequence; without padding."""
        texts = []
        for s, documents in enumerate(self._documents(seed, step)):
            real = [d for d in documents if not d[2]]
            texts.append([Document(t, y, DocumentKey(step + 1, s, i, len(t))) for i, (t, y, _) in enumerate(real)])
        return texts

    def _documents(self, seed: int, step: int) -> list[list[tuple[Any, Any, bool]]]:
        """Tokens and targets of each document of each sequence, and whether it is padding."""
        cases, texts = self.cases, []
        for s, length in enumerate(self.lengths(step)):
            draw = np.random.default_rng((seed, step, s))
            parts, padding = _parts(s, length, cases.pieces, draw)
            ends, documents = list(accumulate(parts)), []
            for size, end in zip(parts, ends, strict=True):
                tokens = draw.integers(0, cases.vocabulary, size)
                targets = np.append(tokens[1:], NO_TARGET)
                if _kind(s) == 2:  # the first half has nothing to predict
                    hidden = max(0, length // 2 - (end - size))
                    targets[:hidden] = NO_TARGET
                documents.append((tokens, targets, False))
            if padding:
                empty = np.full(padding, NO_TARGET)
                documents.append((np.zeros(padding, np.int64), empty, True))
            texts.append(documents)
        return texts

    @staticmethod
    def _packed(documents: list[tuple[Any, Any, bool]]) -> Packed:
        starts = np.concatenate([np.arange(len(tokens)) == 0 for tokens, _, _ in documents])
        tokens, targets = (np.concatenate([d[i] for d in documents]).astype(np.int64) for i in (0, 1))
        return Packed(tokens, targets, starts, sum(len(d[0]) for d in documents if d[2]))


def _kind(s: int) -> int:
    """The kind of a sequence. Joined end to end, as many as a step has end their first half inside a document."""
    return (s + 1) % 4


def _parts(s: int, length: int, pieces: int, draw: np.random.Generator) -> tuple[list[int], int]:
    """The lengths of a sequence's documents, and its padding."""
    if length <= 2 * SHORTEST:
        return [length - 1, 1], 0
    edge = max(2, length // pieces)
    kind = _kind(s)
    if kind == 0:  # on an edge, one token before and one behind
        cuts = {edge, edge + 1, 2 * edge - 1, 3 * edge + 1, length - 2}
    elif kind == 1:  # one of nearly all tokens
        return [length - PADDING], PADDING
    elif kind == 2:  # shorter than a convolution, one after another
        cuts = {length - n for n in (1, 2, 4, 7)} | {length // 2}
    else:
        cuts = set(draw.integers(1, length, 3).tolist())
    ordered = [0, *sorted(c for c in cuts if 0 < c < length), length]
    return [b - a for a, b in zip(ordered, ordered[1:], strict=False)], 0
