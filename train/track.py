"""The record of a run: `metrics.jsonl` (complete, always), Weights & Biases (a copy, never in the way), `log.txt`.

The training loop sees a Tracker and hands it one record a step. `metrics.jsonl` is what resuming, reporting and the
progress display read. W&B gets the same numbers flattened, from rank 0 only; whatever happens to it, training goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import secrets
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Jsonl:
    """One JSON object a line, each flushed whole, so that a reader who follows the file sees whole records.

    Opening continues an existing file; a last line that a crash has cut is removed.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def log(self, record: dict[str, Any]) -> None:
        """Append a record: numbers (tensors and arrays too), strings, lists and dicts of them.

        JSON has no NaN and no infinity: they are written as null, and "nonfinite" lists their names ("grad_norm",
        "expert_load/layers.0/3"). Raises TypeError for a value JSON cannot hold.
        """
        nonfinite: list[str] = []
        plain = _plain(record, "", nonfinite)
        if nonfinite:
            plain["nonfinite"] = nonfinite
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def keep_until(self, step: int) -> int:
        """Drop the records of steps after `step` (they will be trained again) and unreadable lines; how many.

        The file is written aside and renamed: a crash leaves the old file or the new one.
        """
        self._file.close()
        aside = self._path.with_name(self._path.name + ".partial")
        dropped = 0
        with self._path.open("rb") as old, aside.open("wb") as new:
            for line in old:
                if _step(line) <= step:
                    new.write(line)
                else:
                    dropped += 1
            new.flush()
            os.fsync(new.fileno())
        aside.replace(self._path)
        self._open()
        return dropped

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = self._path.open("ab")
        if size := self._path.stat().st_size:
            with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                whole = text.rfind(b"\n") + 1
            if whole < size:
                self._file.truncate(whole)


def _step(line: bytes) -> float:
    """The step of a record's line: minus infinity where it has none, infinity where the line is no record."""
    try:
        return json.loads(line).get("step", -math.inf)
    except (ValueError, AttributeError):
        return math.inf


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """`value` in JSON's own types; the names of what is not finite are added to `nonfinite`."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(inner, f"{name}/{key}" if name else str(key), nonfinite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}/{index}", nonfinite) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value


class WandB:
    """A run in Weights & Biases, fed by rank 0: a copy of the record that may fail without harm.

    mode      auto: what WANDB_MODE says, else online where a key is found (WANDB_API_KEY, W&B's settings, netrc) and
              offline elsewhere; online: offline all the same where there is no key or the server does not answer;
              offline: written to the run folder, for `wandb sync` later; disabled: nothing
    project, entity, group, tags   as W&B calls them; the entity defaults to the account's own
    timeout   seconds that the server may take to answer at the start, and to receive what is left at the end. Neither
              blocks training for more than about twice as long.

    wandb is imported by `start`, and not where it is disabled. Its system metrics are off on purpose: they would show
    one machine of many and take a core's time for it; the speeds and memory that matter are in the record. So are its
    capture of the console, of the code and of git: log.txt and config.yaml have them.
    """

    def __init__(
        self,
        *,
        project: str = "farspan",
        mode: str = "auto",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        timeout: float = 15,
    ):
        if mode not in ("auto", "offline", "online", "disabled"):
            raise ValueError(f"tracking.mode: got {mode!r}, accepts auto, offline, online, disabled")
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"tracking.timeout: got {timeout!r}, accepts a number of seconds above 0")
        self.project = project
        self.mode = mode
        self.entity = entity
        self.group = group
        self.tags = list(tags or ())
        self.timeout = timeout
        self._run: Any = None
        self._failed = False
        self._say: Callable[[str], None] = print

    def start(
        self, run_dir: str | Path, name: str, config: dict[str, Any], run_id: str | None, say: Callable[[str], None]
    ) -> str:
        """Begin, or continue, the W&B run of `run_dir`, and return its id ("" where disabled).

        The id is `run_id`, else the one kept in `run_dir/wandb-id`, else a new one, and is kept there: a resumed run
        continues the same W&B run. Never raises: `say` gets one line that tells where the run is, or why it is not.
        """
        mode = _mode(self.mode)
        if mode == "disabled":
            return ""
        self._say = say
        run_dir = Path(run_dir)
        id_file = run_dir / "wandb-id"
        try:
            run_id = run_id or (id_file.read_text().strip() if id_file.exists() else "") or secrets.token_hex(4)
            run_dir.mkdir(parents=True, exist_ok=True)
            id_file.write_text(run_id + "\n")
            say(self._begin(mode, dir=str(run_dir), name=name, config=config, id=run_id))
        except Exception as error:
            say(f"W&B is off for this run: {_reason(error)}")
        return run_id or ""

    def _begin(self, mode: str, **run: Any) -> str:
        """Start wandb in the mode that works, and the line that says so."""
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            allow_val_change=True,  # a resumed run may have another layout
            init_timeout=self.timeout,
            finish_timeout=self.timeout,
            finish_timeout_raises=True,
        )
        run |= {
            "project": self.project,
            "entity": self.entity,
            "group": self.group,
            "tags": self.tags,
            "resume": "allow",
            "reinit": "create_new",
            "settings": settings,
        }
        # What the session is told, login and init obey: without it they would talk, and ask for a key.
        session = wandb.setup(wandb.Settings(silent=True, console="off", mode="online", x_service_wait=self.timeout))
        why = ""
        if mode != "offline":
            try:
                if not wandb.login(prompt=False, verify=False):
                    why = "no API key" if mode == "online" else ""
                elif not _answers(session.settings.base_url, self.timeout):
                    why = f"no answer from {urlsplit(session.settings.base_url).hostname}"
                else:
                    self._run = _within(2 * self.timeout, lambda: wandb.init(mode="online", **run))
            except Exception as error:
                why = _reason(error)
                _teardown()  # the service holds the id of the run that failed to start
        if self._run is None:
            self._run = _within(2 * self.timeout, lambda: wandb.init(mode="offline", **run))
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        if not self._run.offline:
            return f"W&B: {self._run.url}"
        return f"W&B is offline{f' ({why})' if why else ''}: `wandb sync {Path(self._run.dir).parent}` uploads the run"

    def log(self, record: dict[str, Any]) -> None:
        """Log a record, flattened with "/". Never raises: the first failure is said, and is the last attempt.

        The loads of a layer's experts become their largest and smallest, times the number of experts (1.0 is
        balanced); other lists stay in metrics.jsonl only.
        """
        if self._run is None or self._failed:
            return
        try:
            self._run.log(dict(_flat(record)))
        except Exception as error:
            self._failed = True
            self._say(f"W&B stopped taking metrics, metrics.jsonl goes on: {_reason(error)}")

    def finish(self, summary: dict[str, Any] | None = None, exit_code: int = 0) -> None:
        """End the run with its final numbers; a nonzero exit code marks it as failed. Never raises.

        What the server has not taken within the timeout stays in the run folder, and one line says so.
        """
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.summary.update(dict(_flat(summary or {})))
            _within(2 * self.timeout, lambda: run.finish(exit_code))
        except Exception as error:
            folder = Path(run.dir).parent
            self._say(f"W&B did not end cleanly ({_reason(error)}): `wandb sync {folder}` uploads the rest")
        _teardown()  # its atexit hook does not run in a spawned worker


def _mode(mode: str) -> str:
    """`mode`, where auto yields to WANDB_MODE in any of W&B's spellings."""
    if mode != "auto":
        return mode
    spellings = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
    return spellings.get(os.environ.get("WANDB_MODE", ""), "auto")


def _answers(url: str, timeout: float) -> bool:
    """Whether the host of `url` accepts a connection within a few seconds. True, unasked, behind a proxy."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return True
    limit = min(timeout, 5.0)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    try:
        _within(limit, lambda: socket.create_connection(address, limit).close())
    except OSError:  # a TimeoutError too
        return False
    return True


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, or TimeoutError after `seconds`: in a thread, left behind where it is stuck.

    For what has no bound of its own: the resolution of a name, a service process that has stopped.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise TimeoutError(f"nothing after {seconds:g} s")
    return outcome.result()


def _teardown() -> None:
    """Stop wandb's service process. wandb exits this process where the service failed; that must not end training."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        _within(10, wandb.teardown)


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        name = f"{prefix}{key}"
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, dict):
            yield from _flat(value, f"{name}/")
        elif not isinstance(value, list | tuple):
            yield name, value
        elif value and name.startswith("expert_load/"):
            yield f"{name}/max", max(value) * len(value)
            yield f"{name}/min", min(value) * len(value)


class Tracker:
    """What the training loop sees: every record goes to metrics.jsonl and then to W&B, if there is one."""

    def __init__(self, jsonl: Jsonl, wandb: WandB | None = None):
        self._jsonl = jsonl
        self._wandb = wandb

    def log(self, record: dict[str, Any]) -> None:
        """Keep one step's record. Raises OSError where metrics.jsonl cannot be written (a full disk)."""
        self._jsonl.log(record)
        if self._wandb:
            self._wandb.log(record)

    def finish(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        """Close the record. `summary` holds the run's final numbers for W&B's table of runs."""
        self._jsonl.close()
        if self._wandb:
            self._wandb.finish(summary, exit_code)


class RunLog:
    """The run's notices for people, one line each with the local time, appended to `log.txt` and flushed."""

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, line: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
