"""What every mixer's scan costs next to its own projections, and next to causal softmax attention, by length.

    python -m tests.benchmarks.mixers [longest [seconds]]

Each mixer of the registry is built at width 256 with 4 heads and its own defaults, as in
conf/model/linear_moe_tiny.yaml, and run once over two documents. Then all that it asked of the sequence, its scan, and
all its `Linear` layers are run again alone, with the inputs they had: forward and backward on one thread of a CPU, in
turn, in processor time, medians; only ratios mean anything on another machine. Writes its section of docs/speed.md and
docs/images/mixer_cost.png.
"""

import inspect
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import initialise
from models.linear import Linear
from models.mixers import MIXERS
from models.recurrence import Dense, Diagonal, Identity, Scalar
from models.sequence import Whole
from tests.benchmarks import section

DIM, HEADS, SOFTMAX = 256, 4, "causal SDPA"
LENGTHS = (1024, 4096, 16384, 65536)
LIMIT = 20.0  # seconds of processor time that a mixer may take at one length
AIMS = {Identity: 2.0, Scalar: 2.0, Diagonal: 2.0, Dense: 4.0}  # times its projections that a scan may cost

Run = Callable[[], object]


class Cost(NamedTuple):
    """Seconds of processor time a token, forward and backward."""

    scan: float
    projections: float


@dataclass(kw_only=True)
class Recording(Whole):
    """Keeps what a mixer asks of its sequence, and with what."""

    asked: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = field(default_factory=list)

    def scan(self, recurrence, *xs, slot):
        self.asked.append((lambda *ys: Whole.scan(self, recurrence, *ys, slot=slot), xs))
        return super().scan(recurrence, *xs, slot=slot)

    def attend(self, q, k, v, **options):
        self.asked.append((lambda *ys: Whole.attend(self, *ys, **options), (q, k, v)))
        return super().attend(q, k, v, **options)


def again(f: Callable[..., Tensor], xs: tuple[Tensor, ...], parameters: tuple[Tensor, ...] = ()) -> Run:
    """One forward and backward of f(*xs), by xs and the parameters: those that it depends on."""
    leaves = [x.detach().requires_grad_() for x in xs]
    with torch.no_grad():
        gradient = torch.randn_like(f(*leaves))

    def run() -> object:
        y, by = f(*leaves), [*leaves, *parameters]
        return torch.autograd.grad(y, by, gradient, allow_unused=True) if y.requires_grad else y

    return run


def build(name: str) -> nn.Module:
    given = {"heads": HEADS, "kv_heads": HEADS // 2}
    asked = inspect.signature(MIXERS[name]).parameters
    return initialise(MIXERS[name](dim=DIM, **{k: v for k, v in given.items() if k in asked}), 0)


def parts(mixer: nn.Module, T: int) -> tuple[Run, Run]:
    """Its scan, and all its projections, over T tokens in two documents."""
    inputs: list[tuple[Linear, Tensor]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0])))
        for m in mixer.modules()
        if type(m) is Linear  # a router of memories is one, too
    ]
    positions = torch.cat((torch.arange(T // 3), torch.arange(T - T // 3)))[None]
    seq = Recording.of(positions)
    with torch.no_grad():
        mixer(torch.randn(1, T, DIM), seq, slot="mixer")
    for hook in hooks:
        hook.remove()
    layers = [again(m, (x,), tuple(m.parameters())) for m, x in inputs]
    scans = [again(*asked) for asked in seq.asked]
    assert scans and layers
    return lambda: [scan() for scan in scans], lambda: [layer() for layer in layers]


def softmax(T: int) -> Run:
    """Over one document, by torch."""
    xs = tuple(torch.randn(1, HEADS, T, DIM // HEADS) for _ in range(3))
    return again(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), xs)


def seconds(*runs: Run, rounds: int) -> list[float]:
    """Medians of processor time of each, run in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, found in zip(runs, times, strict=True):
            began = time.process_time()
            run()
            found.append(time.process_time() - began)
    return [statistics.median(found) for found in times]


def measured(cost: Callable[[int, int], Cost], lengths: list[int], limit: float) -> list[Cost]:
    """Of each length, until one would take longer than the limit if its cost went on as it did."""
    costs: list[Cost] = []
    for T in lengths:
        rounds = max(1, min(5, 32768 // T))
        if len(costs) > 1:
            grows = max(1.0, sum(costs[-1]) / sum(costs[-2]))
            if T * sum(costs[-1]) * grows * (rounds + 1) > limit:
                break
        costs.append(cost(T, rounds))
    return costs


def mixer_cost(mixer: nn.Module, T: int, rounds: int) -> Cost:
    runs = parts(mixer, T)
    return Cost(*(s / T for s in seconds(*runs, rounds=rounds)))


def softmax_cost(T: int, rounds: int) -> Cost:
    return Cost(seconds(softmax(T), rounds=rounds)[0] / T, 0.0)


def table(costs: dict[str, list[Cost]], mixers: dict[str, nn.Module], lengths: list[int]) -> str:
    """Markdown: each scan over its projections, its growth from 4k on, and softmax attention over it."""
    columns = [f"{T // 1024}k" for T in lengths]
    lines = [f"| mixer | rule | aim | {' | '.join(columns)} | growth | {SOFTMAX} / scan |"]
    lines.append("|---" * (len(columns) + 5) + "|")
    for name, mixer in mixers.items():
        recurrence, found = getattr(mixer, "recurrence", None), costs[name]
        other = "softmax" if name == "attention" else "several"
        rule, aim = getattr(recurrence, "rule", other), AIMS.get(type(recurrence))
        ratios = [f"{c.scan / c.projections:.2f}" for c in found] + ["–"] * (len(columns) - len(found))
        growth = f"{found[-1].scan / found[1].scan:.2f}" if len(found) > 2 else "–"
        growth += f" (to {columns[len(found) - 1]})" if 2 < len(found) < len(columns) else ""
        beside = ", ".join(f"{s.scan / c.scan:.1f}" for s, c in zip(costs[SOFTMAX], found, strict=False))
        row = [name, rule, f"{aim:.0f}" if aim else "–", *ratios, growth, beside]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(costs: dict[str, list[Cost]], lengths: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, found) in enumerate(costs.items()):
        values = [1e6 * c.scan for c in found]
        axes.loglog(lengths[: len(values)], values, "os^D"[i % 4] + ("--" if name == SOFTMAX else "-"), label=name)
    axes.set(xlabel="tokens", ylabel="µs a token, forward and backward", xticks=lengths)
    axes.set_xticklabels([f"{T // 1024}k" for T in lengths])
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    path = section.SPEED.parent / "images/mixer_cost.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    longest, limit = (float(x) for x in (*sys.argv[1:], *(LENGTHS[-1], LIMIT)[len(sys.argv) - 1 :]))
    lengths = [T for T in LENGTHS if T <= longest]
    mixers = {name: build(name) for name in sorted(MIXERS)}
    costs = {SOFTMAX: measured(softmax_cost, [T for T in lengths if T <= 16384], limit)}
    for name, mixer in mixers.items():
        costs[name] = measured(partial(mixer_cost, mixer), lengths, limit)
        shown = ", ".join(f"{1e6 * c.scan:.1f} over {1e6 * c.projections:.1f}" for c in costs[name])
        print(f"{name}: {shown} µs a token", file=sys.stderr, flush=True)
    report(costs, mixers, lengths, limit)


def report(costs: dict[str, list[Cost]], mixers: dict[str, nn.Module], lengths: list[int], limit: float) -> None:
    text = (
        "Forward and backward of each mixer's scan over forward and backward of its own projections, all the\n"
        f"`Linear` layers it has at width {DIM} with {HEADS} heads, by length: fp32, one thread, processor time, both\n"
        "run in turn on the inputs that they have in the mixer, medians (64k: one round). `growth` is the scan's\n"
        f"cost a token of the longest over that of 4k; the last column is the cost of {SOFTMAX}, {HEADS} heads of\n"
        f"{DIM // HEADS}, over that of the scan, up to 16k. –: no aim, or more than {limit:.0f} s at that length.\n\n"
        f"{table(costs, mixers, lengths)}\n\n![Cost a token by length](images/mixer_cost.png)\n\n"
        "`python -m tests.benchmarks.mixers` measures it again."
    )
    section.write(section.SPEED, "Mixers", text)
    draw(costs, lengths)
    print(text)


if __name__ == "__main__":
    main()
