"""Dispatch of a run: to this machine, or to a cluster elsewhere as a job."""

from rich.console import Console

from launch.cluster import nodes
from launch.runner import submit
from launch.runner.attempts import here
from launch.runner.result import RunResult
from train.run_config import RunConfig


def run(config: RunConfig, console: Console, *, brief: bool = False, again: str | None = None) -> RunResult:
    """Runs a composed configuration to its end, here or as a job that is followed. Raises UserError as `train` does.

    brief: one of several: nothing is said about what to do with it. again: the command that goes on with it here.
    """
    if config.cluster.kind == "ray" and nodes.is_remote(nodes.address_of(config.cluster.address)):
        return submit.attached(config, console)
    return here(config, console, brief=brief, again=again)
