"""A run that the checks have passed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.run_config import RunConfig
from train.settings import ClusterSettings, TrainSettings


@dataclass(frozen=True)
class CheckedRun:
    """A run that may start: its configuration, and what the checks have built or found on the way."""

    config: RunConfig
    device: str
    data: int
    sequence: int
    shapes: dict[str, tuple[int, ...]]
    batches: Any
    resume: Path | None = None
    init_from: Path | None = None

    @property
    def train(self) -> TrainSettings:
        return self.config.train

    @property
    def cluster(self) -> ClusterSettings:
        return self.config.cluster

    @property
    def threads(self) -> int | None:
        """CPU threads of each worker; None on a cluster, where its machines' own cores decide."""
        if self.cluster.kind == "ray":
            return self.cluster.threads
        return self.cluster.threads or max(1, cores() // self.cluster.workers)

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh's axes, outermost first."""
        return {"data": self.data, "sequence": self.sequence}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
