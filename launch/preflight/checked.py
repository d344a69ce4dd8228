"""A run that the checks have passed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.schedule.mesh import Mesh
from train.run_config import RunConfig
from train.settings import ClusterSettings, TrainSettings


@dataclass(frozen=True)
class CheckedRun:
    """A run that may start: its configuration, and what the checks have built or found on the way."""

    config: RunConfig
    device: str
    mesh: Mesh
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
    def data(self) -> int:
        """The number of groups of ranks that have sequences of their own."""
        return self.mesh.split[0]

    @property
    def sequence(self) -> int:
        """The number of ranks that share each sequence."""
        return self.mesh.sequence

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh's dimensions, outermost first: data and sequence, and those that divide something."""
        return {name: n for name, n in self.mesh.sizes.items() if n > 1 or name in ("data", "sequence")}

    @property
    def layout(self) -> str:
        """The same for people."""
        return " x ".join(f"{name} {size}" for name, size in self.sizes.items())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
