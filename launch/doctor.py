"""`farspan doctor`: what this machine has, and whether it works here."""

import importlib
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from launch.preflight import cores
from launch.user import UserError


def doctor(arguments: list[str]) -> int:
    """Prints one line a fact. Returns 0 when the default job can run here, 1 when it cannot."""
    if arguments:
        raise UserError(f"{arguments[0]}: doctor takes no arguments")
    healthy = True
    for name, value, works in facts():
        healthy = healthy and works
        print(f"{name:<12}{value}")
    return 0 if healthy else 1


def facts() -> Iterator[tuple[str, str, bool]]:
    """(name, what was found, whether the default job can run with it)."""
    import torch
    import torch.distributed as dist

    from train.precision import native_bf16

    yield (
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        sys.version_info >= (3, 10),
    )
    yield "cores", f"{cores()}, bf16 {'native' if native_bf16('cpu') else 'emulated (fp32 is used)'}", True
    yield "memory", _memory(), True
    yield "disk", f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here", True
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield "devices", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", True
    else:
        yield "devices", "no CUDA device: runs use the CPU", True
    backends = [b for b, has in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if has]
    yield "torch", f"{torch.__version__}, backends {', '.join(backends)}", "gloo" in backends
    for name, package, needed in (("ray", "ray", True), ("wandb", "wandb", False), ("fla", "fla-core", False)):
        value, works = _package(name, package)
        yield name, value, works or not needed


def _package(module: str, package: str) -> tuple[str, bool]:
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"not installed (pip install {package})", False
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{found}, but importing it fails: {(str(error).splitlines() or [type(error).__name__])[0]}", False
    return found, True


def _memory() -> str:
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
    except OSError:
        return "unknown"
    gib = {key: int(found[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable")}
    return f"{gib['MemTotal']:.0f} GiB, {gib['MemAvailable']:.0f} GiB available"
