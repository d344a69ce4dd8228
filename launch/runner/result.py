"""The result of a run, and the job that it may have been."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.shell import command, override


@dataclass(frozen=True)
class RunResult:
    """The end of a run. code: the exit code. folder: the run's, None where it was not made. stopped: asked to stop."""

    code: int
    folder: Path | None = None
    stopped: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class JobContext:
    """A job's knowledge of itself: its id and the cluster's address as its user sees them, the device, the code."""

    job: str
    address: str
    device: str
    code: dict[str, Any]

    @property
    def again(self) -> str:
        """The command that resumes it."""
        return command("submit", override("resume", self.job), override("cluster.address", self.address))


NOTHING_WRITTEN = "stopped before the run started: nothing was written"
