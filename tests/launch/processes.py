"""Looking at processes from outside, for the launcher tests: /proc where there is one, `ps` elsewhere."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_LAUNCHER = """
import sys
from pathlib import Path
from launch.world import spawn
from launch.{module} import {function} as launch
spawn._PRELOAD = ("torch",)  # the entries need no more
outcome = launch({entry!r}, {{"dir": {dir!r}}}, workers=2, run_dir=Path({dir!r}), device="cpu", threads=1,
                 tick=lambda: None)
print("outcome:", outcome.ok, outcome.exit_code, outcome.reason, flush=True)
"""


def launcher(module: str, function: str, entry: str, run_dir: Path) -> subprocess.Popen[str]:
    """A launcher in a process, session and output pipe of its own, as from a terminal; a script without a guard."""
    code = _LAUNCHER.format(module=module, function=function, entry=f"tests.launch.entries:{entry}", dir=str(run_dir))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "FARSPAN_TEST_LAUNCHER": str(run_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def cpu_seconds(*words: str, tries: int = 3) -> float:
    """The CPU time of `python *words`, the least of some tries: another process on the cores counts for nothing."""
    least = float("inf")
    for _ in range(tries):
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, process.communicate()[1].decode()
        least = min(least, used.ru_utime + used.ru_stime)
    return least


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Wait until `condition` is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    ps = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, timeout=10)
    return bool(ps.stdout.strip()) and not ps.stdout.strip().startswith("Z")


def mentioning(text: str) -> list[str]:
    """The processes, other than this one, whose command line or environment has `text` in it (Linux; else none)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            command, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in command + environ:
            found.append(f"{folder.name} {command.decode(errors='replace')}")
    return found


def listening(text: str) -> dict[str, str]:
    """Where the processes that `mentioning` finds listen: "address:port" -> the process (Linux, TCP)."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == "0A":
                host, port = local.split(":")
                words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]  # of the machine's own byte order
                address = ipaddress.ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
                plain = getattr(address, "ipv4_mapped", None) or address
                sockets[f"socket:[{inode}]"] = f"{plain}:{int(port, 16)}"
    found = {}
    for process in mentioning(text):
        for descriptor in Path(f"/proc/{process.split()[0]}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if (name := os.readlink(descriptor)) in sockets:
                    found[sockets[name]] = process[:200]
    return found


def pids(run_dir: Path) -> list[int]:
    """The worker processes that have noted themselves in `run_dir`."""
    return [int(path.read_text() or 0) for path in run_dir.glob("pid-*")]


def all_gone(numbers: Iterable[int], seconds: float = 10) -> None:
    """Fails unless every process of `numbers` has ended within `seconds`."""
    numbers = list(numbers)
    assert numbers
    wait_for(lambda: not any(alive(number) for number in numbers), seconds)


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> None:
    """What a terminal does on Ctrl-C: a signal to the whole foreground group."""
    os.killpg(process.pid, number)
