"""`farspan train`: check everything, launch the workers, follow them, and say how it ended."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from launch import cluster, local, preflight
from launch.outcome import Outcome
from launch.preflight import Flight
from launch.progress import Progress

ENTRY = "train.build:run"
COUNTED_TOKENS = 20_000_000  # byte models are fitted to runs up to this long: about ten seconds and 2 GB


def train(overrides: list[str]) -> int:
    """Runs a job from its overrides. Returns the exit code. Raises UserError before any process is started."""
    began = time.monotonic()
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    config = preflight.configure(overrides)
    flight = preflight.clear(config, say)
    folder, lock = preflight.claim(config, resumed=config["resume"] is not None)
    if flight.cluster.kind == "none":
        local.warm("train.build")
    with lock:
        preflight.write_config(folder, config)
        start = f", from {flight.resume or flight.init_from}" if flight.resume or flight.init_from else ""
        say(f"run {folder}: {_place(flight)}{start}")
        progress = Progress(folder, flight.train.total_tokens, console=console, from_end=flight.resume is not None)
        outcome = _launch(flight, folder, progress, say)
        progress.close()
        if not outcome.ok:
            say(f"failed: {outcome.reason}")
            _say_where_to_continue(folder, say)
            return outcome.exit_code
        _report(flight, folder, say, time.monotonic() - began)
    return 0


def _launch(flight: Flight, folder: Path, progress: Progress, say: Callable[[str], None]) -> Outcome:
    order = {
        "config": flight.config,
        "run_dir": str(folder.resolve()),
        "device": flight.device,
        "resume": str(flight.resume.resolve()) if flight.resume else None,
        "init_from": str(flight.init_from.resolve()) if flight.init_from else None,
    }
    launcher: Callable[..., Outcome] = local.spawn if flight.cluster.kind == "none" else cluster.fit
    return launcher(
        ENTRY,
        order,
        workers=flight.cluster.workers,
        run_dir=folder,
        device=flight.device,
        threads=flight.threads,
        tick=progress.tick,
        say=say,
    )


def _place(flight: Flight) -> str:
    count = sum(math.prod(shape) for shape in flight.shapes.values())
    return (
        f"{count / 1e6:.1f}M parameters, {flight.train.total_tokens:,} tokens, {flight.cluster.workers} workers "
        f"(data {flight.data} x sequence {flight.sequence}) on {flight.device}, cluster={flight.cluster.kind}"
    )


def _say_where_to_continue(folder: Path, say: Callable[[str], None]) -> None:
    from train import checkpoint

    last = checkpoint.newest(folder / "checkpoints", lambda line: None)
    if last is None:
        say(f"no checkpoint was complete: farspan train resume={folder} starts again from step 0")
    else:
        say(f"farspan train resume={folder} goes on from {last.name}")


def _report(flight: Flight, folder: Path, say: Callable[[str], None], seconds: float) -> None:
    """The last lines: what was reached, beside what byte counts alone would reach, and where to look."""
    summary = preflight.read_summary(folder)
    if summary["stopped"]:
        say(f"stopped at step {summary['step']:,}; farspan train resume={folder} goes on")
        return
    if summary["heldout_loss"] is not None and summary["tokens"] <= COUNTED_TOKENS:
        from data.baseline import ngram_losses

        steps = range(summary["step"])
        seen = (s for step in steps for s in flight.batches.batch(flight.config["seed"], step))
        unigram, bigram, order4 = ngram_losses(seen, flight.batches.heldout()).values()
        say(
            f"held-out loss, nats per byte: {summary['heldout_loss']:.3f}  (byte models fitted on the same "
            f"{summary['tokens']:,} tokens: unigram {unigram:.3f}, bigram {bigram:.3f}, order-4 {order4:.3f})",
        )
    say(
        f"{seconds:.0f} s in all, {summary['seconds']:.0f} s of them training. The run is in {folder}:\n"
        f"  farspan generate {folder}             continue a prompt with it\n"
        f"  farspan train resume={folder} train.tokens=…   train it further\n"
        f"  {folder}/metrics.jsonl          every step, one JSON object a line",
    )
