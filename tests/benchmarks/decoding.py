"""How fast every mixer writes a token behind 1k to 64k tokens of context, and what it remembers of them.

    python -m tests.benchmarks.decoding [longest [tokens]]

Two layers of one mixer at width 128 with 4 heads and its own defaults, a SwiGLU after each, read a context as
`farspan generate` does, then write `tokens` one at a time; fp32, one thread of a CPU, processor time, medians over the
tokens written. Contexts are read once each, from the longest to the shortest, and written behind in turn: what else the
machine does meets all of them alike. Only ratios mean anything on another machine. Writes its section of
docs/decoding.md and docs/images/decoding.png.
"""

import inspect
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from tests.benchmarks import section
from train.inference.decode import Decoder, Prefilled, Sampling

PAGE = Path(__file__).resolve().parents[2] / "docs/decoding.md"
DIM, HEADS, VOCABULARY = 128, 4, 257
CONTEXTS = (1024, 4096, 16384, 65536)
TOKENS = 64  # written behind each context, in each of ROUNDS
ROUNDS = 5
LIKELIEST = Sampling(temperature=0)


class Rate(NamedTuple):
    """seconds: of processor time for a token. numbers: that the context has left, over all layers."""

    seconds: float
    numbers: int


def build(name: str) -> LM:
    asked = inspect.signature(MIXERS[name]).parameters
    given = {key: value for key, value in {"heads": HEADS, "kv_heads": HEADS // 2}.items() if key in asked}
    block = partial(Block, mixer=partial(MIXERS[name], **given), ffn=partial(SwiGLU, hidden=2 * DIM))
    model = LM(vocabulary=VOCABULARY, dim=DIM, layers=2, pattern=["layer"], blocks={"layer": block})
    return initialise(model, 0)


def context(decoder: Decoder, length: int) -> Prefilled:
    generator = torch.Generator().manual_seed(length)
    return decoder.read(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def written(decoder: Decoder, read: Prefilled, tokens: int) -> list[float]:
    """Processor time of each token but the first, whose logits are there."""
    times = [0.0]

    def take(row: int, token: int) -> bool:
        times.append(time.process_time())
        return True

    decoder.extend([read], tokens + 1, LIKELIEST, take)
    return [b - a for a, b in zip(times[1:], times[2:], strict=False)]


def rates(name: str, contexts: list[int], tokens: int) -> list[Rate]:
    decoder = Decoder(build(name))
    reads = {length: context(decoder, length) for length in reversed(contexts)}
    found: dict[int, list[float]] = {length: [] for length in contexts}
    for _ in range(ROUNDS):
        for length in contexts:
            found[length] += written(decoder, reads[length], tokens)
    return [Rate(statistics.median(found[n]), numbers(reads[n])) for n in contexts]


def numbers(read: Prefilled) -> int:
    return sum(x.numel() for x in tree_leaves(read.entering) if isinstance(x, torch.Tensor))


def table(costs: dict[str, list[Rate]], contexts: list[int]) -> str:
    columns = [f"{T // 1024}k" for T in contexts]
    lines = [f"| mixer | {' | '.join(columns)} | rate, {columns[-1]} over {columns[0]} | numbers held |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for name, found in costs.items():
        shown = [f"{1 / rate.seconds:,.0f}" for rate in found]
        first, last = found[0].numbers, found[-1].numbers
        held = f"{last:,}" if first == last else f"{first:,} to {last:,}"
        lines.append(f"| `{name}` | {' | '.join(shown)} | {found[0].seconds / found[-1].seconds:.2f} | {held} |")
    return "\n".join(lines)


def draw(costs: dict[str, list[Rate]], contexts: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, (name, found) in enumerate(costs.items()):
        grows = found[0].numbers != found[-1].numbers
        axes.loglog(contexts, [1e3 * r.seconds for r in found], "os^D"[i % 4] + ("--" if grows else "-"), label=name)
    axes.set(xlabel="tokens of context", ylabel="ms a token", xticks=contexts)
    axes.set_xticklabels([f"{T // 1024}k" for T in contexts])
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    path = PAGE.parent / "images/decoding.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    longest, tokens = (int(x) for x in (*sys.argv[1:], *(CONTEXTS[-1], TOKENS)[len(sys.argv) - 1 :]))
    contexts = [T for T in CONTEXTS if T <= longest]
    costs = {}
    for name in sorted(MIXERS):
        costs[name] = rates(name, contexts, tokens)
        shown = ", ".join(f"{1e3 * rate.seconds:.2f}" for rate in costs[name])
        print(f"{name}: {shown} ms a token", file=sys.stderr, flush=True)
    text = (
        f"Tokens a second behind a context of so many tokens, read first: two layers at width {DIM} with {HEADS}\n"
        f"heads, fp32, one thread, processor time, medians of {ROUNDS * tokens} tokens. Numbers held: what the\n"
        "context leaves for the next token, over both layers. Broken lines hold more the longer it is.\n\n"
        f"{table(costs, contexts)}\n\n![Milliseconds a token by context](images/decoding.png)\n\n"
        "`python -m tests.benchmarks.decoding` measures it again."
    )
    section.write(PAGE, "Measured", text)
    draw(costs, contexts)
    print(text)


if __name__ == "__main__":
    main()
