"""Refusals of what an engine cannot do, each by its key, before a process starts."""

import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from parallel.schedule.mesh import Mesh
from train.engines import ENGINES
from train.run_config import RunConfig

PLAIN = ("FSDP",)  # whose weights, gradients and moments the whole program knows
# The package of each other engine, its module, and farspan's extra for it.
PACKAGES = {
    "DeepSpeed": ("deepspeed", "deepspeed", "deepspeed"),
    "MegatronCore": ("megatron-core", "megatron.core", "megatron"),
}
COMPILERS = ("c++", "g++", "clang++")
COMPILE_S = 3600.0  # no compile of DeepSpeed's CPU Adam lasts longer: two minutes on two idle cores


def plain(config: RunConfig) -> bool:
    """Says whether a run's engine is FSDP."""
    return config.engine.target.rpartition(".")[2] in PLAIN


def name_of(config: RunConfig) -> str:
    """The name of a run's engine, as `engine=` takes it."""
    return next(name for name, kind in ENGINES.items() if kind == config.engine.target.rpartition(".")[2])


def refuse(config: RunConfig, mesh: Mesh, device: str) -> None:
    """Raises ValueError for a run that its engine cannot do: by mesh, optimizer, precision, or for lack of a package.

    device: of the workers, cpu or cuda.
    """
    if plain(config):
        _refuse_compiled(config, mesh, device)
        return
    kind, name = config.engine.target.rpartition(".")[2], name_of(config)
    for problem in _problems(config, mesh, config.engine.get("zero") == 3):
        raise ValueError(f"{problem} with engine={name}")
    if kind == "MegatronCore" and device != "cuda":
        raise ValueError(
            "engine=megatron: needs CUDA, by which Megatron-core makes its buffers, and the workers are on the CPU; "
            "accepts fsdp, deepspeed"
        )
    if config.cluster.kind != "ray":  # whose machines may have what this one has not
        _installed(kind, name, bool(config.engine.get("cpu_adam")))


def _refuse_compiled(config: RunConfig, mesh: Mesh, device: str) -> None:
    """Raises ValueError for what compiled layers do not go with."""
    if (how := config.engine.get("compile", "none")) == "none":
        return
    problem, target = None, config.train.distill.target
    if config.engine.get("cuda_graphs") and device != "cuda":
        raise ValueError("engine.cuda_graphs=true: must be false on a CPU, which has none")
    if mesh.tensor > 1:
        problem = f"parallel.tensor={mesh.tensor}: must be 1"
    elif config.precision.recipe != "none":
        problem = f"precision.recipe={config.precision.recipe}: must be none"
    elif target == "hidden":
        problem = f"train.distill.target={target}: must be another one"
    if problem is not None:
        raise ValueError(f"{problem} with engine.compile={how}")


def _problems(config: RunConfig, mesh: Mesh, cuts_weights: bool) -> Iterator[str]:
    for dimension in ("replicate", "pipeline", "expert", "tensor"):
        if (size := getattr(mesh, dimension)) > 1:
            yield f"parallel.{dimension}={size}: must be 1, for ranks share data and sequences alone"
    if config.parallel.stages > 1 or config.parallel.pipeline_layers is not None:
        yield "parallel.pipeline_layers: must be null, for layers are not cut into stages"
    optimizer, train = config.optimizer, config.train
    if optimizer.target != "train.optim.AdamW":
        yield f"optimizer={optimizer.target.rpartition('.')[2].lower()}: must be adamw"
    if optimizer.get("fused") == "apex":
        yield "optimizer.fused=apex: must be auto, torch or none"
    if optimizer.get("amsgrad"):
        yield "optimizer.amsgrad=true: must be false"
    if config.precision.compute == "fp64":
        yield "precision.compute=fp64: must be fp32 or bf16, for master weights are fp32"
    if config.precision.masters != "high":
        yield f"precision.masters={config.precision.masters}: must be high"
    if config.precision.recipe != "none":
        yield f"precision.recipe={config.precision.recipe}: must be none"
    for key in ("span_tokens", "clip_each", "clip_value"):
        if (value := getattr(train, key)) is not None:
            yield f"train.{key}={value}: must be null"
    if config.tracking.get("norms"):
        yield "tracking.norms=true: must be false, for gradients lie end to end in each rank's part"
    if cuts_weights:
        if train.average != "none":
            yield f"train.average={train.average}: must be none with engine.zero=3"
        if config.engine.get("recompute", "none") != "none" or config.engine.get("tile") is not None:
            which, must = ("tile", "null") if config.engine.get("recompute") == "none" else ("recompute", "none")
            yield f"engine.{which}={config.engine.get(which)}: must be {must} with engine.zero=3"


def installed(kind: str) -> bool:
    """Says whether the package of an engine is there, by its class; nothing is imported."""
    _, module, _ = PACKAGES[kind]
    return all(importlib.util.find_spec(part) is not None for part in _above(module))


def _above(module: str) -> Iterator[str]:
    """A module's packages, the outermost first, and itself."""
    parts = module.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _installed(kind: str, name: str, compiles: bool) -> None:
    package, _, extra = PACKAGES[kind]
    if not installed(kind):
        raise ValueError(
            f"engine={name}: needs the package {package}, which is not installed here: pip install "
            f"'farspan[{extra}]'; accepts fsdp"
        )
    if compiles and (shutil.which("ninja") is None or not any(map(shutil.which, COMPILERS))):
        raise ValueError("engine.cpu_adam=true: must be false here: it is compiled, by ninja and a C++ compiler")
    if compiles and (lock := _stale_lock()) is not None:
        raise ValueError(
            f"engine.cpu_adam=true: {lock} is left of a compile that was stopped, for which DeepSpeed waits for ever; "
            f"remove the file"
        )


def _stale_lock() -> Path | None:
    """The lock that torch's builder of extensions has taken longer ago than a compile lasts; None without one."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in Path(cache).glob("**/cpu_adam/lock"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > COMPILE_S:
                return lock
    return None
