"""The length of each step: odds of the buckets over a cycle, and a longest length that grows with the tokens.

A step's sequences all have one length. Buckets give steps by their tokens; a curriculum multiplies that by odds, so
that a bucket with high ones comes early and has given its part of the cycle before the others: it leaves, and they
share the rest. At the end of a cycle every bucket has given what its tokens are worth, whatever the odds. The published
code draws buckets at random with these weights (2405.13226, section 3.3); here they are shared out
(`data.samplers.apportion`).
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

from data.samplers.apportion import Shares

Odds = Literal["uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"]
ODDS = get_args(Odds)


class Curriculum:
    """The order of lengths in a run.

    odds: odds of a bucket over the next longer one, within a cycle, for data.packing=decomposition. uniform mixes all
    lengths by their tokens throughout; grow_linear has n, n - 1, …, 1 for the shortest to the longest; grow_p2 twice
    those of the next longer; grow_p100 a hundred times, so lengths come nearly one after another; shrink_p100 the other
    way round. cycles: number of passes through the order in `tokens`; every cycle gives each bucket its part. tokens:
    length of all cycles together, as a rule the run's budget, which a resumed run leaves as it was; null for one epoch
    of the corpus. context: progressive lengths, [[token, max_length, rope_theta], …] the token from which sequences
    have at most so many tokens, and rotary positions that base (null: the model's); null for data.max_length
    throughout. Each line begins an epoch of its own.
    """

    def __init__(
        self,
        *,
        odds: Odds = "uniform",
        cycles: int = 8,
        tokens: int | None = None,
        context: list[Any] | None = None,
    ) -> None:
        if odds not in ODDS:
            raise ValueError(f"curriculum.odds={odds}: must be one of {', '.join(ODDS)}")
        if cycles < 1:
            raise ValueError(f"curriculum.cycles={cycles}: must be at least 1")
        if tokens is not None and tokens < 1:
            raise ValueError(f"curriculum.tokens={tokens}: must be at least 1, or null")
        self.odds, self.cycles, self.tokens, self.context = odds, cycles, tokens, None
        if context is not None:
            self.context = tuple(_stage(line) for line in context)
            begins = [stage[0] for stage in self.context]
            if not begins or begins[0] != 0 or begins != sorted(set(begins)):
                raise ValueError(f"curriculum.context={context}: must begin with token 0 and go on with later ones")

    def odds_of(self, buckets: int) -> list[int]:
        """The odds of each bucket, the shortest first."""
        if self.odds == "grow_linear":
            return list(range(buckets, 0, -1))
        base = {"uniform": 1, "grow_p2": 2}.get(self.odds, 100)
        odds = [base**i for i in range(buckets)]
        return odds if self.odds == "shrink_p100" else odds[::-1]


def _stage(line: Any) -> tuple[int, int, float | None]:
    if not isinstance(line, list | tuple) or len(line) != 3:
        raise ValueError(f"curriculum.context={line}: must be lines of [token, max_length, rope_theta]")
    token, length, theta = line
    for value, least in ((token, 0), (length, 1)):
        if isinstance(value, bool) or not isinstance(value, int) and value != int(value) or value < least:
            raise ValueError(f"curriculum.context={line}: must have whole numbers of tokens")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 1):
        raise ValueError(f"curriculum.context={line}: rope_theta must be above 1, or null")
    return int(token), int(length), None if theta is None else float(theta)


class Buckets:
    """Chooses the bucket of each step.

    phases, caps: as of `Shares`, in steps, the weights being buckets' tokens. odds: by bucket. cycle: steps of one.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Sequence[Fraction | int]]],
        *,
        odds: Sequence[int],
        cycle: int,
        caps: Sequence[int | None] | None = None,
    ) -> None:
        self.shares = Shares(phases, caps)
        self.odds = tuple(odds)
        self.cycle = cycle if len(set(odds)) > 1 else None
        self.total = self.shares.total

    def at(self, step: int) -> tuple[int, int]:
        """(bucket, how many steps it gave before). Raises IndexError behind the last."""
        if self.cycle is None:
            return self.shares.draws(step, 1)[0]
        given, inner, place = self._within(step)
        bucket, more = inner.draws(place, 1)[0]
        return bucket, given[bucket] + more

    def before(self, step: int) -> tuple[int, ...]:
        """Counts the steps of each bucket before this one."""
        if self.cycle is None:
            return self.shares.before(step)
        given, inner, place = self._within(step)
        return tuple(a + b for a, b in zip(given, inner.before(place), strict=True))

    def _within(self, step: int) -> tuple[tuple[int, ...], Shares, int]:
        """Counts before a step's cycle, the shares of the cycle, and the step's place in it."""
        assert self.cycle is not None
        if step < 0 or self.total is not None and step > self.total:
            raise IndexError(f"step {step} of {self.total}")
        begin = step // self.cycle * self.cycle
        if begin and begin == self.total:
            begin -= self.cycle
        end = begin + self.cycle if self.total is None else min(begin + self.cycle, self.total)
        given = self.shares.before(begin)
        quota = tuple(b - a for a, b in zip(given, self.shares.before(end), strict=True))
        return given, _cycle(quota, self.odds), step - begin


@lru_cache(maxsize=8)
def _cycle(quota: tuple[int, ...], odds: tuple[int, ...]) -> Shares:
    if not any(quota):
        return Shares([(0, [1] * len(quota))], [0] * len(quota))
    return Shares([(0, [q * o for q, o in zip(quota, odds, strict=True)])], quota)
