"""A watch over the ranks of a world: who has stopped answering, and where the others wait for it.

A rank may be frozen (its machine swaps, a debugger or SIGSTOP holds it), or alive and stuck in its own code; in both
cases its peers wait in a collective for ever. Each rank has a thread that tells the store every few seconds where its
rank is (`parallel.liveness`). A rank that has not moved for as long as it should be patient reads what the others
told, twice, half the patience apart: who has told nothing new in between is frozen; else who is in no collective is
the one that the others wait for. A rank tells where it is whatever it does: a frozen one is found as soon in a
checkpoint as in a step. The store lives on one of the ranks, its keeper: where it twice does not answer, the keeper is
frozen.

Time is counted in ticks of that thread, each at most twice its due: a machine that was suspended, or a run that was
stopped as a whole (Ctrl-Z), goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.run.failure import Failure
from parallel.liveness import HERE, PULSE_S, Liveness, Wait

START_S = 1800.0  # until training sets its own patience: models are built, corpora opened
_TICKS = 8  # in a patience


@dataclass(frozen=True)
class Heartbeat:
    """A rank's last word. beat: counts tellings. signs, wait, doing: of its `Liveness`. quiet: seconds since the
    signs changed. at: where its main thread is, while quiet. left: it has ended its work."""

    beat: int
    signs: int
    quiet: float
    wait: Wait | None
    doing: str
    at: str
    left: bool = False

    @classmethod
    def parse(cls, text: str | bytes) -> Heartbeat:
        values = json.loads(text)
        if values["wait"] is not None:
            layer, purpose, kind, ranks = values["wait"]
            values["wait"] = Wait(layer, purpose, kind, None if ranks is None else tuple(ranks))
        return cls(**values)


Board = dict[int, Heartbeat | None]  # what each rank last told; None for one that has told nothing yet


def blame(before: Board, now: Board, patience: float | None, quiet: float) -> str | None:
    """One line that names who stopped answering, after this rank has been `quiet` seconds; None: somebody moves.

    before, now: what ranks had told, long enough apart for each to tell something new. patience: None where a rank may
    do nothing for as long as it likes, as long as it runs.
    """
    here = {r: note for r, note in now.items() if note is not None and not note.left}
    frozen = [r for r in sorted(now) if (r in here or now[r] is None) and before.get(r) == now[r]]
    if frozen:
        place = _place(here, frozen)
        doing = next((note.doing for note in (now[frozen[0]], *here.values()) if note and note.doing), "")
        where = f" in {place}" if place else f", {doing}" if doing else ""
        return f"{_ranks(frozen)} stopped answering{where}: no word for {quiet:.0f} s"
    if patience is None or quiet < patience:
        return None
    if any(note is None for note in now.values()) or any(note.quiet < patience / 2 for note in here.values()):
        return None
    busy = [r for r, note in here.items() if note.wait is None]
    if not busy:
        waits = "; ".join(f"rank {r} in {note.wait}" for r, note in list(here.items())[:4])
        return f"the ranks wait for each other for {quiet:.0f} s: {waits}"
    place = _place(here, busy)
    note = here[busy[0]]
    what = note.doing or "busy elsewhere"
    line = f"{_ranks(busy)} stopped answering{' before ' + place if place else ''}: {what}"
    return f"{line} for {note.quiet:.0f} s{', at ' + note.at if note.at else ''}"


def _place(here: dict[int, Heartbeat], culprits: Sequence[int]) -> str:
    """Returns where the others wait for the culprits: in the smallest group with one of them, the least far on its
    way."""
    waits = [
        (len(note.wait.ranks) if note.wait.ranks else len(here), note.signs, str(note.wait))
        for rank, note in here.items()
        if rank not in culprits
        and note.wait is not None
        and (note.wait.ranks is None or set(culprits) & set(note.wait.ranks))
    ]
    own = here.get(culprits[0])
    return min(waits)[2] if waits else str(own.wait or "") if own else ""


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return ("rank " if len(ranks) == 1 else "ranks ") + listed


class Watch:
    """This rank's watch. `report` gets the Failure that ends the run; the process then ends at once, with code 1.

    host, port: of the TCPStore. keeper: the rank whose process it is in.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        port: int,
        report: Callable[[Failure], None],
        here: Liveness = HERE,
        *,
        keeper: int = 0,
    ) -> None:
        self._rank, self._size, self._address, self.report, self._here = rank, size, (host, port), report, here
        self._keeper, self._silent = keeper, False
        self._closed = threading.Event()
        self._main = threading.current_thread().ident
        self._beat, self._quiet, self._signs = 0, 0.0, -1
        self._before: Board | None = None
        self._due = 0.0  # of quiet, for the next reading
        self._mail = _Mail(self._address, size, rank) if size > 1 else None
        here.patience, here.pulse = START_S, PULSE_S

    def __enter__(self) -> Watch:
        if self._mail is not None:
            threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def leave(self) -> None:
        """Wait for the others to come to the end of their work too; one that computes may take its time. Collective."""
        import torch.distributed as dist

        self._here.patience = None
        with self._here.waiting(Wait("", "end of the run", "barrier")):
            dist.barrier()

    def __exit__(self, *raised: object) -> None:
        """Say that this rank has ended its work; the others may still be at theirs."""
        self._closed.set()
        if self._mail is not None:
            self._mail.post(self._heartbeat(left=True))

    def _run(self) -> None:
        assert self._mail is not None
        then, untold = time.monotonic(), 0.0
        while True:
            due = min(max(self._pulse / _TICKS, 0.25), 5.0)
            tick = min(due, 1.0)  # the pulse may become shorter meanwhile
            if self._closed.wait(tick):
                return
            now = time.monotonic()
            passed, then = min(now - then, 2 * tick), now
            moved = self._signs != self._here.signs
            self._signs, self._quiet = self._here.signs, 0.0 if moved else self._quiet + passed
            untold += passed
            if untold >= due:
                untold = 0.0
                self._mail.post(self._heartbeat())
            self._look(self._pulse)

    @property
    def _pulse(self) -> float:
        here = self._here
        return here.pulse if here.patience is None else min(here.pulse, here.patience)

    def _look(self, pulse: float) -> None:
        """Reads what the others told at half a pulse of quiet, at all of it, and so on; judges from the second time."""
        assert self._mail is not None
        if self._quiet < pulse / 2:
            self._before, self._due, self._silent = None, pulse / 2, False
        elif self._quiet >= self._due:
            now = self._mail.read(max(2.0, pulse / _TICKS))
            if now is None and self._rank == self._keeper:
                return
            silent, self._silent = self._silent, now is None
            if now is None:  # its keeper tells nothing new, and nobody else can
                now = {
                    self._keeper: self._before.get(self._keeper) if self._before else None,
                    self._rank: self._heartbeat(),
                }
            if self._before is not None and silent == self._silent and not self._closed.is_set():
                line = blame(self._before, now, self._here.patience, self._quiet)
                if line is not None:
                    self._end(line, now)
            self._before, self._due = now, self._quiet + pulse / 2

    def _end(self, line: str, notes: Board) -> None:
        ranks = [f"rank {rank}: {each if each else 'nothing told'}" for rank, each in sorted(notes.items())]
        trace = "\n".join([line, *ranks, f"the main thread of rank {self._rank}:", *self._stack()]) + "\n"
        with contextlib.suppress(OSError):
            self.report(Failure(self._rank, time.monotonic(), line, trace, stopped=True))
        os._exit(1)

    def _heartbeat(self, left: bool = False) -> Heartbeat:
        self._beat += 1
        patience = self._here.patience or START_S
        at = ""
        if self._quiet > patience / 4 and (frame := sys._current_frames().get(self._main or 0)) is not None:
            at = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
        here, wait = self._here, self._here.wait
        if wait is not None and wait.ranks is not None and len(wait.ranks) == self._size:
            wait = wait._replace(ranks=None)
        return Heartbeat(self._beat, here.signs, round(self._quiet, 2), wait, here.doing, at, left)

    def _stack(self) -> list[str]:
        frame = sys._current_frames().get(self._main or 0)
        return [] if frame is None else [text.rstrip("\n") for text in traceback.format_stack(frame)]


class _Mail:
    """The exchange of the ranks' words, through a connection of its own to the store, in a thread of its own: a store
    that
    does not answer must hold up neither the rank nor its watch."""

    def __init__(self, address: tuple[str, int], size: int, rank: int) -> None:
        self._address, self._size, self._rank = address, size, rank
        self._pending: Heartbeat | None = None
        self._wake = threading.Condition()
        self._asked = self._answered = 0
        self._answer: Board = {}
        threading.Thread(target=self._run, name="watch-mail", daemon=True).start()

    def post(self, note: Heartbeat) -> None:
        """Have it told, soon."""
        with self._wake:
            self._pending = note
            self._wake.notify_all()

    def read(self, seconds: float) -> Board | None:
        """Returns what every rank last told; None when the store has not answered within so many seconds."""
        with self._wake:
            self._asked += 1
            request = self._asked
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._answered >= request, seconds)
            return self._answer if self._answered >= request else None

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # the store is gone with its host: what follows tells of itself
            store = self._store()
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._pending is not None or self._answered < self._asked)
                    note, self._pending, request = self._pending, None, self._asked
                if note is not None:
                    store.set(f"watch/{self._rank}", json.dumps(asdict(note)))
                if self._answered < request:
                    answer = self._read(store)
                    with self._wake:
                        self._answer, self._answered = answer, request
                        self._wake.notify_all()

    def _store(self) -> Any:
        from torch.distributed import TCPStore

        return TCPStore(*self._address, is_master=False, wait_for_workers=False)

    def _read(self, store: Any) -> Board:
        keys = [f"watch/{rank}" for rank in range(self._size)]
        if store.check(keys):
            return {rank: Heartbeat.parse(text) for rank, text in enumerate(store.multi_get(keys))}
        return {rank: Heartbeat.parse(store.get(key)) if store.check([key]) else None for rank, key in enumerate(keys)}
