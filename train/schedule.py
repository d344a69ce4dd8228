"""Learning-rate schedules: a multiplier of the optimizer's rate as a function of the tokens trained so far.

Durations are tokens (whole numbers) or shares of the run's budget (fractions below 1).
"""

import math


def _tokens(key: str, duration: int | float, budget: int) -> float:
    if duration < 0 or (isinstance(duration, float) and duration > 1 and not duration.is_integer()):
        raise ValueError(f"schedule.{key}={duration}: must be a share of the budget in [0, 1) or a number of tokens")
    return duration * budget if duration < 1 else float(duration)


class WSD:
    """Warm up linearly, stay, decay (MiniCPM, 2404.06395): the plateau can be continued from any checkpoint on it.

    warmup: how long the rate rises from 0: a share of the budget (below 1) or tokens. decay: how long the rate falls,
    linearly (2405.18392), at the end of the budget: a share of it (below 1) or tokens; 0 for not at all. floor: where
    the rate ends, as a share of optimizer.lr, from 0 to 1.
    """

    def __init__(self, *, warmup: int | float = 0.05, decay: int | float = 0.3, floor: float = 0.0):
        if not 0 <= floor <= 1:
            raise ValueError(f"schedule.floor={floor}: must lie in [0, 1]")
        self.warmup, self.decay, self.floor = warmup, decay, floor
        self.multiplier(0, 1_000_000_000)

    def multiplier(self, tokens: float, budget: int) -> float:
        warmup, decay = _tokens("warmup", self.warmup, budget), _tokens("decay", self.decay, budget)
        if tokens < warmup:
            return tokens / warmup
        left = (budget - tokens) / decay if decay else 1.0
        return self.floor + (1 - self.floor) * min(1.0, max(0.0, left))


class Cosine:
    """Warm up linearly, then half a cosine to `floor` at the end of the budget (SGDR, 1608.03983).

    warmup: how long the rate rises from 0: a share of the budget (below 1) or tokens. floor: where the rate ends, as a
    share of optimizer.lr, from 0 to 1.
    """

    def __init__(self, *, warmup: int | float = 0.05, floor: float = 0.1):
        if not 0 <= floor <= 1:
            raise ValueError(f"schedule.floor={floor}: must lie in [0, 1]")
        self.warmup, self.floor = warmup, floor
        self.multiplier(0, 1_000_000_000)

    def multiplier(self, tokens: float, budget: int) -> float:
        warmup = _tokens("warmup", self.warmup, budget)
        if tokens < warmup:
            return tokens / warmup
        done = min(1.0, (tokens - warmup) / max(1.0, budget - warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
