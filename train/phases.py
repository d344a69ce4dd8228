"""The form of every learning-rate schedule: a row of phases, each from one token to another, that meet without a jump.

Durations are tokens (whole numbers) or shares (below 1) of what is left of the run's budget where the schedule begins.

Every schedule can go on from a checkpoint of any other. `begin` is the token of the run where it begins, `start` the
multiplier there; null for both means those of the checkpoint that a run goes on from. `launch.preflight.continuation`
puts numbers in their place before the run starts, so that a run which is resumed later still has the same curve.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

Duration = int | float


class Phase(NamedTuple):
    """name: as its duration's key. begin, end: tokens since the schedule began. value: the multiplier, by such."""

    name: str
    begin: float
    end: float
    value: Callable[[float], float]


# Each from 1 to 0 as what is left of a phase goes from 1 to 0, but for exponential, which `fall` knows.
CURVES = ("linear", "cosine", "sqrt", "exponential", "inverse_sqrt", "constant")
TailShape = Literal["linear", "cosine", "sqrt", "exponential"]
TAILS = get_args(TailShape)
CooldownShape = Literal["cosine", "inverse_sqrt"]
COOLDOWNS = get_args(CooldownShape)


def fall(curve: str, first: float, last: float, left: float, alpha: float = 10.0) -> float:
    """Interpolates from `first` at left=1 to `last` at left=0. sqrt: 1 minus the root of what is done (2405.18392).
    inverse_sqrt:
    1 / sqrt(1 + alpha done), brought to these ends (2403.08763)."""
    left = min(1.0, max(0.0, left))
    if curve == "exponential":
        return first * (last / first) ** (1 - left)
    if curve == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * left))
    elif curve == "sqrt":
        share = 1 - math.sqrt(1 - left)
    elif curve == "inverse_sqrt":
        share = 1 - (1 / math.sqrt(1 + alpha * (1 - left)) - 1) / (1 / math.sqrt(1 + alpha) - 1)
    else:
        share = left
    return last + (first - last) * share


class Schedule:
    """The common part of all schedules: where they begin, their warm-up, and how phases are looked up and checked."""

    start_alone = 0.0  # where `start` is null and there is no checkpoint
    exact = False  # whether the phases must fill the budget, and not only fit into it

    def __init__(self, *, begin: int | None, start: float | None, **checks: Any) -> None:
        if begin is not None and begin < 0:
            raise ValueError(f"schedule.begin={begin}: must not be negative, or be null")
        if start is not None and start < 0:
            raise ValueError(f"schedule.start={start}: must not be negative, or be null")
        self.begin, self.given_start = begin, start
        for key, value in checks.items():
            if value is not None:
                _check(key, value)

    @property
    def start(self) -> float:
        return self.start_alone if self.given_start is None else self.given_start

    def phases(self, budget: float) -> list[Phase]:
        """The phases of a run that has `budget` tokens to go where the schedule begins."""
        raise NotImplementedError

    def multiplier(self, tokens: float, budget: int) -> float:
        """The multiplier of the optimizer's rate, `tokens` into a run of `budget` tokens."""
        begin = self.begin or 0
        phases = self.phases(budget - begin)
        at = min(max(tokens - begin, 0.0), phases[-1].end)
        return next((phase for phase in phases if at < phase.end), phases[-1]).value(at)

    def check(self, budget: int, batch_tokens: int = 0) -> None:
        """Raises ValueError where the phases do not fit into the budget, or do not fill it where they must.

        A budget is rounded up to whole steps: phases may be short of it by less than one of `batch_tokens`.
        """
        begin = self.begin or 0
        if begin >= budget:
            raise ValueError(f"schedule.begin={begin}: must be below the budget, {budget:,} tokens")
        durations = self.durations(budget - begin)
        total = begin + sum(durations.values())
        least = budget - max(batch_tokens - 1, 0) if self.exact else 0
        if not least * (1 - 1e-9) <= total <= budget * (1 + 1e-9):
            parts = [f"begin {begin:,}"] * bool(begin) + [f"{name} {n:,.0f}" for name, n in durations.items() if n]
            most = "exactly" if self.exact else "at most"
            raise ValueError(
                f"schedule: {' + '.join(parts)} add up to {total:,.0f} tokens: must be {most} the budget, "
                f"{budget:,} (train.tokens in whole steps)"
            )

    def durations(self, budget: float) -> dict[str, float]:
        """Tokens by the key of each duration that is given."""
        raise NotImplementedError

    def warming(self, tokens: float) -> list[Phase]:
        start = self.start
        return [Phase("warmup", 0.0, tokens, lambda t: start + (1 - start) * (t / tokens))] if tokens else []


def _check(key: str, value: Any) -> None:
    """Durations, and shares of optimizer.lr."""
    if key in ("floor", "level"):
        if not 0 <= value <= 1:
            raise ValueError(f"schedule.{key}={value}: must lie in [0, 1]")
    elif value < 0 or (isinstance(value, float) and value > 1 and not value.is_integer()):
        raise ValueError(f"schedule.{key}={value}: must be a share of the budget in [0, 1) or a number of tokens")


def tokens_of(duration: Duration, budget: float) -> float:
    return duration * budget if duration < 1 else float(duration)


def tail_of(curve: str, first: float, last: float, end: float, length: float) -> Phase:
    """Called decay; empty at `end` where its length is 0."""

    begin = end - length

    def value(t: float) -> float:
        if curve == "sqrt":  # whose slope has no bound at the start: a rounding there would be seen
            return fall(curve, first, last, 1 - (t - begin) / length if length else 1.0)
        return fall(curve, first, last, (end - t) / length if length else 1.0)

    return Phase("decay", begin, end, value)


def check_tail(tail: str, floor: float) -> None:
    if tail == "exponential" and not floor > 0:
        raise ValueError(f"schedule.floor={floor}: must be above 0, which an exponential tail never reaches")
