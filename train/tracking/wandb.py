"""A run in Weights & Biases: a copy of the record that may fail without harm.

Its system metrics are off on purpose: they would show one machine of many and take a core's time for it; the speeds and
memory that matter are in the record. So are its capture of the console (log.txt has it) and its search for a git
repository (workers on a cluster run outside the checkout): commit and remote are told to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data import reading
from train.timeout import within
from train.tracking.facts import Facts, artifact_name
from train.tracking.panels import histograms, scalars
from train.tracking.record import records
from train.tracking.tracker import reason

PROJECT = "farspan"  # where nobody says another
LOCAL_S = 30.0  # for work on this machine, where no server is waited for; a busy machine takes seconds to start wandb


def mode_of(mode: str) -> str:
    """`mode`, where auto yields to WANDB_DISABLED, and to WANDB_MODE in any of W&B's spellings."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on", "y", "t"):
        return "disabled"
    spellings = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
    return spellings.get(os.environ.get("WANDB_MODE", ""), "auto")


@dataclass(frozen=True, kw_only=True)
class WandBOptions:
    """Holds what `Tracking` says to W&B, key by key; see there."""

    project: str | None = None
    mode: str = "auto"
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] | None = None
    timeout: float = 15
    artifacts: bool = True
    alerts: bool = True
    histograms: bool = True
    system: bool = False


class WandB:
    """The sink. wandb is imported by `start`.

    The run's id is kept in `wandb-id` in the run's folder: a resumed run continues the same W&B run. W&B's own step is
    the record's line in metrics.jsonl: it goes on where the last attempt ended, also offline, so that `wandb sync`
    appends the attempts of a run one after another, and a step that is trained again is one more point, not a refusal.
    Charts are over `tokens`.
    """

    name = "W&B"

    def __init__(self, options: WandBOptions, facts: Facts, say: Callable[[str], None]):
        self.patience = 4 * options.timeout + 2 * LOCAL_S
        self._options = options
        self._facts = facts
        self._say = say
        self._run: Any = None
        self._shift: int | None = None
        self._artifacts_failed = False
        self._best: float | None = None

    def start(self) -> None:
        """Begin, or continue, the W&B run, and say where it is. Raises what wandb does when not even offline works."""
        # wandb reports on itself to its makers, from offline runs too, unless told otherwise before it is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        run_dir = self._facts.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / "wandb-id"
        known = reading.text(id_file, 1 << 10).strip() if id_file.exists() else ""
        run_id = known if re.fullmatch(r"[\w-]{1,64}", known) else secrets.token_hex(4)  # it becomes a folder's name
        id_file.write_text(run_id + "\n")
        reached = (comparable(record) for record in records(run_dir / "metrics.jsonl"))
        self._best = min((loss for loss in reached if loss), default=None)
        self._say(self._begin(mode_of(self._options.mode), run_id))
        self._use_parent()

    def log(self, record: dict[str, Any], line: int) -> None:
        import wandb

        if self._shift is None:  # the server knows more lines than we do: a machine died, and the disk's end with it
            self._shift = max(0, self._run.starting_step - line)
        panels = scalars(record)
        if self._options.histograms:
            panels |= {name: wandb.Histogram(np_histogram=bins) for name, bins in histograms(record).items()}
        self._run.log(panels, step=line + self._shift, commit=True)
        loss = comparable(record)
        if loss is not None and (self._best is None or loss <= self._best):
            self._best = loss
            columns = ("step", "tokens", "heldout_loss", "heldout_tokens", "heldout_bits_per_byte", "heldout_accuracy")
            self._run.summary.update({f"best/{key}": record[key] for key in columns if key in record})

    def checkpoint(self, path: Path, facts: dict[str, Any]) -> None:
        """An artifact that refers to the folder. Its failure is said once, and the metrics go on."""
        if self._options.artifacts:
            try:
                within(2 * self._options.timeout, lambda: self._refer(path, facts))
            except Exception as error:
                if path.exists() and not self._artifacts_failed:  # else a newer one has pushed it out meanwhile
                    self._artifacts_failed = True
                    self._say(f"W&B did not take {path.name} as an artifact: {reason(error)}")

    def alert(self, title: str, text: str, level: str) -> None:
        if self._options.alerts:
            self._run.alert(title, text, level)

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """End the run; what the server has not taken within the timeout stays in the folder, and one line says so."""
        run, self._run = self._run, None
        try:
            run.summary.update(scalars(summary))
            within(2 * self._options.timeout, lambda: run.finish(exit_code))
        except Exception as error:
            folder = Path(run.dir).parent
            self._say(f"W&B did not end cleanly ({reason(error)}): `wandb sync {folder}` uploads the rest")
        _teardown()  # its atexit hook does not run in a spawned worker

    def _begin(self, mode: str, run_id: str) -> str:
        """Start wandb in the mode that works, and the line that says so."""
        import wandb

        timeout = self._options.timeout
        run = self._told(run_id)
        # What the session is told, login and init obey: without it they would talk, and ask for a key.
        session = wandb.setup(wandb.Settings(silent=True, console="off", mode="online", x_service_wait=LOCAL_S))
        why = ""
        if mode != "offline":
            try:
                if not wandb.login(prompt=False, verify=False):
                    why = "no API key" if mode == "online" else ""
                elif not _answers(session.settings.base_url, timeout):
                    why = f"no answer from {urlsplit(session.settings.base_url).hostname}"
                else:
                    self._run = within(2 * timeout, lambda: wandb.init(mode="online", **run))
            except Exception as error:
                why = reason(error)
                _teardown()  # the service holds the id of the run that failed to start
        if self._run is None:
            self._run = within(LOCAL_S, lambda: wandb.init(mode="offline", **run))
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        if not self._run.offline:
            return f"W&B: {self._run.url}"
        return f"W&B is offline{f' ({why})' if why else ''}: `wandb sync {Path(self._run.dir).parent}` uploads the run"

    def _told(self, run_id: str) -> dict[str, Any]:
        """The arguments of wandb.init."""
        import wandb

        options, facts = self._options, self._facts
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            git_commit=facts.code.get("commit"),
            git_remote_url=facts.code.get("remote"),
            save_code=False,
            x_disable_stats=not options.system,
            allow_val_change=True,  # a resumed run may have another layout
            init_timeout=options.timeout,
            finish_timeout=options.timeout,
            finish_timeout_raises=True,
        )
        return {
            "dir": str(facts.run_dir),
            "id": run_id,
            "name": facts.name,
            "config": {
                **facts.config,
                "code": facts.code,
                "lineage": facts.lineage,
                **({"parameters": facts.parameters} if facts.parameters else {}),
            },
            "project": options.project or PROJECT,
            "entity": options.entity,
            "group": options.group,
            "job_type": options.job_type or ("continue" if facts.lineage else "train"),
            "tags": list(options.tags or ()),
            "resume": "allow",
            "reinit": "create_new",
            "settings": settings,
        }

    def _use_parent(self) -> None:
        """Draw the line from the parent's checkpoint to this run in W&B's graph, where both are there to be joined."""
        lineage = self._facts.lineage
        if self._run.offline or not self._options.artifacts or not lineage.get("wandb_id"):
            return
        owner = [lineage.get("entity") or self._run.entity, lineage.get("project") or self._options.project or PROJECT]
        name = "/".join([*owner, lineage["artifact"]])
        try:
            within(self._options.timeout, lambda: self._run.use_artifact(name))
        except Exception as error:
            self._say(f"W&B does not show the parent's checkpoint {name}: {reason(error)}")

    def _refer(self, path: Path, facts: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(artifact_name(self._facts.name), type="model", metadata=facts)
        artifact.add_reference(path.resolve().as_uri(), checksum=False)  # without: neither read nor copied
        self._run.log_artifact(artifact, aliases=[f"step-{facts['step']}"])


def _answers(url: str, timeout: float) -> bool:
    """Says whether the host of `url` accepts a connection within a few seconds. True, unasked, behind a proxy."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return True
    limit = min(timeout, 5.0)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    try:
        within(limit, lambda: socket.create_connection(address, limit).close())
    except OSError:  # a TimeoutError too
        return False
    return True


def _teardown() -> None:
    """Stop wandb's service process. wandb exits this process where the service failed; that must not end training."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        within(10, wandb.teardown)


def comparable(record: dict[str, Any]) -> float | None:
    """Returns the held-out loss on what every evaluation of the run reads: an evaluation of more has it beside."""
    part = record.get("heldout_part")
    return part.get("loss") if isinstance(part, dict) else record.get("heldout_loss")
