"""Improvement rounds: one sequence leaves the slowest group of a micro-step, or changes places with one elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing, Share

_GAIN = 1e-6  # of the slowest group's time: less is no gain


def improve(costs: Costs, packing: Packing, lengths: Sequence[int], rounds: int) -> Packing:
    """`rounds` in each micro-step, fewer where none helps. No micro-step takes longer than before."""
    if rounds < 1:
        return packing
    return Packing(tuple(_Groups(costs, shares, lengths).improved(rounds) for shares in packing.micro_steps))


class _Groups:
    """A micro-step's groups as arrays: G groups (idle ranks are groups of one), K distinct lengths."""

    def __init__(self, costs: Costs, shares: tuple[Share, ...], lengths: Sequence[int]):
        occupied = {rank for share in shares for rank in range(share.first, share.first + share.size)}
        idle = [rank for rank in range(costs.cluster.ranks) if rank not in occupied] if 1 in costs.sizes else []
        self.shares = [*shares, *(Share(rank, 1, (), costs.names[0]) for rank in idle)]
        choices = [costs.names.index(share.recompute) for share in self.shares]
        self.lengths = lengths
        values = np.unique([lengths[s] for share in shares for s in share.sequences])
        index = {int(v): k for k, v in enumerate(values)}
        self.values = values.astype(np.float64)
        computing = {choice: costs.computing(self.values, choice).sum(0) for choice in set(choices)}
        sending = {share.size: costs.sending(share.size).sum() for share in self.shares}
        self.seconds_GK = np.stack(
            [
                computing[choice] / share.size / costs.speeds[share.first : share.first + share.size].min()
                + sending[share.size] * self.values
                for share, choice in zip(self.shares, choices, strict=True)
            ]
        )
        self.fixed_G = np.array([costs.fixed(share.size).sum() for share in self.shares])
        self.room_G = np.array(
            [costs.room(choice, share.first, share.size) for share, choice in zip(self.shares, choices, strict=True)]
        )
        self.held_GK = np.zeros((len(self.shares), len(values)), dtype=np.int64)
        for g, share in enumerate(self.shares):
            for s in share.sequences:
                self.held_GK[g, index[int(lengths[s])]] += 1
        self.used_G = self.fixed_G + (self.held_GK * self.seconds_GK).sum(1)
        self.tokens_G = self.held_GK @ self.values

    def improved(self, rounds: int) -> tuple[Share, ...]:
        changed = False
        for _ in range(rounds):
            if not self._round():
                break
            changed = True
        return self._shares() if changed else tuple(share for share in self.shares if share.sequences)

    def _round(self) -> bool:
        """The exchange that leaves the larger of both groups' times smallest; False where none helps."""
        slowest = int(self.used_G.argmax())
        used = self.used_G[slowest]
        own = np.flatnonzero(self.held_GK[slowest])
        others, theirs = np.nonzero(self.held_GK)
        apart = others != slowest
        targets = np.delete(np.arange(len(self.used_G)), slowest)
        # Nothing comes back for a move: that is an exchange for an item of no tokens and no seconds.
        others = np.concatenate([targets, others[apart]])
        back = np.concatenate([np.full(len(targets), -1), theirs[apart]])
        comes = back >= 0
        here_P = np.where(comes, self.seconds_GK[slowest, back], 0)
        there_P = np.where(comes, self.seconds_GK[others, back], 0)
        tokens_P = np.where(comes, self.values[back], 0)
        mine = used - self.seconds_GK[slowest, own][:, None] + here_P
        moved = self.seconds_GK[others][:, own].T
        yours = self.used_G[others] + moved - there_P
        fits = self.tokens_G[others] + self.values[own][:, None] - tokens_P <= self.room_G[others]
        fits &= self.tokens_G[slowest] - self.values[own][:, None] + tokens_P <= self.room_G[slowest]
        after = np.where(fits, np.maximum(mine, yours), np.inf)
        if not after.size or after.min() >= used * (1 - _GAIN):
            return False
        i, p = np.unravel_index(int(after.argmin()), after.shape)
        self._move(int(own[i]), slowest, int(others[p]))
        if back[p] >= 0:
            self._move(int(back[p]), int(others[p]), slowest)
        return True

    def _move(self, k: int, source: int, target: int) -> None:
        for group, sign in ((source, -1), (target, 1)):
            self.held_GK[group, k] += sign
            self.used_G[group] += sign * self.seconds_GK[group, k]
            self.tokens_G[group] += sign * self.values[k]

    def _shares(self) -> tuple[Share, ...]:
        waiting: dict[float, list[int]] = defaultdict(list)
        for s in sorted((s for share in self.shares for s in share.sequences), reverse=True):
            waiting[float(self.lengths[s])].append(s)
        shares = []
        for share, held in zip(self.shares, self.held_GK, strict=True):
            sequences = [waiting[float(self.values[k])].pop() for k in np.flatnonzero(held) for _ in range(held[k])]
            if sequences:
                shares.append(Share(share.first, share.size, tuple(sorted(sequences)), share.recompute))
        return tuple(shares)
