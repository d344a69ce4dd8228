"""The peak of a rank's tensors in a step of training: foretold from shapes, and counted in a real run.

    python -m tests.benchmarks.plan_memory [first [count]]

Each configuration is trained for two steps by gloo ranks on this machine, all in one as a run has it: engine, executor,
clipping, optimizer. A counter of our own, which has nothing in common with what foretells, holds every storage that an
operator makes, through FSDP's resizing of storages too. `foretold`: `train.rank_memory`. None of these configurations
was used to make it: it has no constant to fit. docs/planning.md has the results.
"""

import gc
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.kernels.coded_weight import CodedWeight


class Tensors(TorchDispatchMode):
    """Counts the bytes of all storages that operators make on this device, as long as they live and as they are
    resized."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            x = x._local_tensor if isinstance(x, DTensor) else x
            if isinstance(x, Tensor) and x.device.type != "meta" and not isinstance(x, CodedWeight):  # has no numbers
                self.hold(x.untyped_storage())
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self.free, key)
        self.now += storage.nbytes() - self.sizes[key]
        self.sizes[key] = storage.nbytes()
        self.most = max(self.most, self.now)

    def free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def most_bytes(job: dict[str, Any], steps: int = 2) -> int:
    """The most bytes of this rank's tensors in the last of some steps, by when the optimizer has its state."""
    from train.build import build

    tensors, honest = Tensors(), torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        out = honest(storage, size)
        if storage._cdata in tensors.sizes:
            tensors.hold(storage)
        return out

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
    try:
        with tensors:
            trainer = build(job)
            for _ in range(steps):
                tensors.most = tensors.now
                trainer.step()
    finally:
        torch.UntypedStorage.resize_ = honest  # type: ignore[method-assign]
    return tensors.most


def counted(jobs: list[dict[str, Any]]) -> list[int]:
    """The most bytes of this rank in each job, one after the other in one world."""
    peaks = []
    for job in jobs:
        peaks.append(most_bytes(job))
        gc.collect()
    return peaks


def foretold(job: dict[str, Any], workers: int) -> dict[str, float]:
    """The parts of the fullest rank's peak."""
    from data.batch_ramp import opened
    from train.rank_memory import MemoryModel, layout_of

    config = job["config"]
    mesh = config.parallel.mesh(workers)
    batches = opened(config.data.build(), config.train.batch_tokens, config.curriculum.build())
    lengths = [len(s.tokens) for s in batches.batch(config.seed, 0)]
    data, sequence = mesh.split
    plan = config.scheduler.build().plan(0, lengths, data=data, sequence=sequence)
    memory = MemoryModel(config, "cpu", exact=True)
    return memory.parts(layout_of(config, memory.build(), mesh, plan, "cpu"))


SMALL = ["train.mfu=false", "train.steps=2", "data.max_length=256", "train.batch_tokens=1024", "precision=fp32"]
MOE = ["model=linear_moe_tiny", "model.dim=128", "model.blocks.gla.ffn.hidden=64"]
MOE += ["model.blocks.gla.ffn.shared_hidden=64"]
LLAMA = ["model=llama_tiny", "model.dim=128", "model.layers=4", "model.blocks.attn.ffn.hidden=384"]
MAMBA = ["model=mamba2_tiny", "model.dim=128", "model.layers=4"]
RWKV = ["model=rwkv7_tiny", "model.dim=128", "model.layers=3", "model.blocks.rwkv.ffn.hidden=384"]
TAUGHT = "train.distill.teacher=TEACHER"  # in whose place a folder is made
CODES, MASTERS = ["precision.recipe=int8_weights", "precision.gather=codes"], "precision.masters=bf16"
MICRO, RESHARD, FULL = "scheduler.tokens_per_rank=256", "engine.reshard_after_forward=true", "engine.recompute=full"
CASES: dict[str, tuple[int, list[str]]] = {
    "MoE": (1, MOE),
    "MoE, recompute full": (1, [*MOE, FULL]),
    "MoE, recompute selective, Muon": (1, [*MOE, "engine.recompute=selective", "optimizer=muon"]),
    "Llama, 4 micro-steps": (1, [*LLAMA, MICRO]),
    "Llama, vocabulary 4,096, loss in chunks": (1, [*LLAMA, "model.vocabulary=4096", "train.loss_chunk=128"]),
    "Mamba-2": (1, MAMBA),
    "RWKV-7, recompute full": (1, [*RWKV, FULL]),
    "MoE, data 2": (2, [*MOE, "parallel.data=2"]),
    "MoE, data 2, reshard, recompute full": (2, [*MOE, "parallel.data=2", RESHARD, FULL]),
    "Llama, replicate 2": (2, [*LLAMA, "parallel.replicate=2", "parallel.data=1"]),
    "Llama, data 2, 2 micro-steps": (2, [*LLAMA, "parallel.data=2", MICRO]),
    "MoE, sequence 2": (2, [*MOE, "parallel.sequence=2"]),
    "Llama, sequence 2, ring, selective": (
        2,
        [*LLAMA, "parallel.sequence=2", "parallel.transport.attention=ring", "engine.recompute=selective"],
    ),
    "MoE, tensor 2": (2, [*MOE, "parallel.tensor=2"]),
    "Mamba-2, tensor 2, recompute full": (2, [*MAMBA, "parallel.tensor=2", FULL]),
    "MoE, expert 2": (2, [*MOE, "parallel.expert=2"]),
    "Llama, pipeline 2, 4 micro-steps": (2, [*LLAMA, "parallel.pipeline=2", MICRO]),
    "Llama, pipeline 2, zero bubble": (
        2,
        [*LLAMA, "parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble", MICRO],
    ),
    "MoE, data 2 x tensor 2": (4, [*MOE, "parallel.data=2", "parallel.tensor=2"]),
    "MoE, expert 2 x sequence 2, reshard": (4, [*MOE, "parallel.expert=2", "parallel.sequence=2", RESHARD]),
    "Llama, sequence 2 x tensor 2": (4, [*LLAMA, "parallel.sequence=2", "parallel.tensor=2"]),
    "Llama, weights as codes, data 2": (2, [*LLAMA, *CODES, "parallel.data=2"]),
    "Llama, weights as codes, data 2, 2 micro-steps": (2, [*LLAMA, *CODES, "parallel.data=2", MICRO]),
    "MoE, weights as codes, data 2, reshard": (2, [*MOE, *CODES, "parallel.data=2", RESHARD]),
    "MoE, weights as codes, expert 2": (2, [*MOE, *CODES, "parallel.expert=2"]),
    "Llama, bf16 masters": (1, [*LLAMA, MASTERS]),
    "MoE, bf16 masters, Muon, data 2": (2, [*MOE, MASTERS, "optimizer=muon", "parallel.data=2"]),
    "MoE, bf16 masters, expert 2, reshard": (2, [*MOE, MASTERS, "parallel.expert=2", RESHARD]),
    "Llama, a teacher's logits": (1, [*LLAMA, TAUGHT]),
    "MoE, a larger teacher's logits, loss in chunks, data 2": (2, [*MOE, TAUGHT, "train.loss_chunk=128"]),
    "RWKV-7, data 4, reshard, average": (4, [*RWKV, "parallel.data=4", RESHARD, "train.average=ema"]),
}


class Row(NamedTuple):
    """Returns the foretold parts of one configuration, and the bytes counted on its fullest rank."""

    name: str
    parts: dict[str, float]
    counted: int

    @property
    def foretold(self) -> float:
        return sum(self.parts.values())

    @property
    def off(self) -> float:
        return self.foretold / self.counted - 1


def rows(names: list[str], folder: Path) -> list[Row]:
    """Those of one number of workers share a world."""
    from tests.world import run_world

    jobs = {name: job_of(folder, name) for name in names}
    parts = {name: foretold(jobs[name], CASES[name][0]) for name in names}
    peaks: dict[str, int] = {}
    for workers in sorted({CASES[name][0] for name in names}):
        alike = [name for name in names if CASES[name][0] == workers]
        by_rank = run_world(workers, counted, [jobs[name] for name in alike], timeout=1800)
        peaks |= {name: max(each[i] for each in by_rank) for i, name in enumerate(alike)}
    return [Row(name, parts[name], peaks[name]) for name in names]


def job_of(folder: Path, name: str) -> dict[str, Any]:
    """As the launcher would order it."""
    from launch.config.compose import composed
    from tests.jobs import corpus
    from tests.published_folder import LLAMA as LLAMA_FOLDER
    from tests.published_folder import write

    workers, more = CASES[name]
    run_dir = folder / str(list(CASES).index(name))
    run_dir.mkdir(parents=True, exist_ok=True)
    own = ["data=text", f"data.path={corpus(folder / 'corpus', 200)}", f"data.store={folder / 'store'}"]
    own += ["cluster=none", f"cluster.workers={workers}", "cluster.threads=1", "tracking.mode=disabled"]
    if TAUGHT in more:
        sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
        teacher = folder / "teacher"
        if not teacher.exists():
            write(teacher, LLAMA_FOLDER | sizes)
        more = [each.replace("TEACHER", str(teacher)) for each in more]
    own += ["train.evaluate_every=null", "train.checkpoint_every=null", "data.heldout=0.2", "data.heldout_tokens=192"]
    return {"config": composed([*own, *SMALL, *more]), "run_dir": str(run_dir), "device": "cpu"}


def text(found: list[Row]) -> str:
    lines = ["| configuration | foretold, MB | counted, MB | off |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.foretold / 1e6:.1f} | {r.counted / 1e6:.1f} | {r.off:+.1%} |" for r in found]
    worst = max(found, key=lambda r: abs(r.off))
    return "\n".join([*lines, "", f"Worst: {worst.off:+.1%} ({worst.name}), of {len(found)} configurations."])


def main(first: int = 0, count: int | None = None) -> None:
    names = list(CASES)[first : None if count is None else first + count]
    with tempfile.TemporaryDirectory() as folder:
        every: list[Row] = []
        for workers in sorted({CASES[name][0] for name in names}):
            part = rows([name for name in names if CASES[name][0] == workers], Path(folder))
            for r in part:
                parts = ", ".join(f"{key} {size / 1e6:.2f}" for key, size in r.parts.items())
                print(f"{r.name:<42} {r.foretold / 1e6:8.2f} {r.counted / 1e6:8.2f} {r.off:+7.1%}  {parts}", flush=True)
            every += part
    print(text(every))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
