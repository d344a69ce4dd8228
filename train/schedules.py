"""Learning-rate schedules: a multiplier of the optimizer's rate as a function of the tokens trained so far.

Each is a row of phases (`train.phases`), and can go on from a checkpoint of any other.
"""

import math
from typing import Any

from train.phases import (
    COOLDOWNS,
    CURVES,
    TAILS,
    CooldownShape,
    Duration,
    Phase,
    Schedule,
    TailShape,
    check_tail,
    fall,
    tail_of,
    tokens_of,
)


class WSD(Schedule):
    """Warm up linearly, stay, decay (MiniCPM, 2404.06395): the plateau can be continued from any checkpoint on it.

    warmup: length of the rise from `start`: a share of the budget (below 1) or tokens. decay: length of the fall at the
    end of the budget: a share of it (below 1) or tokens; 0 for not at all. floor: last rate, as a share of
    optimizer.lr, from 0 to 1. tail: curve of the fall: linear, cosine, sqrt (one minus the root of the share done:
    2405.18392) or exponential, as MiniCPM has it. begin: the token of the run where the schedule begins, its durations
    counted from there, shares of what is left; null for that of the checkpoint that is resumed, else 0. start: the rate
    where it begins, as a share of optimizer.lr; null for that of the checkpoint, 0 without one.
    """

    def __init__(
        self,
        *,
        warmup: int | float = 0.05,
        decay: int | float = 0.3,
        floor: float = 0.0,
        tail: TailShape = "linear",
        begin: int | None = 0,
        start: float | None = 0.0,
    ):
        super().__init__(begin=begin, start=start, warmup=warmup, decay=decay, floor=floor)
        if tail not in TAILS:
            raise ValueError(f"schedule.tail={tail}: must be one of {', '.join(TAILS)}")
        check_tail(tail, floor if decay else 1.0)
        self.warmup, self.decay, self.floor, self.tail = warmup, decay, floor, tail

    def durations(self, budget: float) -> dict[str, float]:
        return {"warmup": tokens_of(self.warmup, budget), "decay": tokens_of(self.decay, budget)}

    def phases(self, budget: float) -> list[Phase]:
        warmup, decay = self.durations(budget).values()
        stable = Phase("stable", warmup, max(warmup, budget - decay), lambda t: 1.0)
        return [*self.warming(warmup), stable, tail_of(self.tail, 1.0, self.floor, budget, decay)]


class Cosine(Schedule):
    """Warm up linearly, then half a cosine to `floor` at the end of the budget (SGDR, 1608.03983).

    warmup: length of the rise from `start`: a share of the budget (below 1) or tokens. floor: last rate, as a share of
    optimizer.lr, from 0 to 1. begin: the token of the run where the schedule begins, its durations counted from there,
    shares of what is left; null for that of the checkpoint that is resumed, else 0. start: the rate where it begins, as
    a share of optimizer.lr; null for that of the checkpoint, 0 without one.
    """

    def __init__(
        self,
        *,
        warmup: int | float = 0.05,
        floor: float = 0.1,
        begin: int | None = 0,
        start: float | None = 0.0,
    ):
        super().__init__(begin=begin, start=start, warmup=warmup, floor=floor)
        self.warmup, self.floor = warmup, floor

    def durations(self, budget: float) -> dict[str, float]:
        return {"warmup": tokens_of(self.warmup, budget)}

    def phases(self, budget: float) -> list[Phase]:
        warmup = tokens_of(self.warmup, budget)

        def value(t: float) -> float:
            done = min(1.0, (t - warmup) / max(1.0, budget - warmup))
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))

        return [*self.warming(warmup), Phase("cosine", warmup, max(warmup, budget), value)]


class Constant(Schedule):
    """Warm up linearly, then stay.

    warmup: length of the rise from `start`: a share of the budget (below 1) or tokens. begin: the token of the run
    where the schedule begins, its durations counted from there, shares of what is left; null for that of the checkpoint
    that is resumed, else 0. start: the rate where it begins, as a share of optimizer.lr; null for that of the
    checkpoint, 0 without one.
    """

    def __init__(self, *, warmup: int | float = 0.05, begin: int | None = 0, start: float | None = 0.0):
        super().__init__(begin=begin, start=start, warmup=warmup)
        self.warmup = warmup

    def durations(self, budget: float) -> dict[str, float]:
        return {"warmup": tokens_of(self.warmup, budget)}

    def phases(self, budget: float) -> list[Phase]:
        warmup = tokens_of(self.warmup, budget)
        return [*self.warming(warmup), Phase("constant", warmup, max(warmup, budget), lambda t: 1.0)]


class Power(Schedule):
    """Warm up linearly, then a power of the tokens trained, which no budget enters (2408.13359), then a tail.

    warmup: length of the rise from `start`: a share of the budget (below 1) or tokens. hold: length of the stay at
    optimizer.lr after that, where the law would be above it: a share of the budget (below 1) or tokens. exponent:
    exponent of (tokens / tokens where the law begins), below 0; -0.5 is the inverse square root of 1706.03762. decay:
    length of the fall at the end of the budget, from the rate of the law: a share of it (below 1) or tokens; 0 for not
    at all. floor: last rate of the decay, as a share of optimizer.lr, from 0 to 1. tail: curve of the fall: linear,
    cosine, sqrt or exponential. begin: the token of the run where the schedule begins, its durations counted from
    there, shares of what is left; null for that of the checkpoint that is resumed, else 0. start: the rate where it
    begins, as a share of optimizer.lr; null for that of the checkpoint, 0 without one.
    """

    def __init__(
        self,
        *,
        warmup: int | float = 0.05,
        hold: int | float = 0,
        exponent: float = -0.51,
        decay: int | float = 0,
        floor: float = 0.0,
        tail: TailShape = "linear",
        begin: int | None = 0,
        start: float | None = 0.0,
    ):
        super().__init__(begin=begin, start=start, warmup=warmup, hold=hold, decay=decay, floor=floor)
        if not exponent < 0:
            raise ValueError(f"schedule.exponent={exponent}: must be below 0")
        if tail not in TAILS:
            raise ValueError(f"schedule.tail={tail}: must be one of {', '.join(TAILS)}")
        if not warmup + hold > 0:
            raise ValueError(
                f"schedule.warmup={warmup}: must be above 0 where schedule.hold is 0: a power begins there"
            )
        check_tail(tail, floor if decay else 1.0)
        self.warmup, self.hold, self.exponent = warmup, hold, exponent
        self.decay, self.floor, self.tail = decay, floor, tail

    def durations(self, budget: float) -> dict[str, float]:
        return {key: tokens_of(getattr(self, key), budget) for key in ("warmup", "hold", "decay")}

    def phases(self, budget: float) -> list[Phase]:
        warmup, hold, decay = self.durations(budget).values()
        law, end = warmup + hold, max(warmup + hold, budget - decay)

        def power(t: float) -> float:
            return (t / law) ** self.exponent

        return [
            *self.warming(warmup),
            Phase("hold", warmup, law, lambda t: 1.0),
            Phase("power", law, end, power),
            tail_of(self.tail, power(end), self.floor, budget, decay),
        ]


class Infinite(Schedule):
    """Warm up, cool down to a constant rate, and anneal only to ship a model (2403.08763, section 7.4): training goes
    on from any checkpoint of the constant phase, on other data too, without warming up again.

    warmup: length of the rise from `start`: a share of the budget (below 1) or tokens. cooldown: length of the fall to
    the constant rate: a share or tokens. constant: length of the stay there: a share or tokens; null for the rest of
    the budget. anneal: length of the exponential fall at the end: a share or tokens; 0 for not at all, which leaves a
    run to be continued. level: the constant rate, as a share of optimizer.lr, from 0 to 1. floor: last rate of the
    anneal, as a share of optimizer.lr. shape: curve of the cooldown, cosine or inverse_sqrt. alpha: speed of
    inverse_sqrt's fall at first. begin: the token of the run where the schedule begins, its durations counted from
    there, shares of what is left; null for that of the checkpoint that is resumed, else 0. start: the rate where it
    begins, as a share of optimizer.lr; null for that of the checkpoint, 0 without one.
    """

    exact = True

    def __init__(
        self,
        *,
        warmup: int | float = 0.01,
        cooldown: int | float = 0.6,
        constant: int | float | None = None,
        anneal: int | float = 0.14,
        level: float = 0.55,
        floor: float = 0.1,
        shape: CooldownShape = "cosine",
        alpha: float = 10.0,
        begin: int | None = 0,
        start: float | None = 0.0,
    ):
        durations = {"warmup": warmup, "cooldown": cooldown, "constant": constant, "anneal": anneal}
        super().__init__(begin=begin, start=start, **durations, level=level, floor=floor)
        if shape not in COOLDOWNS:
            raise ValueError(f"schedule.shape={shape}: must be one of {', '.join(COOLDOWNS)}")
        if not alpha > 0:
            raise ValueError(f"schedule.alpha={alpha}: must be above 0")
        if not cooldown and level < 1:
            raise ValueError(f"schedule.cooldown={cooldown}: must be above 0 where schedule.level is below 1")
        for key, value in (("floor", floor), ("level", level)):
            if anneal and not value > 0:
                raise ValueError(f"schedule.{key}={value}: must be above 0, which an exponential anneal never reaches")
        self.given, self.level, self.floor, self.shape, self.alpha = durations, level, floor, shape, alpha

    def durations(self, budget: float) -> dict[str, float]:
        lengths = {key: tokens_of(value, budget) for key, value in self.given.items() if value is not None}
        left = max(budget - sum(lengths.values()), 0.0)
        return {key: lengths.get(key, left) for key in self.given}

    def phases(self, budget: float) -> list[Phase]:
        warmup, cooldown, constant, anneal = self.durations(budget).values()
        level, cooled = self.level, warmup + cooldown
        ends = (cooled, cooled + constant, cooled + constant + anneal)

        def cool(t: float) -> float:
            return fall(self.shape, 1.0, level, (ends[0] - t) / cooldown, self.alpha)

        def shipped(t: float) -> float:
            return fall("exponential", level, self.floor, (ends[2] - t) / anneal) if anneal else level

        return [
            *self.warming(warmup),
            Phase("cooldown", warmup, ends[0], cool),
            Phase("constant", ends[0], ends[1], lambda t: level),
            Phase("anneal", ends[1], ends[2], shipped),
        ]


class Anneal(Schedule):
    """Decay from where the rate is to the end of the budget: a run that is resumed in its midst, or a last stage on
    other data.

    floor: last rate, as a share of optimizer.lr, from 0 to 1. tail: curve of the fall: linear, cosine, sqrt (one minus
    the root of the share done: 2405.18392) or exponential. begin: the token of the run where the decay begins; null for
    that of the checkpoint that is resumed, else 0. start: the rate where it begins, as a share of optimizer.lr; null
    for that of the checkpoint, 1 without one.
    """

    start_alone = 1.0

    def __init__(
        self, *, floor: float = 0.0, tail: TailShape = "linear", begin: int | None = None, start: float | None = None
    ):
        super().__init__(begin=begin, start=start, floor=floor)
        if tail not in TAILS:
            raise ValueError(f"schedule.tail={tail}: must be one of {', '.join(TAILS)}")
        if tail == "exponential" and start == 0:
            raise ValueError(f"schedule.start={start}: must be above 0 for an exponential tail")
        check_tail(tail, floor)
        self.floor, self.tail = floor, tail

    def durations(self, budget: float) -> dict[str, float]:
        return {}

    def phases(self, budget: float) -> list[Phase]:
        return [tail_of(self.tail, self.start, self.floor, budget, budget)]


class Phases(Schedule):
    """Any row of phases, as data.

    phases: lines of [duration, value, curve], one behind the other: the length (a share of the budget, below 1, or
    tokens), the share of optimizer.lr at the end of it, and the curve from the end of the phase before: linear, cosine,
    sqrt (one minus the root of the share done), exponential, inverse_sqrt (the infinite schedule's, alpha 10) or
    constant. They must add up to the budget. begin: the token of the run where the schedule begins, its durations
    counted from there, shares of what is left; null for that of the checkpoint that is resumed, else 0. start: the rate
    where it begins, as a share of optimizer.lr; null for that of the checkpoint, 0 without one.
    """

    exact = True

    def __init__(self, *, phases: list[Any], begin: int | None = 0, start: float | None = 0.0):
        super().__init__(begin=begin, start=start)
        if not phases:
            raise ValueError("schedule.phases=[]: must have a line")
        self.lines = [self._line(line) for line in phases]
        before = start
        for line, (_, value, curve) in zip(phases, self.lines, strict=True):
            if before is not None and curve == "constant" and value != before:
                raise ValueError(f"schedule.phases={line}: must stay at {before}, where the phase before has ended")
            if curve == "exponential" and (before == 0 or value == 0):
                raise ValueError(f"schedule.phases={line}: must begin and end above 0 to be exponential")
            before = value

    @staticmethod
    def _line(line: Any) -> tuple[Duration, float, str]:
        if not isinstance(line, list | tuple) or len(line) != 3 or not isinstance(line[2], str):
            raise ValueError(f"schedule.phases={line}: must be lines of [duration, value, curve]")
        for value in line[:2]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"schedule.phases={line}: must have numbers from 0 for a duration and a value")
        duration, value, curve = line
        if curve not in CURVES:
            raise ValueError(f"schedule.phases={line}: {curve} must be one of {', '.join(CURVES)}")
        return duration, float(value), curve

    def durations(self, budget: float) -> dict[str, float]:
        return {f"phase {i}": tokens_of(line[0], budget) for i, line in enumerate(self.lines, 1)}

    def phases(self, budget: float) -> list[Phase]:
        phases: list[Phase] = []
        at, first = 0.0, self.start
        for length, (_, last, curve) in zip(self.durations(budget).values(), self.lines, strict=True):
            phases.append(self._phase(f"phase {len(phases) + 1}: {curve}", at, length, (curve, first, last)))
            at, first = at + length, last
        return phases

    @staticmethod
    def _phase(name: str, begin: float, length: float, how: tuple[str, float, float]) -> Phase:
        end = begin + length
        return Phase(name, begin, end, lambda t: fall(*how, 1 - (t - begin) / length) if length else how[2])
