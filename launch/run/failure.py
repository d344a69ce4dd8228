"""The end of a run, and the rank that is to blame for it.

When one rank of a world fails, all of them do: its peers see "connection reset by peer" a moment later. A report that
names a peer sends its reader to the wrong place, so the culprit is, in this order: a rank that stopped answering, as
`launch.world.watchdog` tells; a rank that was killed by a signal which we did not send; the earliest failure that is
not about a connection; a rank that aborted itself (NCCL's watchdog does, when a peer is gone); the earliest failure.
"""

from __future__ import annotations

import errno
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WIDTH = 300  # characters of an exception's first line that a reason shows

MACHINE = "with its machine"  # how a rank was lost whose machine is gone

# What a rank says when a peer has gone: gloo, TCPStore, NCCL, and the operating system's own words.
_PEER_GONE = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|closed by peer|broken pipe|pair closure|connectFullMesh"
    r"|DistStoreError|DistNetworkError|remote process exited|ncclRemoteError|NCCL communicator was aborted"
    r"|(recv|send)Value failed|timed out (after|waiting)|socket timeout|failed to (recv|send), got 0 bytes",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Outcome:
    """The end of a run: `reason` is one line for a person when not ok; `exit_code` is 0 done, 1 failed, 2 a mistake.

    `lost`: a process, a machine or Ray was lost, which another attempt may not meet; our own code raised nothing.
    """

    ok: bool
    reason: str | None = None
    exit_code: int = 0
    lost: bool = False


@dataclass(frozen=True)
class Failure:
    """The report of a rank whose entry raised; `when` is seconds on the machine-wide monotonic clock."""

    rank: int
    when: float
    line: str  # "ExceptionType: first line of the message"
    trace: str
    user_line: str | None = None  # the exception's own words, when it is a user's mistake
    stopped: bool = False  # `line` is a watch's word about a rank that stopped answering, itself or another

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """The report of `error`, caught on `rank`."""
        first = (str(error).strip().splitlines() or [""])[0]
        name = type(error).__name__
        line = f"{name}: {first[:_WIDTH]}" if first else name
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            line = f"the disk is full: {first[:_WIDTH]}"
        user_line = getattr(error, "user_line", None)
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return cls(rank, time.monotonic(), line, trace, user_line if isinstance(user_line, str) else None)

    @property
    def blames_peer(self) -> bool:
        """Says whether this only says that a peer went away."""
        return self.user_line is None and _PEER_GONE.search(self.trace) is not None


def verdict(failures: Sequence[Failure], deaths: Sequence[tuple[int, str]], run_dir: Path) -> Outcome:
    """The outcome of a failed run, its traces written to run_dir/error.txt.

    `deaths` are (rank, how) in the order they were seen, of the ranks that ended without a report: ("was killed
    (SIGKILL)", "left with exit code 3").
    """
    ordered = sorted(failures, key=lambda failure: (failure.blames_peer, failure.when))
    texts = [f"rank {rank} {how}\n" for rank, how in deaths]
    texts += [f"rank {failure.rank}: {failure.line}\n{failure.trace}" for failure in ordered]
    path = run_dir / "error.txt"
    try:
        path.write_text("\n".join(texts), encoding="utf-8")
        more, trace = f" (more: {path})", f" (full trace: {path})"
    except OSError:  # the disk is full, which may be why the run has failed
        more = trace = ""
    if machines := [death for death in deaths if MACHINE in death[1]]:  # what its ranks then seemed to do came of that
        rank, how = machines[0]
        return Outcome(False, f"rank {rank} {how}", 1, lost=True)
    killed = [death for death in deaths if "SIGABRT" not in death[1]]
    if stopped := [failure for failure in ordered if failure.stopped]:  # what died later died of that
        return Outcome(False, f"{stopped[0].line}{more}", 1, lost=True)
    own_reports = [failure for failure in ordered if not failure.blames_peer]
    if killed or (deaths and not own_reports):
        rank, how = (killed or list(deaths))[0]
        return Outcome(False, f"rank {rank} {how}", 1, lost=True)
    if not ordered:
        return Outcome(False, "the workers ended without a report", 1, lost=True)
    first = ordered[0]
    if first.user_line is not None:
        return Outcome(False, first.user_line, 2)
    who = f"rank {first.rank}: " if first.rank >= 0 else ""
    return Outcome(False, f"{who}{first.line}{trace}", 1, lost=first.blames_peer)
