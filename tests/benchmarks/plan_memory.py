"""The peak of a rank's tensors in a step of training: foretold from shapes, and counted in a real run.

    python -m tests.benchmarks.plan_memory [first [count]]

Each configuration is trained for two steps by gloo ranks on this machine, all in one as a run has it: engine, executor,
clipping, optimizer. A counter of our own, which has nothing in common with what foretells, holds every storage that an
operator makes, through FSDP's resizing of storages too. `foretold`: `train.rank_memory`. None of these configurations
was used to make it: it has no constant to fit. What is found goes to docs/planning.md.
"""

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
            if isinstance(x, Tensor) and x.device.type != "meta":
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


class Counted(NamedTuple):
    """Bytes of a rank: when the model and its optimizer are built, and the most in the second step."""

    built: int
    most: int


def counted(job: dict[str, Any], steps: int = 2) -> Counted:
    """On each rank of a world."""
    from train.build import build

    tensors, honest = Tensors(), torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        out = honest(storage, size)
        if storage._cdata in tensors.sizes:
            tensors.hold(storage)
        return out

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]  # this process is the benchmark's own
    try:
        with tensors:
            trainer = build(job)
            built = tensors.now
            for _ in range(steps):
                tensors.most = tensors.now
                trainer.step()
    finally:
        torch.UntypedStorage.resize_ = honest  # type: ignore[method-assign]
    return Counted(built, tensors.most)


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


BASE = ["train.mfu=false", "train.steps=2", "data.max_length=512", "train.batch_tokens=2048", "precision=fp32"]
BASE += ["model.dim=128", "model.layers=4"]
MOE = ["model=linear_moe_tiny", "model.blocks.gla.mixer.heads=4", "model.blocks.gla.ffn.hidden=64"]
MOE += ["model.blocks.gla.ffn.shared_hidden=64"]
LLAMA = ["model=llama_tiny", "model.blocks.block.ffn.hidden=256"]
CASES: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, [*MOE]),
    "one rank, full recomputation": (1, [*MOE, "engine.recompute=full"]),
    "data 2": (2, [*MOE, "parallel.data=2"]),
}


class Row(NamedTuple):
    name: str
    told: float
    found: int
    parts: dict[str, float]

    @property
    def off(self) -> float:
        return self.told / self.found - 1


def row(name: str, folder: Path) -> Row:
    from tests.world import run_world

    workers, more = CASES[name]
    where = folder / name.replace(" ", "-").replace(",", "")
    where.mkdir(parents=True, exist_ok=True)
    job = job_of(folder, where, workers, more)
    told = foretold(job, workers)
    found = run_world(workers, counted, job, timeout=600)
    return Row(name, sum(told.values()), max(each.most for each in found), told)


def job_of(folder: Path, run_dir: Path, workers: int, more: list[str]) -> dict[str, Any]:
    from launch.config.compose import composed
    from tests.jobs import corpus

    own = ["data=text", f"data.path={corpus(folder / 'corpus', 200)}", f"data.store={folder / 'store'}"]
    own += ["cluster=none", f"cluster.workers={workers}", "cluster.threads=1", "tracking.mode=disabled"]
    own += ["train.evaluate_every=null", "train.checkpoint_every=null", "data.heldout=0.2", "data.heldout_tokens=192"]
    model = [m for m in more if m.startswith("model=")]
    rest = [m for m in more if not m.startswith("model=")]
    return {"config": composed([*model, *own, *BASE, *rest]), "run_dir": str(run_dir), "device": "cpu"}


def main(first: int = 0, count: int | None = None) -> None:
    names = list(CASES)[first : None if count is None else first + count]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            one = row(name, Path(folder))
            parts = ", ".join(f"{key} {size / 1e6:.2f}" for key, size in one.parts.items())
            print(
                f"{one.name:<40} {one.told / 1e6:8.2f} {one.found / 1e6:8.2f} MB {one.off:+.1%}  ({parts})", flush=True
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
