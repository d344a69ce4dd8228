"""A lower bound on a step's time, for any plan on any number of micro-steps.

The longest micro-step takes T1 seconds, its launch included, or more than any of its sequences needs. Between two
breakpoints (the time of a sequence on some size of group), T1 rules out the groups on which a sequence takes longer;
what is left gives each sequence its least work, in rank-seconds. So with N ranks and m micro-steps at least

    total >= m · launch + work(T1) / N                      all work is done
    total >= T1 + (m - 1) · launch + work outside / N       at most N ranks' room of tokens runs in the longest one

where what is outside has at least the tokens beyond that room, taken where a token has least work. The bound is the
least over all m and intervals of T1 of the larger of the two.

Where groups may compute again, fewer micro-steps hold all tokens but some then cost more. If a rank holds c tokens with
nothing computed again and C at most, R of t tokens are computed again on at least R/C rank-steps, and at most c of the
others run on each that is left: t - R <= (m·N - R/C)·c, so that R >= (t - m·N·c) / (1 - c/C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from parallel.schedule.adaptive.cost import Costs, Floats


def lower_bound(costs: Costs, lengths: Sequence[int], counts: Sequence[int]) -> float:
    """Seconds. lengths: distinct, in tokens; counts: sequences of each."""
    model, ranks = costs.model, costs.cluster.ranks
    tokens, many = np.asarray(lengths, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    fastest = costs.speeds.max()
    choices = range(len(costs.names))
    computing = np.min([costs.computing(tokens, choice).sum(0) for choice in choices], axis=0)
    time = np.full((len(costs.sizes), len(tokens)), np.inf)  # at its cheapest, where it fits
    for g, size in enumerate(costs.sizes):
        sent = costs.sending(size).sum() * tokens + costs.fixed(size).sum()
        for choice in choices:
            own = costs.computing(tokens, choice).sum(0) / size / fastest + sent
            time[g] = np.where(tokens <= costs.rank_tokens[choice].max() * size, np.minimum(time[g], own), time[g])
    sizes = np.array(costs.sizes, dtype=np.float64)[:, None]
    shared = np.array([costs.fixed(size).sum() for size in costs.sizes])[:, None]
    least = np.where(np.isfinite(time), (time - shared) * sizes, np.inf)  # rank-seconds; a group's own are shared
    total_tokens, room = float(tokens @ many), float(costs.rank_tokens.max(axis=0).sum())
    steps = max(1, math.ceil(total_tokens / room - 1e-9))
    outside = max(0.0, total_tokens - room)
    floor = float(time.min(0).max())
    ends = np.unique(time[np.isfinite(time) & (time > floor)])
    begins = np.concatenate([[floor], ends])
    # work[c, k]: least work of k where T1 is in [begins[c], begins[c+1]): groups that take more are ruled out
    allowed = time[None] <= begins[:, None, None]
    work = np.where(allowed, least[None], np.inf).min(1)
    total = np.maximum(work @ many / ranks, float(computing @ many) / costs.speeds.sum())
    plain = np.where(np.isfinite(time), _plain(costs, tokens, fastest) * sizes, np.inf)
    unpaid = np.where(allowed, plain[None], np.inf).min(1) @ many / ranks  # as if computing again cost nothing
    density = np.where(np.isfinite(work), work, 0) / tokens
    order = np.argsort(density, axis=1)
    held = np.take_along_axis(np.broadcast_to(tokens * many, density.shape), order, 1)
    before = np.cumsum(held, axis=1) - held
    filled = np.clip(outside - before, 0, held)
    forced = (filled * np.take_along_axis(density, order, 1)).sum(1) / ranks
    best, m = math.inf, steps
    while True:
        again = _again(costs, tokens, total_tokens, m) / fastest / ranks
        bound = np.maximum(np.maximum(total, unpaid + again), begins + forced) + m * model.launch
        best = min(best, float(bound.min()))
        m += 1
        if not again or float(np.maximum(total, begins + forced).min()) + m * model.launch >= best:
            return best


def _plain(costs: Costs, tokens: Floats, speed: float) -> Floats:
    """[sizes, sequences], seconds with nothing computed again, whether it fits or not."""
    computing = costs.computing(tokens).sum(0) / speed
    return np.stack([computing / size + costs.sending(size).sum() * tokens for size in costs.sizes])


def _again(costs: Costs, tokens: Floats, total: float, m: int) -> float:
    """Seconds of one rank of speed 1 that computing again takes at least in m micro-steps."""
    plain, most = float(costs.rank_tokens[0].sum()), float(costs.rank_tokens.max(axis=0).sum())
    if total <= m * plain:
        return 0.0
    ratio = float((costs.rank_tokens[0] / costs.rank_tokens.max(axis=0)).min())
    if ratio >= 1:
        return 0.0
    dearer = [costs.computing(tokens, c).sum(0) - costs.computing(tokens).sum(0) for c in range(1, len(costs.names))]
    least = max(0.0, float((np.min(dearer, axis=0) / tokens).min()))
    return min(total, m * most, (total - m * plain) / (1 - ratio)) * least
