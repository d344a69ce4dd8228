"""The exact planner: a mixed-integer programme for HiGHS (the extra `planner`), for small batches and offline bounds.

With m micro-steps, groups p of a size and a recompute choice (as many of each as fit the ranks), buckets k of length
b_k that hold n_k sequences, A_mpk of them in group p, and used_mp in {0, 1}:

    min  sum_m T_m + m·launch
    sum_mp A_mpk = n_k                                     every sequence once
    sum_k A_mpk t(b_k, p) + fixed_p used_mp <= T_m         a micro-step is as long as its slowest group
    sum_k A_mpk b_k <= room_p used_mp                      memory
    sum_p size_p used_mp <= N                              ranks; aligned blocks always fit powers of two
    T_m >= T_(m+1), and equal groups by their tokens       plans that differ in names only are tried once

Ranks are alike here. HiGHS starts from the fast plan, so that what it returns is never worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.schedule.adaptive.buckets import optimal_buckets, rounded_up
from parallel.schedule.adaptive.cost import Costs, Floats
from parallel.schedule.adaptive.packing import Packing, Share, place
from parallel.schedule.adaptive.planner import Planner
from parallel.schedule.adaptive.simulate import seconds

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Exact:
    """seconds: of `packing`, lengths as their buckets. bound: below every plan of these buckets. closed: no plan of
    them is better, within HiGHS's gap."""

    packing: Packing
    seconds: float
    bound: float
    closed: bool


class ExactPlanner:
    """buckets: lengths that are told apart. time_limit: seconds for each number of micro-steps. gap: relative, at which
    HiGHS stops. more: micro-steps that are tried beyond the fewest. Raises ImportError without highspy."""

    def __init__(self, costs: Costs, *, buckets: int = 16, time_limit: float = 10.0, gap: float = 1e-4, more: int = 1):
        import highspy  # noqa: F401

        if not costs.alike or costs.model.meets:
            raise ValueError("the exact planner knows ranks that are alike, and no experts over several groups")
        self.costs, self.buckets, self.time_limit, self.gap, self.more = costs, buckets, time_limit, gap, more

    def plan(self, lengths: Sequence[int]) -> Exact:
        """Raises TooLongError for a sequence that fits no group."""
        bounds = optimal_buckets(lengths, self.buckets)
        padded = rounded_up(lengths, bounds)
        fast = Planner(self.costs, quantum=1).plan(padded)
        best, best_seconds, bound = fast.packing, fast.seconds, np.inf
        counts = [padded.count(b) for b in bounds]
        room, once = float(self.costs.rank_tokens.max()) * self.costs.cluster.ranks, self.costs.model.once
        fewest, closed = max(1, -(-int(sum(padded)) // int(room))), True
        for m in range(fewest, fewest + self.more + 1):
            packing, below, done = _Programme(self.costs, bounds, counts, m, best_seconds - once).solve(
                best, padded, self.time_limit, self.gap
            )
            bound, closed = min(bound, below + once), closed and done
            if packing is not None and (new_seconds := seconds(self.costs, packing, padded)) < best_seconds:
                best, best_seconds = packing, new_seconds
        beyond = fast.bound + (self.more + 1) * self.costs.model.launch  # more micro-steps than were tried
        bound = max(fast.bound, min(bound, beyond, best_seconds))
        return Exact(best, best_seconds, bound, closed and bound >= best_seconds * (1 - 2 * self.gap))


class _Programme:
    """One number of micro-steps; columns are A [m, p, k], used [m, p], T [m]."""

    def __init__(self, costs: Costs, bounds: list[int], counts: list[int], m: int, below: float):
        self.costs, self.bounds, self.counts, self.m, self.below = costs, bounds, counts, m, below
        n, tokens = costs.cluster.ranks, np.array(bounds, dtype=np.float64)
        self.kinds: list[tuple[int, int]] = [
            (size, choice) for size in costs.sizes[::-1] for choice in range(len(costs.names)) for _ in range(n // size)
        ]
        self.time_PK = np.stack(
            [
                costs.computing(tokens, c).sum(0) / s / costs.speeds[0] + costs.sending(s).sum() * tokens
                for s, c in self.kinds
            ]
        )
        self.fixed_P = np.array([costs.fixed(s).sum() for s, _ in self.kinds])
        self.room_P = np.array([costs.room(c, 0, s) for s, c in self.kinds])
        self.P, self.K = len(self.kinds), len(bounds)

    def solve(
        self, start: Packing, padded: Sequence[int], time_limit: float, gap: float
    ) -> tuple[Packing | None, float, bool]:
        """A packing (None: none below `below`), a bound on all of m micro-steps, whether they meet."""
        import highspy

        m, P, K = self.m, self.P, self.K
        launch, n = m * self.costs.model.launch, self.costs.cluster.ranks
        a = np.arange(m * P * K).reshape(m, P, K)
        used = m * P * K + np.arange(m * P).reshape(m, P)
        T = m * P * (K + 1) + np.arange(m)
        solver = highspy.Highs()
        for key, value in (
            ("log_to_console", False),
            ("output_flag", False),
            ("threads", 1),
            ("random_seed", 0),
            ("time_limit", float(time_limit)),
            ("mip_rel_gap", gap),
        ):
            solver.setOptionValue(key, value)
        most = np.minimum(self.room_P[:, None] // np.array(self.bounds), self.counts)
        longest = self.below - launch
        most = np.where(self.time_PK + self.fixed_P[:, None] > longest * (1 + 1e-9), 0, most)
        columns = m * P * (K + 1) + m
        upper = np.concatenate([np.tile(most.ravel(), m), np.ones(m * P), np.full(m, max(longest, 0.0))])
        cost = np.concatenate([np.zeros(m * P * (K + 1)), np.ones(m)])
        rows: list[tuple[float, float, list[int], list[float]]] = []
        inf = highspy.kHighsInf
        for k in range(K):
            rows.append((self.counts[k], self.counts[k], a[:, :, k].ravel().tolist(), [1.0] * (m * P)))
        for i in range(m):
            for p in range(P):
                own = a[i, p].tolist()
                rows.append((-inf, 0, [*own, used[i, p], T[i]], [*self.time_PK[p], self.fixed_P[p], -1.0]))
                rows.append((-inf, 0, [*own, used[i, p]], [*map(float, self.bounds), -self.room_P[p]]))
                if p + 1 < P and self.kinds[p] == self.kinds[p + 1]:
                    after = a[i, p + 1].tolist()
                    held = [float(b) for b in self.bounds]
                    rows.append((0, inf, [*own, *after], [*held, *(-b for b in held)]))
                    rows.append((0, inf, [used[i, p], used[i, p + 1]], [1.0, -1.0]))
            rows.append((-inf, n, used[i].tolist(), [float(size) for size, _ in self.kinds]))
            if i + 1 < m:
                rows.append((0, inf, [T[i], T[i + 1]], [1.0, -1.0]))
            work = [size for size, _ in self.kinds]  # rank-seconds of a micro-step: a cut that tightens the relaxation
            shares = [float(t * w) for t_K, w in zip(self.time_PK, work, strict=True) for t in t_K]
            fixed = [float(f * w) for f, w in zip(self.fixed_P, work, strict=True)]
            rows.append((-inf, 0, [*a[i].ravel().tolist(), *used[i].tolist(), T[i]], [*shares, *fixed, -float(n)]))
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = columns, len(rows)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(columns), upper
        lp.row_lower_ = np.array([row[0] for row in rows], dtype=np.float64)
        lp.row_upper_ = np.array([row[1] for row in rows], dtype=np.float64)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum([len(row[2]) for row in rows])]).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate([row[2] for row in rows]).astype(np.int32)
        lp.a_matrix_.value_ = np.concatenate([row[3] for row in rows]).astype(np.float64)
        whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
        lp.integrality_ = [whole] * (m * P * (K + 1)) + [real] * m
        solver.passModel(lp)
        if len(start.micro_steps) == m:
            given = highspy.HighsSolution()
            given.col_value = self._columns(start, padded, a, used, T, columns).tolist()
            solver.setSolution(given)
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None, np.inf, True
        bound, done = info.mip_dual_bound + launch, status == highspy.HighsModelStatus.kOptimal
        if info.primal_solution_status != 2:  # none was found in time
            return None, bound, done
        values = np.array(solver.getSolution().col_value)
        return self._packing(np.rint(values[a]).astype(np.int64), padded), bound, done

    def _columns(self, start: Packing, padded: Sequence[int], a: Ints, used: Ints, T: Ints, columns: int) -> Floats:
        """The start as columns: groups of a kind by their tokens, micro-steps by their time."""
        values = np.zeros(columns)
        index = {b: k for k, b in enumerate(self.bounds)}
        timed = []
        for shares in start.micro_steps:
            held = [[padded[s] for s in share.sequences] for share in shares]
            time = [
                self.costs.group(h, 0, s.size, self.costs.names.index(s.recompute)).sum()
                for s, h in zip(shares, held, strict=True)
            ]
            timed.append((max(time), shares))
        for i, (seconds_, shares) in enumerate(sorted(timed, key=lambda pair: -pair[0])):
            values[T[i]] = seconds_
            free = dict.fromkeys(range(self.P))
            for share in sorted(shares, key=lambda share: -sum(padded[s] for s in share.sequences)):
                kind = (share.size, self.costs.names.index(share.recompute))
                p = next(p for p in free if self.kinds[p] == kind)
                del free[p]
                values[used[i, p]] = 1
                for s in share.sequences:
                    values[a[i, p, index[padded[s]]]] += 1
        return values

    def _packing(self, held: np.ndarray, padded: Sequence[int]) -> Packing:
        waiting = {b: [s for s, n in enumerate(padded) if n == b][::-1] for b in self.bounds}
        micro_steps = []
        for groups in held:
            own = [
                (
                    size,
                    tuple(sorted(waiting[b].pop() for b, n in zip(self.bounds, row, strict=True) for _ in range(n))),
                    choice,
                )
                for (size, choice), row in zip(self.kinds, groups, strict=True)
                if row.any()
            ]
            own.sort(key=lambda group: -group[0])
            firsts = place([size for size, _, _ in own], self.costs.speeds.tolist())
            micro_steps.append(
                tuple(Share(f, size, s, self.costs.names[c]) for f, (size, s, c) in zip(firsts, own, strict=True))
            )
        return Packing(tuple(shares for shares in micro_steps if shares))
