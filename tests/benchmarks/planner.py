"""The adaptive planner beside its rivals on published constants; prints the tables of docs/scheduling.md.

    python -m tests.benchmarks.planner LENGTHS.npy [--batches 40] [--only TABLE ...]

LENGTHS holds document lengths in tokens, one a document, in the order of the corpus.
Times are the model's; planning is wall time on this machine. Rows with megatron-core's own
scheduler appear where that is installed, those of the exact planner where highspy is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from parallel.schedule.adaptive.auto import Auto
from parallel.schedule.adaptive.cost import Cluster, Costs, Model, Wire
from parallel.schedule.adaptive.packing import Packing
from parallel.schedule.adaptive.planner import Planned, Planner
from parallel.schedule.adaptive.profiles import flexsp, flexsp_cluster, hybrid
from parallel.schedule.adaptive.rivals import Balanced, BestFit, LongestFirst, OneSize, WorkByPairs
from parallel.schedule.adaptive.simulate import seconds, timing

Batches = list[list[int]]
YARDSTICK = {"7b 192K": (6838, 5278), "7b 384K": (7044, 5490), "13b 192K": (11266, 9007), "30b 192K": (24677, 20385)}
GOALS = {
    "7b 192K": (1.82, 1.40, 1.18),
    "7b 384K": (1.77, 1.38, 1.18),
    "13b 192K": (1.72, 1.38, 1.17),
    "30b 192K": (1.60, 1.32, 1.13),
}
PUBLISHED = {4: 1.285, 8: 1.412, 16: 1.212, 32: 1.375, 64: 1.495}
"""Megatron's dynamic context parallelism over a fixed group of 4, by GPUs (its example's README)."""


def batches_of(lengths: np.ndarray, context_k: int, many: int, size: int = 512) -> Batches:
    """In order, of documents that fit, padded as the authors of 2412.01523 do."""
    fitting = lengths[lengths <= context_k * 1000 - 128].astype(np.int64)
    padded = -(-fitting // 128) * 128
    return [padded[i * size : (i + 1) * size].tolist() for i in range(many)]


def planned(costs: Costs, batches: Batches) -> tuple[list[Planned], list[float]]:
    """Plans, and what each took on a CPU."""
    planner, plans, took = Planner(costs), [], []
    for lengths in batches:
        began = time.process_time()
        plans.append(planner.plan(lengths))
        took.append(time.process_time() - began)
    return plans, took


def ms(costs: Costs, pack: Callable[[Sequence[int]], Packing], batches: Batches) -> np.ndarray:
    return np.array([1e3 * seconds(costs, pack(lengths), lengths) for lengths in batches])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def published(lengths: np.ndarray, many: int) -> Iterator[str]:
    """Softmax models of three sizes."""
    rows = []
    for name in GOALS:
        size, context = name.removesuffix("K").split()
        costs, batches = Costs(flexsp(size, int(context)), flexsp_cluster()), batches_of(lengths, int(context), many)
        plans, took = planned(costs, batches)
        ours = np.array([1e3 * plan.seconds for plan in plans])
        gap = np.array([plan.seconds / plan.bound - 1 for plan in plans])
        uneven = [timing(costs, plan.packing, b).imbalance for plan, b in zip(plans, batches, strict=True)]
        static, best = ms(costs, BestFit(costs, 64).pack, batches), ms(costs, BestFit(costs).pack, batches)
        held = ms(costs, OneSize(costs).pack, batches)
        longest, pairs = ms(costs, LongestFirst(costs).pack, batches), ms(costs, WorkByPairs(costs).pack, batches)
        yard = YARDSTICK[name]
        rows.append(
            [
                name,
                f"{ours.mean():,.0f}",
                f"{static.mean():,.0f} ({static.mean() / ours.mean():.3f}; {yard[0]:,})",
                f"{best.mean():,.0f} ({best.mean() / ours.mean():.3f}; {yard[1]:,}, {yard[1] / ours.mean():.3f})",
                f"{held.mean():,.0f} ({held.mean() / ours.mean():.3f})",
                f"{longest.mean():,.0f} ({longest.mean() / ours.mean():.3f})",
                f"{pairs.mean():,.0f} ({pairs.mean() / ours.mean():.3f})",
                f"{gap.mean():.1%}, {gap.max():.1%}",
                f"{max(uneven):.2f}",
                f"{1e3 * np.mean(took):.0f}, {1e3 * max(took):.0f}",
            ]
        )
    head = "model | ours, ms | all 64 | best fit | one size, ours | longest first | s²/group | over bound | max/mean"
    yield from table([*head.split(" | "), "planning, ms"], rows)
    yield ""
    yield "In brackets: over ours; then the yardstick, measured elsewhere, and its ratio over ours."


def hybrids(lengths: np.ndarray, many: int) -> Iterator[str]:
    """7B with linear layers."""
    batches, rows = batches_of(lengths, 192, many), []
    for name, linear, softmax, states in (
        ("softmax", 0, 1, "scan"),
        ("3 linear : 1 softmax, states by scan", 3, 1, "scan"),
        ("3 linear : 1 softmax, states gathered", 3, 1, "gather"),
        ("linear, states by scan", 1, 0, "scan"),
    ):
        costs = Costs(hybrid(flexsp("7b"), linear, softmax, states=states), flexsp_cluster())
        ours = np.array([1e3 * plan.seconds for plan in planned(costs, batches)[0]])
        rivals = [BestFit(costs, 64), BestFit(costs), OneSize(costs), LongestFirst(costs), WorkByPairs(costs)]
        found = [ms(costs, rival.pack, batches).mean() for rival in rivals]
        rows.append([name, f"{ours.mean():,.0f}", *(f"{f:,.0f} ({f / ours.mean():.3f})" for f in found)])
    yield from table(["model", "ours, ms", "all 64", "best fit", "one size, ours", "longest first", "s²/group"], rows)


def recomputation(lengths: np.ndarray, many: int) -> Iterator[str]:
    """7B, 192K: the feed-forward again, for twice the tokens (assumed)."""
    batches = batches_of(lengths, 192, many)
    plain, choosing = (Costs(flexsp("7b", recompute=again), flexsp_cluster()) for again in (False, True))
    always = Costs(replace(choosing.model, recompute=choosing.model.recompute[1:]), choosing.cluster)
    without, every, chosen = (
        np.array([1e3 * p.seconds for p in planned(costs, batches)[0]]) for costs in (plain, always, choosing)
    )
    rows = [
        [name, f"{of.mean():,.0f}", f"{of.mean() / without.mean() - 1:+.1%}"]
        for name, of in (("never", without), ("always", every), ("where it pays, group by group", chosen))
    ]
    yield from table(["recomputation", "ms", "over never"], rows)


def auto(lengths: np.ndarray, many: int, doubt: float = 0.1) -> Iterator[str]:
    """How often `auto` takes the faster plan, where the true constants are others than it believes."""
    batches, rows = batches_of(lengths, 192, many), []
    for name, linear, softmax in (("softmax", 0, 1), ("3:1", 3, 1), ("7:1", 7, 1), ("linear", 1, 0)):
        model, cluster = hybrid(flexsp("7b"), linear, softmax), flexsp_cluster()
        costs, rng = Costs(model, cluster), np.random.default_rng(0)
        static, right = 0, []
        for batch in batches:
            chosen, packing = Auto(costs).choose(batch)
            static += chosen == "static"
            truth = doubted(model, cluster, rng, doubt)
            both = (Planner(costs).plan(batch).packing, LongestFirst(costs).pack(batch))
            right.append(seconds(truth, packing, batch) <= 1.01 * min(seconds(truth, p, batch) for p in both))
        rows.append([name, f"{static / many:.0%}", f"{np.mean(right):.1%}"])
    yield from table(["layers", "static taken", "right within 1%"], rows)


def doubted(model: Model, cluster: Cluster, rng: np.random.Generator, doubt: float) -> Costs:
    """The same with every constant off by a factor of its own."""

    def off(value: float) -> float:
        return value * float(np.exp(doubt * rng.standard_normal()))

    layers = tuple(replace(layer, pair=off(layer.pair), token=off(layer.token)) for layer in model.layers)
    wires = {size: Wire(off(wire.bandwidth)) for size, wire in cluster.wires.items()}
    return Costs(replace(model, layers=layers, launch=off(model.launch)), replace(cluster, wires=wires))


def dynamic_workload(_: np.ndarray, many: int, a_rank: int = 16) -> Iterator[str]:
    """Megatron's published workload: lognormal lengths of mean 1,024, sigma 1.5, at most 8,192; 2,048 tokens a rank."""
    rows = []
    for ranks, ratio in PUBLISHED.items():
        found = []
        for launch in (True, False):
            model = flexsp("7b")
            model = replace(model, activation_bytes=1.0, state_bytes=0.0, launch=model.launch * launch)
            costs = Costs(model, replace(flexsp_cluster(ranks), memory=2048.0))
            rng = np.random.default_rng(0)
            drawn = rng.lognormal(np.log(1024) - 1.5**2 / 2, 1.5, (many, a_rank * ranks)).clip(128, 8192)
            batches = (-(-drawn.astype(np.int64) // 128) * 128).tolist()
            static = ms(costs, LongestFirst(costs, 4).pack, batches).mean()
            ours = np.mean([1e3 * plan.seconds for plan in planned(costs, batches)[0]])
            found += [static / ms(costs, WorkByPairs(costs).pack, batches).mean(), static / ours]
        rows.append([str(ranks), f"{ratio:.3f}", *(f"{f:.3f}" for f in found)])
    yield from table(["GPUs", "published", "its rule", "ours", "its rule, free launches", "ours, free launches"], rows)


def large(lengths: np.ndarray, many: int) -> Iterator[str]:
    """Planning 8,192 sequences on 1,024 ranks."""
    costs = Costs(flexsp("7b"), flexsp_cluster(1024))
    plans, took = planned(costs, batches_of(lengths, 192, min(many, 20), 8192))
    gap = np.mean([plan.seconds / plan.bound - 1 for plan in plans])
    yield f"{len(plans)} batches: {np.mean(took):.3f} s on average, {max(took):.3f} s at most; {gap:.1%} over the bound"


def exact(lengths: np.ndarray, many: int, limit: float = 10.0) -> Iterator[str]:
    """Where the exact planner closes, and how far the fast one is from it."""
    try:
        from parallel.schedule.adaptive.exact import ExactPlanner
    except ImportError:
        yield "highspy is not installed."
        return
    from parallel.schedule.adaptive.buckets import optimal_buckets, rounded_up

    rows, rng = [], np.random.default_rng(0)
    for ranks in (4, 8, 16):
        model = flexsp("7b")
        costs = Costs(replace(model, state_bytes=model.state_bytes * ranks / 64), flexsp_cluster(ranks))
        fitting = lengths[lengths <= costs.room(0, 0, ranks)]
        for sequences in (16, 30, 60):
            closed, ratios, took = 0, [], []
            for _ in range(max(1, many // 10)):
                drawn = rng.choice(fitting, sequences).tolist()
                began = time.perf_counter()
                found = ExactPlanner(costs, time_limit=limit, gap=2e-3).plan(drawn)
                took.append(time.perf_counter() - began)
                padded = rounded_up(drawn, optimal_buckets(drawn, 16))
                closed += found.closed
                ratios.append(
                    Planner(costs, quantum=1).plan(padded).seconds / (found.seconds if found.closed else found.bound)
                )
            rows.append(
                [
                    f"{ranks}, {sequences}",
                    f"{closed} of {len(took)}",
                    f"{np.mean(ratios):.4f}, {max(ratios):.4f}",
                    f"{np.mean(took):.1f}",
                ]
            )
    yield from table(["ranks, sequences", "closed", "fast over it (or its bound)", "seconds"], rows)


def balanced(lengths: np.ndarray, many: int) -> Iterator[str]:
    """Megatron-core's own scheduler: launches are not comparable, loads are."""
    costs, batches = Costs(flexsp("7b"), flexsp_cluster()), batches_of(lengths, 192, many)
    try:
        rival = Balanced(costs)
    except ImportError:
        yield "megatron-core is not installed."
        return
    rows = []
    for name, pack in (("balanced", rival.pack), ("ours", lambda b: Planner(costs).plan(b).packing)):
        loads = [timing(costs, pack(batch), batch).imbalance for batch in batches]
        rows.append([name, f"{np.mean(loads):.2f}", f"{max(loads):.2f} (batch {int(np.argmax(loads))})"])
    yield from table(["scheduler", "largest over mean load", "at worst"], rows)


def integer(lengths: np.ndarray, many: int) -> Iterator[str]:
    """7B, 192K: over a bound by integer programmes."""
    try:
        import highspy  # noqa: F401
    except ImportError:
        yield "highspy is not installed."
        return
    from parallel.schedule.adaptive.offline import integer_bound

    costs, batches = Costs(flexsp("7b"), flexsp_cluster()), batches_of(lengths, 192, many)
    gaps, began = [], time.perf_counter()
    for plan, batch in zip(planned(costs, batches)[0], batches, strict=True):
        values, counts = np.unique(batch, return_counts=True)
        bound = integer_bound(costs, values[::-1].tolist(), counts[::-1].tolist(), plan.seconds)
        gaps.append(plan.seconds / bound - 1)
    took = (time.perf_counter() - began) / many
    yield f"{np.mean(gaps):.1%} on average, {max(gaps):.1%} at worst; {took:.1f} s a batch"


TABLES = {
    "published": published,
    "hybrids": hybrids,
    "recomputation": recomputation,
    "auto": auto,
    "dynamic-workload": dynamic_workload,
    "large": large,
    "exact": exact,
    "integer": integer,
    "balanced": balanced,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--only", nargs="*", choices=TABLES, default=list(TABLES))
    asked = parser.parse_args()
    lengths = np.load(asked.lengths, allow_pickle=False)
    for name in asked.only:
        print(f"\n## {name}\n{(TABLES[name].__doc__ or '').strip()}\n", flush=True)
        for line in TABLES[name](lengths, asked.batches):
            print(line, flush=True)


if __name__ == "__main__":
    main()
