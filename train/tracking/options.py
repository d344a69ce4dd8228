"""Tracking: who gets a copy of a run's record, metrics.jsonl."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args

from train.run_config import ObjectConfig
from train.tracking.facts import Facts
from train.tracking.record import JsonlWriter
from train.tracking.tensorboard import TensorBoard
from train.tracking.tracker import Sink, Tracker
from train.tracking.wandb import PROJECT, WandB, WandBOptions, mode_of

LONGEST_S, MOST_RECORDS = 24 * 3600, 1 << 24
TrackingMode = Literal["auto", "offline", "online", "disabled"]
MODES = get_args(TrackingMode)


BADLY = {"project": "/\\#?%:"}  # letters that W&B refuses
LONGEST, LONGEST_TAG = 128, 64
ENVIRONMENT = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "group": "WANDB_RUN_GROUP"}
ENVIRONMENT |= {"job_type": "WANDB_JOB_TYPE", "tags": "WANDB_TAGS"}


def check_text(key: str, text: str | None, without: str, longest: int) -> None:
    """Raises ValueError for what W&B would refuse when the run has started."""
    if text is None:
        return
    if not text.strip() or len(text) > longest:
        raise ValueError(f"{key}={text[:40]}: must have 1 to {longest} letters, as W&B takes them")
    if wrong := sorted(set(text) & set(without)):
        raise ValueError(f"{key}={text}: must be without {' '.join(wrong)}, which W&B refuses")


def obey_environment(tracking: ObjectConfig) -> ObjectConfig:
    """The tracker's configuration with W&B's own environment where it is silent, so that workers on other machines, and
    the run when it goes on, have it. Raises ValueError for a value that W&B would refuse."""
    given: dict[str, Any] = {}
    for key, variable in ENVIRONMENT.items():
        value = os.environ.get(variable)
        if not value or tracking.get(key, "") is not None:
            continue
        values = [tag.strip() for tag in value.split(",") if tag.strip()] if key == "tags" else value
        for text in values if isinstance(values, list) else [values]:
            check_text(variable, text, BADLY.get(key, ""), LONGEST_TAG if key == "tags" else LONGEST)
        given[key] = values
    if tracking.get("project", "") is None and "project" not in given:
        given["project"] = PROJECT
    return tracking.having(**given) if given else tracking


class Tracking:
    """Training neither waits for those who get one nor ends with them. W&B is Weights & Biases.

    mode          what W&B gets. auto: what WANDB_MODE or WANDB_DISABLED says, else online where a key is found
                  (WANDB_API_KEY, W&B's settings, netrc) and offline elsewhere; online: offline all the same where there
                  is no key or the server does not answer; offline: written to the run folder, for `wandb sync` later;
                  disabled: no W&B
    project       W&B's project, where the run appears; null for what WANDB_PROJECT says, else farspan
    entity        W&B's user or team that has the project; null for what WANDB_ENTITY says, else the account's own
    group         runs of one group stand together in W&B; null for what WANDB_RUN_GROUP says, else none
    job_type      W&B's word for the kind of run; null for what WANDB_JOB_TYPE says, else "train", or "continue" where
                  the weights come from another run
    tags          W&B's labels of the run; null for what WANDB_TAGS says, else none
    timeout       seconds that the server may take to answer at the start, and to receive what is left at the end.
                  Training does not wait for the start; the end of the run waits a few times as long, at worst
    queue         records kept for a sink that is slow; those that find it full are dropped for it, and counted
    artifacts     tell W&B of each checkpoint, as a reference to its folder; nothing is uploaded
    alerts        have W&B send a message when the run fails, or goes on in another attempt
    histograms    chart where routers sent the tokens and how long documents were, in W&B and TensorBoard
    norms         chart the norms of each layer's gradients and weights, at every step
    system        have W&B chart the machine of rank 0: its cores, memory, disk, network and GPUs
    tensorboard   write RUN/tensorboard too

    Raises ValueError, one line that opens with the key, for a value out of range.
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        mode: TrackingMode = "auto",
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] | None = None,
        timeout: float = 15,
        queue: int = 1024,
        artifacts: bool = True,
        alerts: bool = True,
        histograms: bool = True,
        norms: bool = False,
        system: bool = False,
        tensorboard: bool = False,
    ):
        if mode not in MODES:
            raise ValueError(f"tracking.mode: got {mode!r}, accepts {', '.join(MODES)}")
        if not isinstance(timeout, int | float) or not 0 < timeout <= LONGEST_S:
            raise ValueError(f"tracking.timeout: got {timeout!r}, accepts a number of seconds above 0, up to a day")
        if not isinstance(queue, int) or isinstance(queue, bool) or not 1 <= queue <= MOST_RECORDS:
            raise ValueError(f"tracking.queue: got {queue!r}, accepts a number of records, at least 1")
        switches = {"artifacts": artifacts, "alerts": alerts, "histograms": histograms, "tensorboard": tensorboard}
        switches |= {"norms": norms, "system": system}
        for key, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"tracking.{key}: got {value!r}, accepts true or false")
        settings = {"project": project, "entity": entity, "group": group, "job_type": job_type}
        for key, text in settings.items():
            check_text(f"tracking.{key}", text, BADLY.get(key, ""), LONGEST)
        for i, tag in enumerate(tags or ()):
            check_text(f"tracking.tags[{i}]", tag, "", LONGEST_TAG)
        self.project = project
        self.mode = mode
        self.entity = entity
        self.group = group
        self.job_type = job_type
        self.tags = tags
        self.timeout = timeout
        self.queue = queue
        self.artifacts = artifacts
        self.alerts = alerts
        self.histograms = histograms
        self.norms = norms
        self.system = system
        self.tensorboard = tensorboard

    def _for_wandb(self) -> WandBOptions:
        return WandBOptions(**{option.name: getattr(self, option.name) for option in fields(WandBOptions)})

    def open(self, facts: Facts, say: Callable[[str], None]) -> Tracker:
        """The tracker of a run, for rank 0; its sinks start in their own threads, and `say` takes lines from these.

        Continues the metrics.jsonl of the run's folder. Raises OSError where it cannot be written.
        """
        log = JsonlWriter(facts.run_dir / "metrics.jsonl")
        sinks: list[Sink] = [TensorBoard(facts, with_histograms=self.histograms)] if self.tensorboard else []
        if mode_of(self.mode) != "disabled":
            sinks.append(WandB(self._for_wandb(), facts, say))
        return Tracker(log, sinks, queue=self.queue, timeout=self.timeout, say=say)
