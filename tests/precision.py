"""The study of recipes: each trains a hybrid of 1M weights for 150 steps, beside fp32 and its seeds.

    python -m tests.precision [steps=150] [tokens=512] [seeds=3]

The model has four layers, GLA, Gated DeltaNet, Mamba-2 and softmax attention, and reads Python's standard library by
bytes, whole files end to end. Seeds differ in first weights alone: all runs see the same tokens in the same order. A
recipe starts from the first seed's weights, so that it parts from that run by rounding and nothing else. The loss is
that of files that no run trains on, after the last step.

Each run's numbers go to docs/precision_study.json as it ends, and a second call does those that are not there. Then the
table goes to docs/precision.md, the picture to docs/images/precision.svg.
"""

import json
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from models import delayed_scaling
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.recipes import BF16_WEIGHTS, RECIPES, LowPrecision, apply, policy
from models.sequence import Whole
from parallel.coded_weights import gather_in_few_bits
from parallel.fsdp import shard
from parallel.shards import local
from tests.benchmarks.section import write
from train.loss import sums
from train.optim.compact_adamw import CompactAdamW

DOCS = Path(__file__).parents[1] / "docs"
RECORD, PICTURE, PAGE, TITLE = (
    DOCS / "precision_study.json",
    DOCS / "images/precision.svg",
    DOCS / "precision.md",
    "Study",
)
DIM, HIDDEN, RATE, WARM, CLIP = 128, 384, 3e-3, 20, 1.0
LAYERS = ("gla", "gated_deltanet", "mamba2", "attention")
HELD_OUT = 16  # sequences
MOMENTS = ("bf16", "int8", "fp8", "int4")
ROUNDED = "bf16 weights, rounded at random"
BITS16 = "bf16 products"
Corpus = list[tuple[Tensor, Tensor]]  # tokens and positions, [1, tokens + 1] each


def corpus(count: int, tokens: int) -> Corpus:
    """Sequences of whole files end to end, in an order of their own; a document is what is left of a file in one."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    texts, positions, needed = bytearray(), [], count * (tokens + 1)
    for file in files:
        if len(texts) >= needed:
            break
        text = file.read_bytes()
        texts += text
        positions += range(len(text))
    rows = torch.tensor(list(texts[:needed])).view(count, 1, -1)
    places = torch.tensor(positions[:needed]).view(count, 1, -1)
    begins = torch.where(places == 0, torch.arange(tokens + 1), 0).cummax(-1).values
    return list(zip(rows, torch.arange(tokens + 1) - begins, strict=True))


def hybrid() -> LM:
    """A model on the CPU, without weights."""
    heads = {"gla": {"heads": 2}, "gated_deltanet": {"heads": 2}, "mamba2": {"heads": 4}, "attention": {"heads": 2}}
    blocks = {
        name: partial(Block, mixer=partial(MIXERS[name], **heads[name]), ffn=partial(SwiGLU, hidden=HIDDEN))
        for name in LAYERS
    }
    return LM(vocabulary=256, dim=DIM, layers=len(LAYERS), pattern=list(LAYERS), blocks=blocks)


def variants(seeds: int) -> Iterator[tuple[str, int]]:
    """Names of runs and their seeds, the dearest to know first."""
    yield "fp32", 0
    yield from ((f"fp32, seed {seed}", seed) for seed in range(1, seeds))
    yield from ((name, 0) for name in RECIPES)
    yield from ((f"moments {name}", 0) for name in MOMENTS)
    yield ROUNDED, 0
    yield BITS16, 0


def prepared(name: str, seed: int) -> tuple[LM, torch.optim.Optimizer]:
    """The model and the optimizer of a variant."""
    model = hybrid()
    initialise(model, seed)
    moments = "fp32"
    if name in RECIPES:
        recipe = RECIPES[name]
        apply(model, policy(model, recipe.tiles), LowPrecision(recipe))
    elif name.startswith("moments "):
        moments = name.removeprefix("moments ")
    elif name == ROUNDED:
        apply(model, policy(model), LowPrecision(BF16_WEIGHTS, masters=True))
        mesh = init_device_mesh("cpu", (1,))  # FSDP keeps such weights, of one rank too
        shard(model, list(model.layers.values()), mesh, reshard_after_forward=False)
        gather_in_few_bits(model, mesh)
        for number, p in enumerate(model.parameters()):
            p.stream = number  # type: ignore[attr-defined]
    elif name == BITS16:
        model.compute = torch.bfloat16
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return model, CompactAdamW(groups, lr=RATE, moments=moments)


def loss_of(model: LM, tokens: Tensor, positions: Tensor) -> Tensor:
    """Nats a token; the last token of a file predicts nothing."""
    targets = tokens[:, 1:].masked_fill(positions[:, 1:] == 0, -100)
    total = sums(model(tokens[:, :-1], Whole.of(positions[:, :-1]), targets)).cross_entropy
    return total / (targets != -100).sum()


def trained(name: str, seed: int, steps: int, train: Corpus, held_out: Corpus) -> dict[str, Any]:
    """Trains one variant. Returns its losses and its seconds of processor time."""
    began = time.process_time()
    if name == ROUNDED:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, optimizer = prepared(name, seed)
    losses = []
    for step, (tokens, positions) in enumerate(train[:steps]):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM, 1.0, max(0.1, (steps - step) / (steps - WARM + 1)))
        loss = loss_of(model, tokens, positions)
        loss.backward()
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{name}: gradient norm {norm.item()} at step {step}")
        torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        if (seen := delayed_scaling.present(model)) is not None:
            delayed_scaling.settle(model, seen)
        losses.append(round(loss.item(), 5))
    with torch.no_grad():
        final = statistics.mean(loss_of(model, *each).item() for each in held_out)
    if name == ROUNDED:
        dist.destroy_process_group()
    return {"held_out": final, "losses": losses, "cpu_seconds": time.process_time() - began}


def study(steps: int, tokens: int, seeds: int, record: Path) -> dict[str, Any]:
    """All runs; those that the record has of the same sizes are not done again."""
    known = json.loads(record.read_text()) if record.exists() else {}
    sizes = {"steps": steps, "tokens": tokens}
    runs: dict[str, Any] = known["runs"] if known.get("sizes") == sizes else {}
    sequences = corpus(steps + HELD_OUT, tokens)
    held_out, train = sequences[:HELD_OUT], sequences[HELD_OUT:]
    for name, seed in variants(seeds):
        if name not in runs:
            runs[name] = trained(name, seed, steps, train, held_out)
            print(f"{name}: {runs[name]['held_out']:.4f}, {runs[name]['cpu_seconds']:.0f} s", flush=True)
            record.write_text(json.dumps({"sizes": sizes, "runs": runs}) + "\n")
    return {"sizes": sizes, "runs": runs}


def band(runs: dict[str, Any]) -> tuple[float, float]:
    """Mean and standard deviation of fp32's held-out loss over its seeds."""
    seeds = [run["held_out"] for name, run in runs.items() if name.partition(",")[0] == "fp32"]
    return statistics.mean(seeds), statistics.stdev(seeds)


def table(found: dict[str, Any]) -> str:
    """Measured table and picture, as a section of docs/precision.md."""
    runs, (mean, spread) = found["runs"], band(found["runs"])
    seeds = sum(name.partition(",")[0] == "fp32" for name in runs)
    weights = sum(p.numel() for p in hybrid().parameters())
    steps, tokens = found["sizes"]["steps"], found["sizes"]["tokens"]
    lines = [
        f"`python -m tests.precision`: a hybrid of {weights:,} weights (GLA, Gated DeltaNet, Mamba-2, attention),",
        f"{steps} steps of {tokens} bytes of Python's standard library, on CPUs, products emulated. fp32 over {seeds}",
        f"seeds: held-out loss {mean:.4f}, standard deviation {spread:.4f}. A recipe starts from the first seed's",
        "weights and sees the same data, so that its distance to that run is rounding's.",
        "",
        "| run | held-out loss | minus fp32, same weights | in standard deviations | last 20 training losses |",
        "|---|---|---|---|---|",
    ]
    same = runs["fp32"]["held_out"]
    for name, run in runs.items():
        apart = run["held_out"] - (mean if name.startswith("fp32") else same)
        shown = "" if name.startswith("fp32") else f"{apart:+.4f}"
        last = statistics.mean(run["losses"][-20:])
        lines.append(f"| {name} | {run['held_out']:.4f} | {shown} | {apart / spread:+.1f} | {last:.4f} |")
    lines += [
        "",
        "Rows of fp32 are held against the mean of the seeds. One run each: what lies within some deviations of",
    ]
    lines += ["another ranks nothing."]
    if missing := [name for name, _ in variants(seeds) if name not in runs]:
        lines += [f"Not run yet: {', '.join(missing)}."]
    lines += ["", "![losses](images/precision.svg)"]
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Held-out losses beside the band, and training losses minus fp32's, smoothed over 10 steps."""
    from matplotlib.figure import Figure

    runs, (mean, spread) = found["runs"], band(found["runs"])
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    ends, ways = figure.subplots(1, 2)
    shown = [name for name in runs if "seed" not in name]
    ends.axvspan(mean - 2 * spread, mean + 2 * spread, color="#cfd8e6", label="fp32, two standard deviations of seeds")
    ends.plot([runs[name]["held_out"] for name in shown], shown, "o", color="#20508a")
    ends.invert_yaxis()
    ends.set_xlabel("held-out loss, nats a byte")
    ends.legend(fontsize=7)
    first = torch.tensor(runs["fp32"]["losses"])
    for name in runs:
        if name != "fp32":
            apart = (torch.tensor(runs[name]["losses"]) - first).unfold(0, min(10, len(first)), 1).mean(-1)
            seed = "seed" in name
            ways.plot(apart, color="#cfd8e6" if seed else None, lw=2 if seed else 1, label=None if seed else name)
    ways.set_xlabel("step")
    ways.set_ylabel("training loss minus fp32's")
    ways.legend(fontsize=6, ncol=2)
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    given = {"steps": 150, "tokens": 512, "seeds": 3}
    given |= {key: int(value) for key, value in (each.split("=") for each in arguments)}
    torch.set_num_threads(1)
    found = study(given["steps"], given["tokens"], given["seeds"], RECORD)
    draw(found, PICTURE)
    write(PAGE, TITLE, table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
