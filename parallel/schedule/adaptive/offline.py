"""A tighter bound than `bound.py`'s, by integer programmes: seconds a batch, for tables and not for planning.

The time T1 of the longest micro-step lies in one of some intervals [low, high). In each, sequences are shared out to
micro-steps and sizes of group in fractions, and groups of each size are counted in whole numbers n:

    sum over sizes of size · n <= N                 ranks of a micro-step
    room · n >= tokens, high · n >= seconds         what n groups hold, and do before T1
    n >= sequences that take more than half of high no two of them share a group
    N · T_m >= rank-seconds, T_m <= T_1 < high      all ranks work all the time

Every plan satisfies these, so the least sum of T_m over all intervals and numbers of micro-steps is below every plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from parallel.schedule.adaptive.bound import lower_bound
from parallel.schedule.adaptive.cost import Costs


def integer_bound(
    costs: Costs,
    lengths: Sequence[int],
    counts: Sequence[int],
    best: float,
    *,
    cells: int = 12,
    time_limit: float = 5.0,
) -> float:
    """Seconds, at most `best`, those of a plan that is known. Raises ImportError without highspy.

    lengths: distinct, counts: sequences of each. cells: intervals of T1. time_limit: seconds for each programme.
    """
    launch, once = costs.model.launch, costs.model.once
    best -= once
    quick = lower_bound(costs, lengths, counts)
    room = float(costs.rank_tokens.max(axis=0).sum())
    fewest = max(1, math.ceil(float(np.dot(lengths, counts)) / room - 1e-9))
    bound, m = best, fewest
    while quick + (m - fewest) * launch < bound:
        for low, high in _cells(costs, lengths, best - m * launch, cells):
            bound = min(bound, _programme(costs, lengths, counts, m, low, high, time_limit) + m * launch)
        m += 1
    return max(bound, quick) + once


def _cells(costs: Costs, lengths: Sequence[int], high: float, cells: int) -> list[tuple[float, float]]:
    """Cuts the range from the least that the longest sequence takes to `high` evenly and where it may use smaller
    groups."""
    tokens = np.array([max(lengths)], dtype=np.float64)
    own = [
        float(costs.computing(tokens, c).sum() / s / costs.speeds.max() + costs.sending(s).sum() * tokens[0])
        + float(costs.fixed(s).sum())
        for s in costs.sizes
        for c in range(len(costs.names))
        if tokens[0] <= costs.rank_tokens[c].max() * s
    ]
    low = min(own)
    if low >= high:
        return [(low, max(high, low) * (1 + 1e-9))]
    edges = sorted({*np.linspace(low, high, cells + 1).tolist(), *(t for t in own if low < t < high)})
    return list(zip(edges, edges[1:], strict=False))


def _programme(
    costs: Costs, lengths: Sequence[int], counts: Sequence[int], m: int, low: float, high: float, time_limit: float
) -> float:
    """The least sum of T_m; infinite where nothing fits."""
    import highspy

    ranks, K, choices = costs.cluster.ranks, len(lengths), range(len(costs.names))
    tokens = np.array(lengths, dtype=np.float64)
    kinds = [(size, choice) for size in costs.sizes for choice in choices]
    S = len(kinds)
    time_SK = np.stack(
        [costs.computing(tokens, c).sum(0) / s / costs.speeds.max() + costs.sending(s).sum() * tokens for s, c in kinds]
    )
    fixed_S = np.array([costs.fixed(size).sum() for size, _ in kinds])
    room_S = np.array([costs.rank_tokens[choice].max() * size for size, choice in kinds])
    fits_SK = (time_SK + fixed_S[:, None] <= high) & (tokens <= room_S[:, None])
    x = np.arange(m * S * K).reshape(m, S, K)
    n = m * S * K + np.arange(m * S).reshape(m, S)
    T = m * S * (K + 1) + np.arange(m)
    columns = m * S * (K + 1) + m
    upper = np.concatenate(
        [
            np.where(np.tile(fits_SK.ravel(), m), np.tile(np.asarray(counts, dtype=np.float64), m * S), 0.0),
            np.tile([ranks // size for size, _ in kinds], m).astype(np.float64),
            np.full(m, high),
        ]
    )
    lower = np.zeros(columns)
    lower[T[0]] = low
    inf = highspy.kHighsInf
    rows: list[tuple[float, float, list[int], list[float]]] = []
    for k in range(K):
        rows.append((counts[k], counts[k], x[:, :, k].ravel().tolist(), [1.0] * (m * S)))
    for i in range(m):
        sizes = [float(size) for size, _ in kinds]
        rows.append((-inf, ranks, n[i].tolist(), sizes))
        work = [w * float(t) for w, row in zip(sizes, time_SK, strict=True) for t in row]
        launches = [w * float(f) for w, f in zip(sizes, fixed_S, strict=True)]
        rows.append((-inf, 0, [*x[i].ravel().tolist(), *n[i].tolist(), T[i]], [*work, *launches, -float(ranks)]))
        if i:
            rows.append((0, inf, [T[i - 1], T[i]], [1.0, -1.0]))
        for s in range(S):
            own = x[i, s].tolist()
            rows.append((-inf, 0, [*own, n[i, s]], [*tokens.tolist(), -room_S[s]]))
            rows.append((-inf, 0, [*own, n[i, s]], [*time_SK[s].tolist(), fixed_S[s] - high]))
            alone = (2 * time_SK[s] + fixed_S[s] > high) | (2 * tokens > room_S[s])
            if alone.any():
                rows.append((-inf, 0, [*x[i, s][alone].tolist(), n[i, s]], [1.0] * int(alone.sum()) + [-1.0]))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, len(rows)
    lp.col_cost_ = np.concatenate([np.zeros(columns - m), np.ones(m)])
    lp.col_lower_, lp.col_upper_ = lower, upper
    lp.row_lower_ = np.array([row[0] for row in rows], dtype=np.float64)
    lp.row_upper_ = np.array([row[1] for row in rows], dtype=np.float64)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum([len(row[2]) for row in rows])]).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate([row[2] for row in rows]).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate([row[3] for row in rows]).astype(np.float64)
    whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    long = (np.array(counts) == 1) & (tokens > 2 * costs.rank_tokens.max())  # few and long: they decide
    lp.integrality_ = [whole if one else real for one in np.tile(long, m * S)] + [whole] * (m * S) + [real] * m
    solver = highspy.Highs()
    for key, value in (("output_flag", False), ("threads", 1), ("time_limit", time_limit), ("mip_rel_gap", 1e-3)):
        solver.setOptionValue(key, value)
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return math.inf
    return max(float(solver.getInfo().mip_dual_bound), low)
