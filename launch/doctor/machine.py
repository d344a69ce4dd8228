"""Cores, memory and disk that this machine gives a process. Linux tells all of it; other systems tell less."""

import fcntl
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CHUNK = 4 << 20
_SETS = {  # what /proc/cpuinfo calls the instruction sets that decide how fast a matmul is
    "x86_64": ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    "aarch64": ("asimd", "bf16", "i8mm", "sve", "sve2", "svebf16", "sme"),
}


class Limits(NamedTuple):
    """The limits of this process's control groups: cores, a fraction included, and bytes; None for no limit."""

    cores: float | None
    memory: int | None


class Disk(NamedTuple):
    """Measures a folder's disk: bytes a second written (to the disk itself) and read back, and bytes that are free."""

    write: float
    read: float
    free: int
    kind: str
    locks: bool


def limits(root: Path = Path("/")) -> Limits:
    """The least that a control group of this process, or one above it, allows (versions 1 and 2)."""
    cores: list[float] = []
    memory: list[int] = []
    for folder in _groups(root):
        quota = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:  # "max" and -1 are none
            cores.append(int(quota[0]) / int(quota[1]))
        for name in ("memory.max", "memory.limit_in_bytes"):
            memory += [int(word) for word in _words(folder / name) if word.isdigit() and int(word) < 1 << 60]
    return Limits(min(cores, default=None), min(memory, default=None))


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str = platform.machine()) -> tuple[str, list[str]]:
    """Its name, and those of its instruction sets that matter here."""
    facts: dict[str, str] = {}
    for line in _text(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    flags = (facts.get("flags") or facts.get("features") or "").split()
    name = facts.get("model name") or platform.processor() or machine
    return " ".join(name.split()), [kind for kind in _SETS.get(machine, ()) if kind in flags]


def memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int] | None:
    """(bytes in all, bytes available), or None where the system does not say."""
    entries = dict(line.split(":", 1) for line in _text(meminfo).splitlines() if ":" in line)
    try:
        total, available = (int(entries[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError, IndexError):
        return None
    return total, available


def disk(folder: Path, size: int = 64 << 20, seconds: float = 4.0) -> Disk:
    """Writes `size` bytes to a file in `folder`, less if that takes longer than `seconds`, and reads them back.

    The file loses its name at once, so nothing is left however this ends. Raises OSError where it cannot be written.
    """
    path = folder / f".farspan-doctor-{os.getpid()}-{os.urandom(4).hex()}"
    second = None
    first = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        second = os.open(path, os.O_RDWR)  # another open file: a lock on one holds against the other
        path.unlink()
        block = os.urandom(_CHUNK)  # file systems that compress make nothing of it
        began, written = time.monotonic(), 0
        while written < size and time.monotonic() - began < seconds:
            written += os.write(first, block)
        os.fsync(first)
        wrote = time.monotonic() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(first, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        os.lseek(first, 0, os.SEEK_SET)
        began = time.monotonic()
        while os.read(first, _CHUNK):
            pass
        read = time.monotonic() - began
        return Disk(
            written / wrote, written / max(read, 1e-6), _free(folder), file_system(folder), _locks(first, second)
        )
    finally:
        path.unlink(missing_ok=True)
        for opened in (first, second):
            if opened is not None:
                os.close(opened)


def file_system(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that a folder is on: ext4, nfs4, overlay, …; "" where the system does not say."""
    place, best, kind = folder.resolve(), -1, ""
    for line in _text(mounts).splitlines():
        mount, _, rest = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        if (place == point or point in place.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def ground(folder: Path) -> Path:
    """The nearest folder that exists: this one, or one above it."""
    place = folder.absolute()
    return next(above for above in (place, *place.parents) if above.is_dir())


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _locks(first: int, second: int) -> bool:
    """Says whether a lock taken through one open file is refused to the other, and free again afterwards."""
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        fcntl.flock(first, fcntl.LOCK_UN)
        return True


def _groups(root: Path) -> Iterator[Path]:
    """The control groups of this process and all above them, of every controller."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup"
        for mounted in [top / controllers, *(top / each for each in controllers.split(","))] if controllers else [top]:
            own = mounted / path.lstrip("/")
            yield from (above for above in (own, *own.parents) if above == mounted or mounted in above.parents)


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
