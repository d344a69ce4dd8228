"""`farspan train`: a new run, a resumed one, or a chain of them."""

from collections.abc import Callable
from pathlib import Path

from launch.config.compose import composed
from launch.errors import UserError
from launch.preflight.configure import configure
from launch.runner.result import NOTHING_WRITTEN


def train(overrides: list[str]) -> int:
    """Runs a job from its overrides. Returns the exit code. Raises UserError before any process is started."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    try:
        settled = automatic(overrides, lambda line: console.print(line, markup=False))
        if settled is None:
            return 0
        overrides = settled
        config = configure(overrides)
        if config.stages or config.resume:
            from launch.extend import chain

            if chain.is_chain(config):
                return chain.extend(config, overrides, console).code
    except KeyboardInterrupt:
        console.print(NOTHING_WRITTEN, markup=False)
        return 0
    from launch.runner.dispatch import run  # what starts processes is imported when there is something to start

    return run(config, console).code


def automatic(overrides: list[str], say: Callable[[str], None]) -> list[str] | None:
    """The overrides that `resume=auto` stands for; None where the run is complete. Raises UserError.

    Of a new run those that are given. Where run.dir holds one it is resumed, in its own configuration with the cluster
    that is given.
    """
    if "resume=auto" not in overrides:
        return overrides
    others = [override for override in overrides if override != "resume=auto"]
    given = next((override for override in reversed(others) if override.startswith("run.dir=")), None)
    if given is None or (given_folder := composed(others).run.dir) is None:
        raise UserError("resume=auto: needs run.dir, the folder of the run, there or not")
    from launch.run import status
    from launch.runner.attempts import await_lock

    folder = Path(given_folder).expanduser()
    await_lock(folder, say)
    if not (folder / "config.yaml").exists():
        return others
    if status.read(folder).state == "complete":
        say(f"run {folder} is complete")
        return None
    say(f"resume=auto: the run in {folder} goes on, in its own configuration")
    others_left = [override for override in others if override.lstrip("+").split(".")[0].split("=")[0] == "cluster"]
    return [*others_left, f"resume={given.partition('=')[2]}"]
