"""The last lines of a run."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.preflight.checked import CheckedRun
from launch.run import rundir
from launch.shell import command
from train.settings import TrainSettings

COUNTED_TOKENS = 20_000_000  # byte models are fitted to runs up to this long: about ten seconds and 2 GB


def say_where_to_continue(folder: Path, again: str, say: Callable[[str], None]) -> None:
    from train.checkpoints import checkpoint

    last = checkpoint.newest(folder / "checkpoints", lambda line: None)
    if last is None and checkpoint.damaged(folder / "checkpoints"):
        say(f"no checkpoint is whole: {again} run.anew=true leaves them and begins at step 0")
    elif last is None:
        say(f"no checkpoint was complete: {again} starts again from step 0")
    else:
        say(f"{again} goes on from {last.name}")


def report(
    flight: CheckedRun, folder: Path, again: str, say: Callable[[str], None], began: float, *, brief: bool
) -> bool:
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


def _say_results(flight: CheckedRun, folder: Path, summary: dict[str, Any], say: Callable[[str], None]) -> None:
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
    seen = (s for step in steps for s in flight.batches.batch(flight.config.seed, step))
    unigram, bigram, order4 = ngram_losses(seen, flight.batches.heldout()).values()
    say(
        f"held-out loss, nats per byte: {summary['heldout_loss']:.3f}  (byte models fitted on the same "
        f"{summary['tokens']:,} tokens: unigram {unigram:.3f}, bigram {bigram:.3f}, order-4 {order4:.3f})",
    )


def _per_byte(flight: CheckedRun, summary: dict[str, Any]) -> str:
    """Returns what that is per byte of the held-out text, which other tokenizers can be compared by; "" of unknown
    text."""
    from train.evaluation.texts import bytes_per_target

    size = bytes_per_target(flight.batches)
    return f", per byte: {summary['heldout_loss'] / size:.3f}" if size else ""
