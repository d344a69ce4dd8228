"""`farspan doctor`: what this machine has, and whether it works here.

A fact a line, as it is found: whether it is there (ok, missing, or broken), what it is, and what was found or went
wrong. What may take long, hang or crash is tried in a process of its own (`trials`); this one imports neither
torch nor anything else that might be at fault.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from launch.cluster.nodes import check_answers
from launch.doctor import machine, trials
from launch.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 45.0  # seconds that a trial may take; they take one to five
MEMORY = 6e9  # bytes that the default job takes at most, Ray included


class Fact(NamedTuple):
    """sign: ok, missing or broken. needed: whether the default job cannot run without it."""

    name: str
    sign: str
    value: str
    needed: bool = False


class Package(NamedTuple):
    """module: what farspan imports of it. brings: what for. install: how to get it where pip alone does not."""

    module: str
    brings: str
    install: str | None = None


PACKAGES = {
    "hydra-core": Package("hydra.core.override_parser.overrides_parser", "composes the configuration"),
    "jsonschema": Package("jsonschema", "checks the manifests of template=kuberay"),
    "matplotlib": Package("matplotlib.pyplot", "plots"),
    "numpy": Package("numpy", "corpora, packing, schedules"),
    "omegaconf": Package("omegaconf", "resolves the configuration"),
    "pyyaml": Package("yaml", "writes the templates"),
    "ray": Package("ray", "places workers on machines, and starts them again"),
    "rich": Package("rich", "the progress display, tables"),
    "tensorboardX": Package("tensorboardX.proto.event_pb2", "tracking=tensorboard"),
    "torch": Package("torch", "all that is computed"),
    "wandb": Package("wandb", "tracking=wandb"),
    "fla-core": Package("fla", "Triton kernels of linear mixers on GPUs, in bf16"),
    "triton": Package("triton", "short convolutions and torch.compile on GPUs; fla-core's kernels"),
    "apex": Package("apex", "optimizer.fused=apex: AdamW in one pass on GPUs", "from source, github.com/NVIDIA/apex"),
    "megatron-core": Package(
        "megatron.core",
        "engine=megatron, on GPUs; its balanced scheduler beside ours in the planner's benchmark (data=megatron needs "
        "nothing)",
    ),
    "highspy": Package("highspy", "the adaptive scheduler's integer programs, solved exactly"),
    "tokenizers": Package("tokenizers", "tokens other than bytes: data.tokenizer"),
    "datasets": Package("datasets", "data=hf"),
    "pyarrow": Package("pyarrow.parquet", "data=parquet"),
    "transformers": Package("transformers", "an oracle of the tests; farspan import and export do without it"),
    "safetensors": Package("safetensors", "an oracle of the tests; farspan import and export do without it"),
    "flash-attn": Package("flash_attn", "planned: fused softmax attention on GPUs"),
    "deepspeed": Package("deepspeed", "engine=deepspeed: ZeRO and offloading"),
    "torchao": Package("torchao", "an oracle of the tests of precision=fp8_…, which does without it"),
}


def facts(run_dir: Path, address: str | None) -> Iterator[Fact | str]:
    """Every fact, with headings between them."""
    yield from _machine()
    yield from _torch()
    required, optional = _requirements()
    with ThreadPoolExecutor(max_workers=max(2, min(4, machine.cores()))) as pool:
        packages = {n: pool.submit(package, n, spec, n in required) for n, spec in {**required, **optional}.items()}
        yield "Packages that farspan needs"
        yield from (packages[name].result() for name in required)
        yield "Packages that it can use"
        yield from (packages[name].result() for name in optional)
    yield "Kernels of the mixers"
    yield from _kernels()
    yield "Where runs are written, and a cluster"
    yield _disk(run_dir)
    yield _cache()
    yield from _ray(address)


def _machine() -> Iterator[Fact]:
    version = platform.python_version()
    where = f"{version} on {platform.system()} {platform.machine()}"
    fits = (3, 10) <= sys.version_info[:2] < (3, 14)
    yield Fact("python", "ok" if fits else "broken", where + ("" if fits else "; 3.10 to 3.13 are needed"), True)
    has_source = Path(sysconfig.get_path("stdlib"), "os.py").exists()
    source = "Python's own source" if has_source else "this Python comes without its source: data=text"
    yield Fact("corpus", "ok" if has_source else "missing", source, True)

    allowed, name_and_sets = machine.limits(), machine.processor()
    count, present = machine.cores(), os.cpu_count()
    quota = f", a quota of {allowed.cores:g}" if allowed.cores else ""
    enough = count >= 2
    few = "" if enough else "; the default job has two workers, a core each: cluster.workers=1"
    yield Fact(
        "cores", "ok" if enough else "broken", f"{count} of {present} usable{quota}, {name_and_sets[0]}{few}", True
    )
    yield Fact(
        "instructions", "ok" if name_and_sets[1] else "missing", " ".join(name_and_sets[1]) or "none known of here"
    )

    memory = machine.memory()
    if memory is None:
        yield Fact("memory", "missing", "this system does not say")
    else:
        total, available = memory
        room = min(total, allowed.memory or total)
        group = (
            f", {_size(allowed.memory)} for this process's group" if allowed.memory and allowed.memory < total else ""
        )
        little = f"; little: the default job takes up to {_size(MEMORY)}" if min(room, available) < MEMORY else ""
        yield Fact("memory", "ok", f"{_size(total)}, {_size(available)} available{group}{little}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        small = "; small: Ray keeps its objects on disk instead" if usage.free < 2e8 else ""
        yield Fact("/dev/shm", "ok", f"{_size(usage.total)}, {_size(usage.free)} free{small}")
    else:
        yield Fact("/dev/shm", "missing", "Ray keeps its objects on disk instead")


def _torch() -> Iterator[Fact]:
    """The facts that a process finds which imports torch."""
    for name, sign, value in _trial_lines("torch"):
        yield Fact(name, sign, value, name in ("torch", "gloo") or name == "nccl" and sign == "broken")


def _kernels() -> Iterator[Fact]:
    """Returns what each mixer is computed by here, and why."""
    yield from (Fact(*fields) for fields in _trial_lines("kernels"))


def _trial_lines(trial: str) -> Iterator[tuple[str, str, str]]:
    """The facts that a trial prints, name, sign and value; one of its own name where it fails."""
    any_line = False
    try:
        for line in _tried(trial, trial):
            with contextlib.suppress(ValueError):
                name, sign, value = json.loads(line)
                any_line = True
                yield name, sign, value
    except TrialError as error:
        yield trial, "broken", str(error)
    else:
        if not any_line:
            yield trial, "broken", "says nothing"


class TrialError(Exception):
    """Why a trial failed, in one line."""


def _tried(name: str, module: str) -> Iterator[str]:
    """Yields what a trial says, line by line. Its process is killed, with all that it started, when its time is over.

    Raises TrialError at the end of one that failed.
    """
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "WANDB_SILENT": "true"}
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, trials.__file__, name, module],
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None

        def kill() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        clock = threading.Timer(LIMIT, kill)
        clock.start()
        try:
            yield from (line.strip() for line in process.stdout if line.strip())
            code = process.wait()
        finally:
            clock.cancel()
            if process.poll() is None:
                kill()
                process.wait()
            process.stdout.close()
        if late.is_set():
            raise TrialError(f"nothing in {LIMIT:g} s")
        if code < 0:
            raise TrialError(f"killed by {signal.Signals(-code).name} when it was tried")
        if code:
            errors.seek(0)
            raise TrialError((errors.read().strip().splitlines() or ["failed without a word"])[-1][:200])


def package(name: str, spec: str, needed: bool) -> Fact:
    """Says whether a package is there, in a version that fits, and can be imported (`trials` tries some further)."""
    known = PACKAGES.get(name, Package(name.replace("-", "_"), ""))
    brings = f"; {known.brings}" if known.brings else ""
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    if version is None and util.find_spec(known.module.partition(".")[0]) is None:
        return Fact(name, "missing", f"{known.install or f'pip install {name}'}{brings}", needed)
    shown = version or "of unknown version"
    if version and not _fits(version, spec):
        return Fact(name, "broken", f"{shown}, farspan needs {spec}{brings}", needed)
    if name == "torch":
        return Fact(name, "ok", f"{shown}, tried above{brings}", needed)
    try:
        remarks = list(_tried(name, known.module))
    except TrialError as error:
        return Fact(name, "broken", f"{shown}: {error}{brings}", needed)
    return Fact(name, "ok", f"{shown}{''.join(f', {line}' for line in remarks[-1:])}{brings}", needed)


def _requirements() -> tuple[dict[str, str], dict[str, str]]:
    """The packages that farspan requires, and those that it can use, each with the versions that fit."""
    try:
        lines = metadata.requires("farspan") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
        lines = re.findall(r'"([^"]+)"', block[1]) if block else []
    required: dict[str, str] = {}
    specs = {}
    for line in lines:
        match = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*)(;.*extra.*)?", line)
        if match and match[3]:
            specs[match[1]] = match[2].strip()
        elif match:
            required[match[1]] = match[2].strip()
    return dict(sorted(required.items())), {name: specs.get(name, "") for name in PACKAGES if name not in required}


def _fits(version: str, spec: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # comes with most of what farspan requires
        return True
    return SpecifierSet(spec).contains(version, prereleases=True)


def _disk(run_dir: Path) -> Fact:
    folder = machine.ground(run_dir.parent)
    try:
        disk = machine.disk(folder)
    except OSError as error:
        return Fact("runs", "broken", f"{folder} cannot be written: {error.strerror or error}", True)
    speeds = f"writes {disk.write / 1e6:,.0f} MB/s, reads {disk.read / 1e6:,.0f} MB/s"
    kind = f"{disk.kind}, " if disk.kind else ""
    if not disk.locks:
        return Fact("runs", "broken", f"{folder}: {kind}{speeds}; has no locks (flock): a run needs one", True)
    return Fact("runs", "ok", f"{folder}: {kind}{speeds}, {_size(disk.free)} free, locks work", True)


def _cache() -> Fact:
    """The folder of token stores, where data.store names no other."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farspan"
    above = machine.ground(folder)
    if not os.access(above, os.W_OK):
        return Fact("token stores", "broken", f"{above} cannot be written: data.store=FOLDER, or XDG_CACHE_HOME", True)
    return Fact("token stores", "ok", f"{folder}, {_size(shutil.disk_usage(above).free)} free", True)


def _ray(address: str | None) -> Iterator[Fact]:
    """Says whether a Ray answers at the address given, which must, or at that of the environment."""
    given_address = address or os.environ.get("RAY_ADDRESS")
    name = "cluster.address" if address else "RAY_ADDRESS"
    if not given_address:
        yield Fact("cluster", "missing", "no cluster.address, no RAY_ADDRESS: runs start a Ray of their own")
        return
    try:
        yield Fact(name, "ok", f"{given_address}: {_answer(given_address)}")
    except (UserError, OSError, ValueError) as error:
        yield Fact(name, "broken", f"{given_address}: {str(error).removeprefix(f'cluster.address={given_address}: ')}")


def _answer(address: str) -> str:
    """Asks what answers at an address, within a few seconds. Raises UserError, OSError or ValueError where nothing
    does."""
    import socket

    from train.timeout import within

    if address.startswith(("http://", "https://")):
        check_answers(address.rstrip("/"))
        return f"Ray {metadata.version('ray')} answers, as here"
    if address == "auto":
        file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        if not file.exists():
            raise OSError("no Ray runs on this machine")
        address = file.read_text().strip()
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError("expected http://HOST:8265, HOST:PORT or auto")
    try:
        within(5, lambda: socket.create_connection((host.strip("[]"), int(port)), 5).close())
    except TimeoutError:
        raise OSError("nothing answers in 5 s") from None
    return "answers" if address == host + colon + port else f"{address} answers"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB" if count < 1000 else f"{count / 1000:.1f} PB"
