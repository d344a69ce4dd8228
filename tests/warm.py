"""A warm `farspan` for end-to-end tests: the command line in a process forked from one that has imported it.

A cold start of a launcher and its workers costs some ten seconds of CPU, nearly all of it imports. `command()` starts a
server that imports them once, and returns the words of a small client which is used like `farspan`: the same arguments,
folder, environment, output, exit code and signals, in a process group of its own. For each client the server forks a
process that runs `launch.cli.main`; the fork server of its workers is forked from it in turn. A test of start-up itself
uses `COLD`, a fresh interpreter.
"""

import array
import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLD = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())"]
IMPORTS = (
    "launch.cli",
    "launch.runner.attempts",
    "launch.world.spawn",
    "launch.world.worker",
    "launch.evaluation.measure",
    "launch.commands.generate",
    "launch.commands.prepare",
    "tests.read_once",
    "matplotlib.backends.backend_agg",  # a corpus's card
    "matplotlib.figure",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "train.build",
    "torch.utils.flop_counter",
    "train.evaluation.run",
)
_START_S = 120.0


@cache
def command(*modules: str, environment: tuple[tuple[str, str], ...] = ()) -> list[str]:
    """The words that run a warm `farspan`; starts the server at the first call, and ends it with this process.

    modules: more that it imports. environment: of the server, beside ours: Ray's modules read theirs once, so that only
    clients with the same one may follow.
    """
    folder = tempfile.mkdtemp(prefix="fs-")
    address = f"{folder}/s"
    env = {**os.environ, **dict(environment), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tests.warm", address, *modules]
    server = subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.PIPE)
    atexit.register(server.kill)
    return [sys.executable, "-I", "-S", str(Path(__file__)), address]


def client(address: str, arguments: list[str]) -> int:
    """Asks the server to run `arguments` with our folder, environment and streams; passes signals on. Its exit code."""
    import time

    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    deadline = time.monotonic() + _START_S
    link = socket.socket(socket.AF_UNIX)
    while True:
        try:
            link.connect(address)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    order = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    link.sendmsg([len(order).to_bytes(8, "little")], streams)
    link.sendall(order)
    for fd in (0, 1, 2):  # else whoever reads our output waits for us too
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in signals:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    while True:
        ready, _, _ = select.select([link, heard], [], [])
        if heard in ready:
            link.sendall(os.read(heard, 16))
        if link in ready:
            told = link.recv(8)
            if not told:
                return 1
            code = int.from_bytes(told, "little", signed=True)
            if code >= 0:
                return code
            signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
            os.kill(os.getpid(), -code)


def serve(address: str, modules: list[str]) -> None:
    """Forks a process for each client, until our parent is gone."""
    import importlib

    from tests.late_imports import LATE

    for name in (*IMPORTS, *LATE, *modules):
        importlib.import_module(name)
    import torch

    from launch.config.compose import composed

    composed([])  # what it reads and keeps, each client's process has
    torch.set_num_threads(1)
    gc.freeze()  # what is there stays: no process of a client looks through it for circles
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([0, listener, *children.values()], [], [], 0.02 if children else None)
        if 0 in ready:  # our parent's end of the pipe: it has ended
            for pid in children:
                _signal(pid, signal.SIGKILL)
            return
        for pid, link in list(children.items()):
            if link in ready:
                numbers = link.recv(16)
                for number in numbers or [signal.SIGKILL]:
                    _signal(pid, number)
                if not numbers:
                    link.close()
                    del children[pid]
        if listener in ready:
            link = listener.accept()[0]
            streams, order = _receive(link)
            pid = os.fork()
            if pid == 0:
                for other in (listener, link, *children.values()):
                    other.close()
                _become(streams, *order)
            children[pid] = link
            for stream in streams:
                os.close(stream)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if link := children.pop(pid, None):
                link.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
                link.close()


def _signal(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def _receive(link: socket.socket) -> tuple[list[int], list[Any]]:
    """A client's streams, and its arguments, folder and environment."""
    head, rights, _, _ = link.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    text = b""
    while len(text) < int.from_bytes(head, "little"):
        text += link.recv(1 << 20)
    return list(array.array("i", rights[0][2])), json.loads(text)


def _become(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Runs one client's command line in this process, which then ends."""
    code = 70
    try:
        os.setsid()
        for fd, stream in enumerate(streams):
            os.dup2(stream, fd)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, stream in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, stream, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
        sys.argv = ["farspan", *arguments]
        _fork_helpers()
        code = _run()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run() -> int:
    import atexit
    import threading
    import traceback

    from launch.cli import main

    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _fork_helpers() -> None:
    """Has `multiprocessing` fork its fork server and its resource tracker from us, where it would start Python anew."""
    from multiprocessing import util

    def fork(path: bytes, words: list[Any], passed: list[int]) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                signal.set_wakeup_fd(-1)
                kept = {0, 1, 2, *passed}
                for fd in map(int, os.listdir("/proc/self/fd")):
                    if fd not in kept:
                        try:
                            os.close(fd)
                        except OSError:
                            pass  # the listing's own
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                exec(words[words.index("-c") + 1], {"__name__": "__main__"})
            finally:
                os._exit(0)
        return pid

    util.spawnv_passfds = fork  # type: ignore[assignment]


if __name__ == "__main__":
    if sys.flags.isolated:
        sys.exit(client(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1], sys.argv[2:])
