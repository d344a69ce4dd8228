"""Weighted draws in closed form: what each source has given before draw n is computed, not stored.

Let C_k(t) be the cumulated weight of k, as a share, over the first t draws: piecewise linear, summing to t. The j-th
item of k, from 0, is due when C_k(t) = j + 1/2, and draws are the items in the order in which they fall due. With fixed
weights that is Webster's and Sainte-Lague's rule. Rounding C(t) by largest remainders would be as near, but what one of
three or more has given can then fall from t to t + 1 (the Alabama paradox; Balinski and Young 1982), and a draw cannot
be taken back. Here each gives within K / 2 of its cumulated weight, and never less than before.

All in whole numbers and fractions: the same draws on every machine, as far on as one likes.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heapreplace
from typing import NamedTuple

HALF = Fraction(1, 2)


class _Segment(NamedTuple):
    """A stretch of draws: from `start` on, C grows from `begun` by `rates` a draw."""

    start: Fraction
    begun: tuple[Fraction, ...]
    rates: tuple[Fraction, ...]


class Shares:
    """Draws shared out among K.

    phases: (draw, K weights) from that draw on, the first from 0; only their ratios count. caps: the most that each may
    give, None for no limit: one that has given it leaves, and the others go on in the ratio of their weights. `total`:
    how many draws there are, None for no end. Raises ValueError for weights that are negative or all 0 at the start.
    """

    def __init__(
        self, phases: Sequence[tuple[int, Sequence[Fraction | int]]], caps: Sequence[int | None] | None = None
    ) -> None:
        size = len(phases[0][1])
        self.caps = tuple(caps) if caps is not None else (None,) * size
        self._segments: list[_Segment] = []
        at, given = Fraction(0), (Fraction(0),) * size
        self.total: int | None = None
        for i, (start, weights) in enumerate(phases):
            if min(weights) < 0 or len(weights) != size or start < 0 or (i == 0) != (start == 0):
                raise ValueError(
                    f"weights {list(weights)} from draw {start} on: must be {size}, none negative, in order"
                )
            until = phases[i + 1][0] if i + 1 < len(phases) else None
            if until is not None and until <= start and start:
                raise ValueError(f"draw {until}: must come after draw {start}")
            at, given, dry = self._phase(at, given, weights, until)
            if dry:
                self.total = int(at)
                break

    def _phase(
        self, at: Fraction, given: tuple[Fraction, ...], weights: Sequence[Fraction | int], until: int | None
    ) -> tuple[Fraction, tuple[Fraction, ...], bool]:
        """Segments of one phase; where it ends, what each has given there, and whether nobody is left to give."""
        while until is None or at < until:
            open_ = [w if c is None or g < c else 0 for w, c, g in zip(weights, self.caps, given, strict=True)]
            if not (together := sum(open_)):
                return at, given, True
            rates = tuple(Fraction(w) / together for w in open_)
            self._segments.append(_Segment(at, given, rates))
            ends = [(c - g) / r for c, g, r in zip(self.caps, given, rates, strict=True) if c is not None and r]
            if until is not None:
                ends.append(until - at)
            if not ends:
                break
            span = min(ends)
            at, given = at + span, tuple(g + r * span for g, r in zip(given, rates, strict=True))
        return at, given, False

    def before(self, draw: int) -> tuple[int, ...]:
        """Counts the draws of each before this draw; they sum to `draw`. Raises IndexError behind the last."""
        return self._run(draw, 0)[0]

    def draws(self, first: int, count: int) -> list[tuple[int, int]]:
        """(who, how many it gave before) of `count` draws. Raises IndexError behind the last."""
        return self._run(first, count)[1]

    def _run(self, first: int, count: int) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        if first < 0 or self.total is not None and first + count > self.total:
            raise IndexError(f"draws {first} to {first + count} of {self.total}")
        size = len(self.caps)
        early = max(first - size // 2 - 1, 0)  # fewer than `first` items are due by then: each is within 1/2
        given = [math.floor(c + HALF) for c in self._cumulated(early)]
        due = [(self._due(k, given[k]), k) for k in range(size)]
        heapify(due)
        drawn: list[tuple[int, int]] = []
        counts = tuple(given)
        for n in range(sum(given), first + count):
            if n == first:
                counts = tuple(given)
            k = due[0][1]
            if n >= first:
                drawn.append((k, given[k]))
            given[k] += 1
            heapreplace(due, (self._due(k, given[k]), k))
        return (tuple(given) if not count else counts), drawn

    def _cumulated(self, draw: int) -> list[Fraction]:
        """C at a draw."""
        segment = next((s for s in reversed(self._segments) if s.start <= draw), None)
        if segment is None:
            return [Fraction(0)] * len(self.caps)
        return [g + r * (draw - segment.start) for g, r in zip(segment.begun, segment.rates, strict=True)]

    def _due(self, k: int, item: int) -> Fraction | float:
        """When C_k reaches item + 1/2; infinity if it never does."""
        cap = self.caps[k]
        if cap is not None and item >= cap:
            return math.inf
        aim = item + HALF
        last = len(self._segments) - 1
        for i, (start, begun, rates) in enumerate(self._segments):
            if rates[k] and (i == last or self._segments[i + 1].begun[k] >= aim):
                return start + (aim - begun[k]) / rates[k]
        return math.inf
