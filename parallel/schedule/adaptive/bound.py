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
others run on each that is left: t - R <= (m·N - R/C)·c, so that R >= (t - m·N·c) / (1 - c/C). And a rank that computes
again has no time for more tokens than T1 over the least that one takes, which stands for C where it is less: as the
bound grows, so does that, and the least sum of seconds that is no less than what it asks for is the bound.

The longest sequence, of l tokens, has a group to itself, or shares it at that group's price. If it runs on s ranks,
all but y tokens of the others are elsewhere, and with q the least that a token costs more there than where it costs
least, in rank-seconds,

    total >= m · launch + (work + q·y + again of t - l - y tokens on m·N - s rank-steps) / N        for the best y
    total >= m · launch + its time + work of t - l - (N - s)·C tokens / N                           in its micro-step

for the best s. So the room that a long sequence leaves free on its ranks is not counted as if it cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from parallel.schedule.adaptive.cost import Costs, Floats

Bools = NDArray[np.bool_]
_AT_A_TIME = 16  # intervals of T1
_HALVINGS = 6


def lower_bound(costs: Costs, lengths: Sequence[int], counts: Sequence[int]) -> float:
    """Seconds, without those of `Model.once`. lengths: distinct, in tokens; counts: sequences of each."""
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
    unpaid_each = np.where(allowed, plain[None], np.inf).min(1)  # as if computing again cost nothing
    unpaid = unpaid_each @ many / ranks
    density = np.where(np.isfinite(work), work, 0) / tokens
    forced = _cheapest(density, tokens * many, np.array([outside]))[:, 0] / ranks
    again = _Again(costs, tokens, total_tokens)
    longest = _Longest(costs, tokens, many, time, plain, again)
    best, m = math.inf, steps
    ends = np.append(begins[1:], math.inf)
    while True:
        quick = np.maximum(total, begins + forced)
        excess = max(0.0, total_tokens - m * again.plain) / fastest / ranks

        def held(seconds: Floats, excess: float = excess) -> Floats:
            return unpaid + _times(excess, again.beyond(np.minimum(seconds, ends)))

        quick = _settled(held, quick)
        order = np.argsort(quick, kind="stable")
        least_of_all = math.inf
        for at in range(0, len(order), _AT_A_TIME):
            some = order[at : at + _AT_A_TIME]
            if quick[some[0]] >= least_of_all:
                break
            more = longest.seconds(
                m, quick[some], ends[some], allowed[some], work[some], unpaid_each[some], density[some]
            )
            least_of_all = min(least_of_all, float(more.min()))
        best, settled = min(best, least_of_all + m * model.launch), total_tokens <= (m - 1) * again.plain
        m += 1
        if settled or float(np.maximum(total, begins + forced).min()) + m * model.launch >= best:
            return best


def _plain(costs: Costs, tokens: Floats, speed: float) -> Floats:
    """[sizes, sequences], seconds with nothing computed again, whether it fits or not."""
    computing = costs.computing(tokens).sum(0) / speed
    return np.stack([computing / size + costs.sending(size).sum() * tokens for size in costs.sizes])


def _cheapest(density: Floats, held: Floats, some: Floats) -> Floats:
    """Rank-seconds [intervals, G] of `some` [G] of the `held` tokens [K], those of least `density` [intervals, K]."""
    order = np.argsort(density, axis=1)
    own, price = held[order], np.take_along_axis(density, order, 1)
    before = np.cumsum(own, axis=1) - own
    return np.stack([(np.clip(tokens - before, 0, own) * price).sum(1) for tokens in some], axis=1)


class _Again:
    """The seconds of one rank of speed 1 that computing again takes at least. plain, most: tokens of all ranks with
    nothing computed again, and with all. each, token: seconds for each sequence, and for a token."""

    def __init__(self, costs: Costs, tokens: Floats, total: float):
        most = costs.rank_tokens.max(axis=0)
        self.total, self.plain, self.most = total, float(costs.rank_tokens[0].sum()), float(most.sum())
        self._ratio = float((costs.rank_tokens[0] / most).min())
        without = costs.computing(tokens).sum(0)
        dearer = [costs.computing(tokens, c).sum(0) - without for c in range(1, len(costs.names))]
        self.each = np.min(dearer, axis=0) if dearer else np.full(len(tokens), np.inf)  # of every sequence
        self.token = max(0.0, float((self.each / tokens).min()))
        self.able = self._ratio < 1
        again = [costs.computing(tokens, c).sum(0) for c in range(1, len(costs.names))]
        fewest = float((np.min(again, axis=0) / tokens).min()) / float(costs.speeds.max()) if again else 0.0
        self._fills = float(costs.rank_tokens[0].min()) * fewest  # seconds of as many tokens as fit without

    def beyond(self, longest: Floats) -> Floats:
        """Seconds for a token that ranks cannot hold otherwise, in micro-steps of at most so long; infinite where
        nothing can be computed again."""
        ratio = np.maximum(self._ratio, self._fills / longest)
        with np.errstate(divide="ignore"):
            return np.where(ratio < 1, self.token / np.maximum(1 - ratio, 0.0), np.inf)


class _Longest:
    """The group of the longest sequence: see above. time, plain: seconds, and rank-seconds with nothing computed again,
    [sizes, sequences]."""

    def __init__(self, costs: Costs, tokens: Floats, many: Floats, time: Floats, plain: Floats, again: _Again):
        self.costs, self.tokens, self.time, self.plain, self.again = costs, tokens, time, plain, again
        self.ranks, self.fastest = costs.cluster.ranks, float(costs.speeds.max())
        self.k = int(tokens.argmax())
        self.others = many - (np.arange(len(tokens)) == self.k)
        self.left = float(tokens @ self.others)
        self.sizes = np.array(costs.sizes)
        self.fixed = np.array([costs.fixed(size).sum() for size in costs.sizes])
        both = (costs.rank_tokens[0], costs.rank_tokens.max(axis=0))
        # Tokens that the group may hold beside it, and that all other ranks of a micro-step may hold
        self.beside = [room.max() * self.sizes - tokens[self.k] for room in both]
        self.elsewhere = [room.sum() - np.cumsum(np.sort(room))[self.sizes - 1] for room in both]

    def seconds(
        self, m: int, low: Floats, ends: Floats, allowed: Bools, work: Floats, unpaid: Floats, density: Floats
    ) -> Floats:
        """At least, without launches, for each of some intervals of T1: [intervals], of m micro-steps.

        low: a bound that is known; ends: of the intervals. allowed [intervals, sizes, K]; work, unpaid, density
        [intervals, K] as in `lower_bound`.
        """
        able = allowed[:, :, self.k]
        work_of_all = self.plain[:, self.k] + self.fixed * self.sizes + (unpaid @ self.others)[:, None]
        dearer = self._least(self.plain, unpaid, allowed)
        outside = np.maximum(0.0, self.left - self.elsewhere[1])
        rest = _cheapest(density, self.tokens * self.others, outside) / self.ranks
        must = np.maximum(0.0, self.left - self.elsewhere[1] - (m - 1) * self.again.most)
        slower = self._least(self.time - self.fixed[:, None], work / self.ranks, allowed)
        own = self.time[:, self.k] + rest + _extra(slower, np.array(math.inf), must, self.beside[1])
        known = np.maximum(low[:, None], own)

        def held(seconds: Floats) -> Floats:
            return (work_of_all + self._held(m, dearer, np.minimum(seconds, ends[:, None]))) / self.ranks

        return np.where(able, _settled(held, known), np.inf).min(1)

    def _held(self, m: int, dearer: Floats, longest: Floats) -> Floats:
        """Rank-seconds beyond the least work that holding all tokens takes: in that group, or computed again."""
        again, need = self.again, np.maximum(0.0, self.left - self.elsewhere[0] - (m - 1) * self.again.plain)
        beyond = again.beyond(longest) / self.fastest
        plain = _extra(dearer, beyond, need, self.beside[0])
        if not again.able:
            return plain
        own = again.each[self.k] / self.fastest
        return np.minimum(plain, own + _extra(dearer + again.token / self.fastest, beyond, need, self.beside[1]))

    def _least(self, here: Floats, elsewhere: Floats, allowed: Bools) -> Floats:
        """The least that a token of another sequence costs more here: [intervals, sizes]; infinite where none may."""
        more = np.where(np.isfinite(here), here, 0.0)[None] - elsewhere[:, None]
        may = allowed & (self.others > 0)
        return np.where(may, np.maximum(0.0, more) / self.tokens, np.inf).min(2)


def _settled(asked: Callable[[Floats], Floats], low: Floats) -> Floats:
    """The least seconds, at least `low`, that are no less than what is `asked` of them, or a little below: the more
    there are, the less is asked."""
    low = np.where(np.isinf(asked(np.full_like(low, math.inf))), math.inf, low)
    high = np.maximum(low, np.minimum(asked(low), 2 * low))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        less = middle < asked(middle)
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return low


def _times(number: Floats | float, price: Floats) -> Floats:
    """Nothing of what has no price costs nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(np.asarray(number) > 0, number * price, 0.0)


def _extra(inside: Floats, beyond: Floats, need: Floats, room: Floats) -> Floats:
    """The least cost of `need` tokens, of which a group holds at most `room` at the price `inside`, and others cost
    `beyond` each; infinite where the group has not even room for its longest."""
    held = np.minimum(need, np.maximum(room, 0.0))
    some = _times(held, inside) + _times(need - held, beyond)
    return np.where(room < 0, np.inf, np.minimum(some, _times(need, beyond)))
