"""`farspan train`: check everything, launch the workers, follow them, and say how it ended."""

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch import cluster, local, nodes, paths, preflight, rundir, status
from launch.config.compose import composed
from launch.outcome import Outcome
from launch.preflight import Flight
from launch.progress import Progress
from launch.shell import command, override
from launch.stopping import stop_file
from launch.user import UserError
from train.settings import TrainSettings

ENTRY = "train.build:run"
LOCK_S = 300.0  # seconds that a run on a cluster waits for the end of another that has its folder
_TURN_S = 0.5
COUNTED_TOKENS = 20_000_000  # byte models are fitted to runs up to this long: about ten seconds and 2 GB


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: the exit code. folder: the run's, None where it was not made. stopped: asked to stop."""

    code: int
    folder: Path | None = None
    stopped: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Hosted:
    """What a job knows of itself: its id and the cluster's address as its user sees them, the device, the code."""

    job: str
    address: str
    device: str
    code: dict[str, Any]

    @property
    def again(self) -> str:
        """The command that resumes it."""
        return command("submit", override("resume", self.job), override("cluster.address", self.address))


def train(overrides: list[str]) -> int:
    """Runs a job from its overrides. Returns the exit code. Raises UserError before any process is started."""
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    try:
        settled = automatic(overrides, lambda line: console.print(line, markup=False))
        if settled is None:
            return 0
        overrides = settled
        config = preflight.configure(overrides)
        if config["stages"] or config["resume"]:
            from launch.extend import chain

            if chain.is_chain(config):
                return chain.extend(config, overrides, console).code
    except KeyboardInterrupt:
        console.print(_NOTHING, markup=False)
        return 0
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
    if given is None or (asked := composed(others)["run"]["dir"]) is None:
        raise UserError("resume=auto: needs run.dir, the folder of the run, there or not")
    folder = Path(asked).expanduser()
    _await_lock(folder, say)
    if not (folder / "config.yaml").exists():
        return others
    if status.read(folder).state == "complete":
        say(f"run {folder} is complete")
        return None
    say(f"resume=auto: the run in {folder} goes on, in its own configuration")
    kept = [override for override in others if override.lstrip("+").split(".")[0].split("=")[0] == "cluster"]
    return [*kept, f"resume={given.partition('=')[2]}"]


def _await_lock(folder: Path, say: Callable[[str], None]) -> None:
    """Wait for the process that has a run to end, for a bounded time: machines that were replaced may end slowly."""
    deadline = time.monotonic() + LOCK_S
    if rundir.locked(folder):
        say(f"waiting for run.dir={folder}: in use by another run; {LOCK_S:.0f} s at most")
    while rundir.locked(folder) and time.monotonic() < deadline:
        time.sleep(_TURN_S)


_NOTHING = "stopped before the run started: nothing was written"


def run(config: dict[str, Any], console: Console, *, brief: bool = False, again: str | None = None) -> Ended:
    """Runs a composed configuration to its end, here or as a job that is followed. Raises UserError as `train` does.

    brief: one of several: nothing is said about what to do with it. again: the command that goes on with it here.
    """
    settings = config["cluster"]
    if settings["kind"] == "ray" and nodes.is_remote(nodes.address_of(settings["address"])):
        from launch import submit

        return submit.attached(config, console)
    return here(config, console, brief=brief, again=again)


def here(
    config: dict[str, Any],
    console: Console,
    hosted: Hosted | None = None,
    *,
    brief: bool = False,
    again: str | None = None,
) -> Ended:
    """Runs a composed configuration from this machine; SIGINT and SIGTERM save, and end it with exit code 0."""
    began = time.monotonic()
    folder: Path | None = None

    def say(line: str) -> None:
        console.print(line, markup=False)

    try:
        flight = preflight.clear(config, say, device=hosted.device if hosted else None)
        code = hosted.code if hosted else rundir.code_version()
        anew = config["run"].get("anew", False)
        if config["cluster"]["kind"] == "ray" and config["run"]["dir"]:
            _await_lock(Path(config["run"]["dir"]), say)
        folder, lock = rundir.claim(config, resumed=config["resume"] is not None)
        again = hosted.again if hosted else again or command("train", override("resume", folder))
        with lock:
            paths.make_absolute(config)
            try:
                rundir.write_config(folder, config, code)
            except UserError:
                if config["resume"] is None:
                    rundir.withdraw(folder)
                raise
            _turn_away(flight, folder, say, anew=anew)
            if hosted:
                _note_job(folder, hosted)
            if flight.cluster.kind == "none":
                local.warm("train.build", "hydra.utils")
            start = f", from {flight.resume or flight.init_from}" if flight.resume or flight.init_from else ""
            say(f"run {folder}: {_place(flight)}{start}")
            _say_missing(flight, folder, say)
            outcome = _attempts(flight, folder, code, hosted, console, say)
            stop_file(folder).unlink(missing_ok=True)
            if outcome.ok:
                return Ended(0, folder, _report(flight, folder, again, say, began, brief=brief))
            say(f"failed: {outcome.reason}")
            if outcome.exit_code == 2:
                rundir.withdraw(folder)
            else:
                _say_where_to_continue(folder, again, say)
            return Ended(outcome.exit_code, folder, False, outcome.reason)
    except KeyboardInterrupt:  # outside of the launchers, which have their own way to hear it
        if folder is None:
            say(_NOTHING)
        else:
            say("stopped while no worker was running")
            _say_where_to_continue(folder, again or "", say)
        return Ended(0, folder, True)


def _say_missing(flight: Flight, folder: Path, say: Callable[[str], None]) -> None:
    """A record that was cut, by a full disk or a lost machine, before the step that the weights are of."""
    from train import checkpoint

    if flight.resume is None:
        return
    records, saved = status.tail(folder / "metrics.jsonl"), checkpoint.manifest(flight.resume)["step"]
    last = max((record["step"] for record in records), default=0)
    if last < saved:
        steps = f"step {saved:,}" if last + 1 == saved else f"steps {last + 1:,} to {saved:,}"
        say(f"{folder}/metrics.jsonl has no record of {steps}, which {flight.resume.name} has been trained on")


def _turn_away(flight: Flight, folder: Path, say: Callable[[str], None], *, anew: bool) -> None:
    """Sets aside what a resumed run does not go on from: later checkpoints than the one that was named, and damaged
    ones where it begins `anew`. The next attempt would else take them up."""
    from train import checkpoint

    place, chosen = folder / "checkpoints", flight.resume
    if anew:
        away = list(checkpoint.damaged(place))
    elif chosen is not None and rundir.is_checkpoint(Path(flight.config["resume"])):
        away = [p for p in checkpoint.complete(place) if checkpoint.step_of(p) > checkpoint.step_of(chosen)]
    else:
        return
    for path in away:
        say(f"{path.name} is now {checkpoint.set_aside(path).name}, which nothing reads; remove it when you will")


def _attempts(
    flight: Flight,
    folder: Path,
    code: dict[str, Any],
    hosted: Hosted | None,
    console: Console,
    say: Callable[[str], None],
) -> Outcome:
    """Launches the workers, and again from the last checkpoint when one or a machine was lost.

    `cluster.restarts` of them may follow each other without a new checkpoint in between.
    """
    from train import checkpoint

    left, before, again = flight.cluster.restarts, flight.resume, False
    while True:
        # What its files hold now is of an earlier attempt, though that may have left no checkpoint to go on from.
        progress = Progress(folder, flight.train.total_tokens, console=console, from_end=True)
        outcome = _launch(flight, folder, code, hosted, progress, say, again=again)
        progress.close()
        if outcome.ok or not outcome.lost or stop_file(folder).exists():
            return outcome
        found = checkpoint.newest(folder / "checkpoints", lambda line: None)
        if found is None and checkpoint.damaged(folder / "checkpoints"):
            return outcome  # to begin again is for a person to say
        flight.resume = found or flight.resume
        if flight.resume != before:
            left, before = flight.cluster.restarts, flight.resume
        if not left:
            return outcome
        left, again = left - 1, True
        since = f"from {flight.resume.name}" if flight.resume else "from the start: no checkpoint was complete"
        say(f"lost: {outcome.reason}")
        say(f"another attempt goes on {since}; {left} more may follow before the next checkpoint")


def _launch(
    flight: Flight,
    folder: Path,
    code: dict[str, Any],
    hosted: Hosted | None,
    progress: Progress,
    say: Callable[[str], None],
    *,
    again: bool,
) -> Outcome:
    order = {
        "config": flight.config,
        "run_dir": str(folder.resolve()),
        "device": flight.device,
        "code": code,
        "resume": str(flight.resume.resolve()) if flight.resume else None,
        "init_from": str(flight.init_from.resolve()) if flight.init_from else None,
    }
    ours: dict[str, Any] = {
        "workers": flight.cluster.workers,
        "run_dir": folder,
        "device": flight.device,
        "threads": flight.threads,
        "tick": progress.tick,
        "say": say,
    }
    if flight.cluster.kind == "none":
        return local.spawn(ENTRY, order, **ours)
    if flight.cluster.kind == "local":
        return cluster.fit(ENTRY, order, **ours)
    address = "auto" if hosted else nodes.address_of(flight.cluster.address)
    return cluster.fit(ENTRY, order, **ours, address=address, sizes=flight.sizes, patient=again)


def _note_job(folder: Path, hosted: Hosted) -> None:
    """The run remembers the jobs that it was, so that each of their ids finds it."""
    line = json.dumps({"job": hosted.job, "address": hosted.address, "time": time.time()})
    with (folder / rundir.JOBS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _place(flight: Flight) -> str:
    count = sum(math.prod(shape) for shape in flight.shapes.values())
    return (
        f"{count / 1e6:.1f}M parameters, {flight.train.total_tokens:,} tokens, {flight.cluster.workers} workers "
        f"(data {flight.data} x sequence {flight.sequence}) on {flight.device}, cluster={flight.cluster.kind}"
    )


def _say_where_to_continue(folder: Path, again: str, say: Callable[[str], None]) -> None:
    from train import checkpoint

    last = checkpoint.newest(folder / "checkpoints", lambda line: None)
    if last is None and checkpoint.damaged(folder / "checkpoints"):
        say(f"no checkpoint is whole: {again} run.anew=true leaves them and begins at step 0")
    elif last is None:
        say(f"no checkpoint was complete: {again} starts again from step 0")
    else:
        say(f"{again} goes on from {last.name}")


def _report(flight: Flight, folder: Path, again: str, say: Callable[[str], None], began: float, *, brief: bool) -> bool:
    """The last lines: what was reached, beside what byte counts alone would reach, and where to look.

    Returns whether the run was stopped before its end.
    """
    try:
        summary = rundir.read_summary(folder)
    except FileNotFoundError:
        say(f"stopped before the first step; {again} starts it")
        return True
    if summary["stopped"]:
        say(f"stopped at step {summary['step']:,}; {again} goes on")
        return True
    if brief:
        return False
    try:
        _say_results(flight, folder, summary, say)
    except KeyboardInterrupt:
        say("the run is complete")
    say(
        f"{time.monotonic() - began:.0f} s in all, {summary['seconds']:.0f} s of them training. "
        f"The run is in {folder}:\n"
        f"  {command('generate', shlex.quote(str(folder)))}  # continue a prompt with it\n"
        f"  {again} {_twice(flight.train)}  # train it further\n"
        f"  {folder}/metrics.jsonl has every step, one JSON object a line",
    )
    return False


def _twice(train: TrainSettings) -> str:
    """The override that gives a run as much again."""
    return f"train.tokens={2 * train.total_tokens}" if train.steps is None else f"train.steps={2 * train.steps}"


def _say_results(flight: Flight, folder: Path, summary: dict[str, Any], say: Callable[[str], None]) -> None:
    from data.baseline import ngram_losses
    from data.tokenizer import Bytes

    if summary["heldout_loss"] is None:
        return
    for what, verb in (("forgetting", "rose"), ("adaptation", "fell")):
        for name, nats in summary.get(what, {}).items():
            now = summary["heldout"][name]["loss"]
            before = now - nats if what == "forgetting" else now + nats
            say(f"{what}: the held-out loss on {name} {verb} by {nats:.3f}, from {before:.3f} to {now:.3f}")
    if flight.batches.chance is not None:
        say(
            f"held-out answers: {summary['heldout_accuracy']:.1%} right (guessing: {flight.batches.chance:.1%}), "
            f"{summary['heldout_loss']:.3f} nats each"
        )
        return
    if flight.batches.vocab_size != Bytes.size:
        say(f"held-out loss, nats per token: {summary['heldout_loss']:.3f}{_per_byte(flight, summary)}")
        return
    if summary["tokens"] > COUNTED_TOKENS:
        return
    steps = range(summary["step"])
    seen = (s for step in steps for s in flight.batches.batch(flight.config["seed"], step))
    unigram, bigram, order4 = ngram_losses(seen, flight.batches.heldout()).values()
    say(
        f"held-out loss, nats per byte: {summary['heldout_loss']:.3f}  (byte models fitted on the same "
        f"{summary['tokens']:,} tokens: unigram {unigram:.3f}, bigram {bigram:.3f}, order-4 {order4:.3f})",
    )


def _per_byte(flight: Flight, summary: dict[str, Any]) -> str:
    """What that is per byte of the held-out text, which other tokenizers can be compared by; "" of unknown text."""
    from train.evaluation.texts import bytes_per_target

    size = bytes_per_target(flight.batches)
    return f", per byte: {summary['heldout_loss'] / size:.3f}" if size else ""
