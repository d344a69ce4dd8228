"""Memory of a training step at 16,384 tokens in one sequence: what chunks, tiles and recomputation save.

    python -m tests.benchmarks.memory [tokens]

The model is that of conf/model/linear_moe_tiny.yaml, on one device in fp32; the step a forward and a backward pass,
each choice in a fresh process. `saved`: bytes of tensors alive when the forward pass ends. `most`: the most alive at a
time. Both count what the step makes, gradients included, not the weights. `VmHWM`: how far the peak of the process's
resident memory rises in the step, the counter being off. Then the loss alone, with a vocabulary of 32,768. What is
found goes to docs/speed.md.
"""

import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.benchmarks import section

TOKENS, CHUNK, TILE, VOCABULARY, AIM = 16_384, 1024, 512, 32_768, 0.4
CHOICES: dict[str, dict[str, Any]] = {
    "all kept": {},
    "chunks, selective": {"chunk": CHUNK, "recompute": "selective"},
    "chunks, full": {"chunk": CHUNK, "recompute": "full"},
    "chunks, tiles, full": {"chunk": CHUNK, "tile": TILE, "recompute": "full"},
}


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while it is entered, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Measured(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    saved: int  # bytes
    most: int  # bytes


def step(model: Any, tokens: int, *, chunk: int | None = None, tile: int | None = None, recompute: str = "none") -> Any:
    """The loss of one sequence of two documents, its graph attached, all as `train.engines.fsdp` would choose it.

    chunk: None for the plain way, which makes all logits and then their cross-entropy.
    """
    from models.sequence import Whole
    from parallel import activation_memory
    from train.loss import sums

    model.loss_chunk = chunk
    if tile is not None:
        activation_memory.tile(model, tile)
    activation_memory.recompute(model.layers, recompute)
    ids = torch.randint(0, len(model.embedding), (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    seq = Whole.of((torch.arange(tokens) % (tokens // 2)).unsqueeze(0))
    output = model(ids[:, :-1], seq, *([] if chunk is None else [ids[:, 1:]]))
    return sums(output, ids[:, 1:]).objective(targets=tokens, tokens=tokens, balance_weight=0.01)


def measure(model: Any, tokens: int, **choice: Any) -> Measured:
    from parallel.parallelize import parameter_name

    with Held() as held:
        loss = step(model, tokens, **choice)
        saved = held.now
        loss.backward()
    gradients = {parameter_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Measured(loss.item(), gradients, saved, held.most)


def resident_peak() -> int:
    """VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def default_model() -> Any:
    from launch.config.compose import composed
    from models.axes import initialise

    return initialise(composed([]).model.build(), 0)


def counted(tokens: int, choice: dict[str, Any]) -> tuple[float, int, int]:
    """Loss, bytes saved, most bytes."""
    torch.set_num_threads(1)
    got = measure(default_model(), tokens, **choice)
    return got.loss, got.saved, got.most


def resident(tokens: int, choice: dict[str, Any]) -> tuple[int, float]:
    """By how many bytes the peak rises in the step, and its processor time in seconds."""
    torch.set_num_threads(1)
    model = default_model()
    step(model, 512).backward()  # so that code and pools of threads are there
    before, began = resident_peak(), time.process_time()
    step(model, tokens, **choice).backward()
    return resident_peak() - before, time.process_time() - began


def loss_alone(tokens: int, chunk: int | None) -> int:
    """Most bytes of the head's loss and gradients, its inputs not counted."""
    from models.kernels.cross_entropy import cross_entropy

    torch.set_num_threads(1)
    x = torch.randn(tokens, 256, requires_grad=True)
    weight = torch.randn(VOCABULARY, 256, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (tokens,))
    with Held() as held:
        if chunk is None:
            loss = F.cross_entropy(x @ weight.T, targets, reduction="sum")
        else:
            loss = cross_entropy(x, weight, targets, chunk=chunk)
        loss.backward()
    return held.most


def fresh(function: Any, *args: Any) -> Any:
    """function(*args) in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
        return one.submit(function, *args).result()


class Row(NamedTuple):
    """Of one choice. Bytes as in the module's text; seconds: processor time of the step, nothing counted."""

    loss: float
    saved: int
    most: int
    risen: int
    seconds: float


def row(tokens: int, choice: dict[str, Any]) -> Row:
    return Row(*fresh(counted, tokens, choice), *fresh(resident, tokens, choice))


def report(tokens: int, rows: dict[str, Row], alone: tuple[int, int]) -> str:
    """The section of docs/speed.md. alone: most bytes of the loss, all logits at once and in chunks."""
    first, last = rows["all kept"], rows["chunks, tiles, full"]
    lines = [
        f"`python -m tests.benchmarks.memory`: forward and backward of one sequence of {tokens:,} tokens in two "
        "documents, the model of `conf/model/linear_moe_tiny.yaml`, fp32, one thread. Chunks of "
        f"{CHUNK:,} tokens for the loss, tiles of {TILE}. Saved: bytes alive when the forward pass ends. Most: the "
        "most alive at a time, gradients included, weights not. Resident: rise of the peak (VmHWM) of a fresh process. "
        "Time: of the processor.",
        "",
        "| | saved, MiB | most, MiB | resident, MiB | s | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in rows.items():
        sizes = " | ".join(f"{x / 2**20:,.0f}" for x in (each.saved, each.most, each.risen))
        lines.append(f"| {name} | {sizes} | {each.seconds:.1f} | {each.loss:.8f} |")
    ratios = [f"{b / a:.3f}" for a, b in zip(first[1:4], last[1:4], strict=True)]
    plain, chunked = alone
    return "\n".join(
        [
            *lines,
            "",
            f"Chunks, tiles and full recomputation over nothing of the kind (aim, at most {AIM}): saved {ratios[0]}, "
            f"most {ratios[1]}, resident {ratios[2]}. Selective recomputation takes "
            f"{rows['chunks, selective'].seconds / rows['chunks, full'].seconds:.2f} of the time of full.",
            "",
            f"The loss alone, {VOCABULARY:,} words: {plain / 2**20:,.0f} MiB at once, {chunked / 2**20:,.0f} MiB in "
            f"chunks, {chunked / plain:.3f} of it.",
        ]
    )


def main(tokens: int = TOKENS) -> None:
    rows = {name: row(tokens, choice) for name, choice in CHOICES.items()}
    text = report(tokens, rows, tuple(fresh(loss_alone, tokens, chunk) for chunk in (None, CHUNK)))
    print(text)
    if tokens == TOKENS:
        section.write(section.SPEED, "Memory", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
