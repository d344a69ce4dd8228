"""What a scan costs next to its own mixer's projections, and next to causal softmax attention, by length.

    python -m tests.benchmarks.mixers [longest]

Forward and backward on one thread of a CPU, in processor time, medians; only ratios mean anything on another machine.
Width 256, 4 heads, each mixer's default expansion of keys and values, as in conf/model/linear_moe_tiny.yaml. Writes its
section of docs/speed.md and docs/images/mixer_cost.png.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.recurrence import Dense, Diagonal, Recurrence, Scalar
from tests.benchmarks import section

DIM, HEADS, ATTENTION = 256, 4, "softmax attention"
LENGTHS = (1024, 4096, 16384, 65536)

# Recurrence, width of the keys in multiples of DIM, and how many times its projections a scan may cost.
SCANS: dict[str, tuple[Recurrence, float, float]] = {
    "simple_gla": (Scalar("simple_gla"), 0.5, 2.0),
    "gla": (Diagonal("gla"), 0.5, 2.0),
    "delta_rule": (Dense("delta_rule"), 1.0, 4.0),
    "gated_delta_rule": (Dense("gated_delta_rule"), 1.0, 4.0),
    "kda": (Dense("kda"), 1.0, 4.0),
}


def scan(rule: str, T: int) -> Callable[[], object]:
    """One forward and backward of the scan over two documents."""
    recurrence, expand, _ = SCANS[rule]
    q, k = (F.normalize(torch.randn(1, T, HEADS, int(DIM * expand) // HEADS), dim=-1) for _ in range(2))
    xs = [q, k, torch.randn(1, T, HEADS, DIM // HEADS)]
    if rule != "delta_rule":
        xs.append(-0.1 * torch.rand(k.shape if rule in ("gla", "kda") else k.shape[:-1]))
    if isinstance(recurrence, Dense):
        xs.append(torch.rand(k.shape[:-1]))
    xs = [x.requires_grad_() for x in xs]
    starts, gradient = torch.zeros(1, T, dtype=torch.bool), torch.randn_like(xs[2])
    starts[:, [0, T // 3]] = True
    return lambda: torch.autograd.grad(recurrence.begin(*xs, starts=starts).finish(None), xs, gradient)


def projections(rule: str, T: int) -> Callable[[], object]:
    """Queries, keys and values, low-rank gates, output gate and output of the mixer."""
    keys = int(DIM * SCANS[rule][1])
    widths = [(DIM, 2 * keys + DIM), (DIM, 16), (DIM, DIM), (DIM, DIM)]
    weights = [torch.randn(o, i, requires_grad=True) for i, o in widths]
    x = torch.randn(1, T, DIM, requires_grad=True)
    gradients = [torch.randn(1, T, o) for _, o in widths]
    return lambda: torch.autograd.grad([F.linear(x, w) for w in weights], [x, *weights], gradients)


def attention(T: int) -> Callable[[], object]:
    xs = [torch.randn(1, HEADS, T, DIM // HEADS, requires_grad=True) for _ in range(3)]
    gradient = torch.randn_like(xs[0])

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.scaled_dot_product_attention(*xs, is_causal=True), xs, gradient)

    return run


def seconds(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


def table(costs: dict[str, list[float]], own: dict[str, list[float]], lengths: list[int]) -> str:
    """Markdown: each scan over its projections, its growth from 4k on, and attention over it."""
    lines = ["| rule | bound | " + " | ".join(f"{T // 1024}k" for T in lengths) + " | growth | attention / scan |"]
    lines.append("|---|---|" + "---|" * (len(lengths) + 2))
    for rule, (_, _, bound) in SCANS.items():
        ratios = [f"{a / b:.2f}" for a, b in zip(costs[rule], own[rule], strict=True)]
        softmax = ", ".join(f"{a / b:.1f}" for a, b in zip(costs[ATTENTION], costs[rule], strict=False))
        growth = costs[rule][-1] / costs[rule][min(1, len(lengths) - 1)]
        lines.append(f"| {rule} | {bound:.0f} | {' | '.join(ratios)} | {growth:.2f} | {softmax} |")
    return "\n".join(lines)


def draw(costs: dict[str, list[float]], lengths: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, values in costs.items():
        axes.loglog(lengths[: len(values)], [1e6 * v for v in values], marker="o", label=name)
    axes.set(xlabel="tokens", ylabel="µs a token, forward and backward", xticks=lengths)
    axes.set_xticklabels([f"{T // 1024}k" for T in lengths])
    axes.legend(fontsize=7)
    path = section.SPEED.parent / "images/mixer_cost.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    longest = int(sys.argv[1]) if len(sys.argv) > 1 else LENGTHS[-1]
    lengths = [T for T in LENGTHS if T <= longest]
    rounds = {T: 7 if T < 10_000 else 3 for T in lengths}
    own = {rule: [seconds(projections(rule, T), rounds[T]) / T for T in lengths] for rule in SCANS}
    costs = {rule: [seconds(scan(rule, T), rounds[T]) / T for T in lengths] for rule in SCANS}
    costs[ATTENTION] = [seconds(attention(T), 3) / T for T in lengths if T <= 16384]  # quadratic: minutes beyond
    text = (
        "Forward and backward of each scan over forward and backward of its own mixer's projections, by length: one\n"
        "thread, processor time, medians. `growth` is the cost a token of the longest over that of 4k; the\n"
        "last column is the cost of causal softmax attention, 4 heads of 64, over that of the scan, up to 16k.\n\n"
        f"{table(costs, own, lengths)}\n\n![Cost a token by length](images/mixer_cost.png)\n\n"
        "`python -m tests.benchmarks.mixers` measures it again."
    )
    section.write(section.SPEED, "Mixers", text)
    draw(costs, lengths)
    print(text)


if __name__ == "__main__":
    main()
