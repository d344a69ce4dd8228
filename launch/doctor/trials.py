"""Trials of `farspan doctor`, each in a process of its own: a package may take long to import, hang, or take it down.

`python trials.py PACKAGE MODULE` imports what farspan imports of a package. Where that proves little, it does something
small: torch multiplies and sums over ranks, fla-core, triton and apex run on a GPU, and an engine steps two parameters.
It prints a remark; for torch and for the mixers' kernels, a fact a line, as JSON.
"""

import importlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

LIMIT = timedelta(seconds=10)


def try_torch() -> None:
    """torch itself, how it multiplies, its devices, and every backend of torch.distributed."""
    import torch
    import torch.distributed as dist

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU build"
    parts = {"mkl": torch.backends.mkl, "openmp": torch.backends.openmp, "onednn": torch.backends.mkldnn}
    has = [name for name, part in parts.items() if part.is_available()]
    _tell("torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads, with {', '.join(has)}")
    _tell("matmul", "ok", _matmul())
    _devices()
    _backend("gloo", dist.is_gloo_available(), _gloo, "runs on CPUs need it")
    if torch.cuda.is_available():
        _backend("nccl", dist.is_nccl_available(), _nccl, "runs on GPUs need it")
    else:
        _tell("nccl", "missing", "no GPU to use it with")
    _tell("mpi", *(("ok", "built in; not used") if dist.is_mpi_available() else ("missing", "not built in; not used")))
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    triton = importlib.util.find_spec("triton") is not None
    lines = [f"compiler {compiler}"] if compiler else []
    lines += ["triton"] if triton else []
    _tell("compile", "ok" if lines else "missing", f"torch.compile has {', '.join(lines) or 'no compiler, no triton'}")


def try_kernels() -> None:
    """Returns which kernel each mixer gets on the device that runs would use, a fact a mixer."""
    import torch

    from models.kernels.attention_tiles import Fused, tile_for
    from models.kernels.registry import chosen
    from models.mixers import MIXERS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, mixer in sorted(MIXERS.items()):
        with torch.device("meta"):
            built = mixer(dim=64, heads=2)
            within = getattr(built, "memories", [built])[0]  # of several states, each is a mixer of its own
            recurrence = getattr(within, "recurrence", None)
        if recurrence is None:
            flash = tile_for(device) is Fused
            value = f"PyTorch: {'its flash kernel for CPUs' if flash else f'matmuls, in blocks, on {device}'}"
        else:
            kernel, reason = chosen(recurrence.rule, device)
            value = f"{'fla for bf16, PyTorch for fp32' if kernel == 'fla' else kernel}: {reason}"
        _tell(name, "ok", value)


def _matmul() -> str:
    """Says whether bf16 is multiplied natively, and how much sooner a product of two matrices is there than in fp32."""
    import torch

    from train.metrics.timing import matmul_peak
    from train.precision import native_bf16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {dtype: matmul_peak(device, dtype, seconds=0.3) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    how = "native" if native_bf16(device) else "emulated: precision=auto computes in fp32"
    return f"fp32 {rates[torch.float32]:,.0f} GFLOP/s, bf16 {ratio:.2g} times that ({how}) on {device}"


def _devices() -> None:
    import torch

    if not torch.cuda.is_available():
        why = "" if torch.version.cuda else "; this torch is built without CUDA"
        _tell("devices", "missing", f"no CUDA device: runs use the CPU{why}")
        return
    count = torch.cuda.device_count()
    for i in range(count):
        facts = torch.cuda.get_device_properties(i)
        _tell(
            f"cuda:{i}",
            "ok",
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}, "
            f"{facts.multi_processor_count} multiprocessors",
        )
    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text().split() if driver.exists() else []
    number = next((word for word in words if word[0].isdigit() and "." in word), "unknown")
    _tell("driver", "ok", f"NVIDIA {number}; torch is built for CUDA {torch.version.cuda}")
    if count > 1:
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        direct = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
        _tell(
            "peers", "ok" if direct else "missing", f"{direct} of {len(pairs)} pairs of GPUs reach each other directly"
        )


def _backend(name: str, built: bool, trial: Callable[[], str], why: str) -> None:
    if not built:
        _tell(name, "missing", f"this torch is built without it; {why}")
        return
    try:
        _tell(name, "ok", trial())
    except Exception as error:
        _tell(name, "broken", _line(error))


def _gloo() -> str:
    """Two ranks, threads of this process, that sum over the loopback interface."""
    import torch
    import torch.distributed as dist

    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # as in a run on one machine: a host's own name may be unknown
    began = time.monotonic()
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=LIMIT, wait_for_workers=False)
    answers: dict[int, Any] = {}

    def join(rank: int) -> None:
        try:
            store = dist.TCPStore("127.0.0.1", server.port, None, False, timeout=LIMIT)
            group = dist.ProcessGroupGloo(dist.PrefixStore("doctor", store), rank, 2, LIMIT)
            x = torch.full((4,), float(rank + 1))
            group.allreduce([x]).wait()  # type: ignore[attr-defined]
            answers[rank] = x.tolist()
        except Exception as error:
            answers[rank] = error

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT.total_seconds() + 1)
    for rank in range(2):
        answer = answers.get(rank, TimeoutError(f"nothing in {LIMIT.total_seconds():g} s"))
        if isinstance(answer, Exception):
            raise answer
        if answer != [3.0] * 4:
            raise ValueError(f"1 + 2 was {answer[0]:g}")
    return f"two ranks have summed over the loopback interface in {(time.monotonic() - began) * 1000:.0f} ms"


def _nccl() -> str:
    """One rank that sums with itself: the library loads, finds its devices, and runs a kernel."""
    import torch
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=LIMIT)
    x = torch.ones(4, device="cuda")
    dist.all_reduce(x)
    torch.cuda.synchronize()
    dist.destroy_process_group()
    if x.tolist() != [1.0] * 4:
        raise ValueError(f"a sum of one 1 was {x.tolist()[0]:g}")
    return f"{'.'.join(map(str, torch.cuda.nccl.version()))}, one rank has summed on cuda:0"


def try_apex() -> None:
    spec = importlib.util.find_spec("apex")
    if spec is None or not any(Path(p, "optimizers").exists() for p in spec.submodule_search_locations or ()):
        raise RuntimeError(
            "PyPI's package of this name, a web toolkit; farspan can use NVIDIA's, built from its source"
        )
    from apex.optimizers import FusedAdam

    if _gpu():
        import torch

        weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
        weight.grad = torch.ones_like(weight)
        FusedAdam([weight], lr=0.1).step()
        assert weight.detach().lt(1).all()


def try_deepspeed() -> None:
    """One step of two parameters by ZeRO-1, on a GPU where there is one."""
    from train.engines.trial import step

    print(step("deepspeed"))


def try_megatron_core() -> None:
    """The same by its distributed optimizer, which needs a GPU; without one the package is imported."""
    import torch

    if not torch.cuda.is_available():
        importlib.import_module("megatron.core")
        print(
            "imported only: engine=megatron needs a GPU, and has been run without one behind stand-ins for CUDA alone"
        )
        return
    from train.engines.trial import step

    print(step("megatron"))


def try_fla_core() -> None:
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    if not _gpu():
        return
    q, k, v = (torch.randn(1, 64, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    chunk_simple_gla(q, k, v, torch.zeros(1, 64, 2, device="cuda"))
    torch.cuda.synchronize()


def try_triton() -> None:
    import triton

    if _gpu():
        triton.runtime.driver.active.get_current_device()


def _gpu() -> bool:
    """Says whether there is a GPU to try a kernel on; says so where there is none."""
    import torch

    if not torch.cuda.is_available():
        print("imported only: its kernels need a GPU")
    return torch.cuda.is_available()


def _tell(name: str, sign: str, value: str) -> None:
    print(json.dumps([name, sign, value]), flush=True)


def _line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


TRIALS: dict[str, Callable[[], None]] = {
    "torch": try_torch,
    "kernels": try_kernels,
    "apex": try_apex,
    "deepspeed": try_deepspeed,
    "megatron-core": try_megatron_core,
    "fla-core": try_fla_core,
    "triton": try_triton,
}


def main(name: str, module: str) -> int:
    """Tries a package, or imports it where it has no trial. Where it fails, one line says why, and the code is 1."""
    try:
        TRIALS.get(name, lambda: importlib.import_module(module))()
    except BaseException as error:
        print(_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this folder: its files are no packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main(*sys.argv[1:]))
