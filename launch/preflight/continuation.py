"""A run that goes on from another: where its schedule begins, and what of the other's optimizer there is to keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import configuration
from train.settings import TrainSettings, section

if TYPE_CHECKING:
    from launch.preflight.checked import CheckedRun

JUMP = 0.01  # of the larger rate: less than that from one schedule to the next is not worth a line


def settle(flight: CheckedRun, say: Callable[[str], None]) -> None:
    """Puts numbers where the schedule says null, and checks it, and the optimizer's state, against the checkpoint.

    In the configuration itself, which the run keeps: resumed later, it has the same curve. Raises ValueError.
    """
    from train.instantiate import construct

    _moments(flight)
    before = _before(flight)
    node, rate = flight.config["schedule"], flight.config["optimizer"]["lr"]
    begin = before.tokens if before and flight.resume else 0
    if node.get("begin", 0) is None:
        node["begin"] = begin
    if node.get("start", 0) is None:
        node["start"] = construct(node).start if before is None or not rate else before.rate / rate
    schedule, total = construct(node), flight.train.total_tokens
    schedule.check(total, max(flight.train.ramp.sizes))
    if before is None or not flight.resume:
        return
    after = rate * schedule.multiplier(before.tokens, total)
    if abs(after - before.rate) > JUMP * max(after, before.rate):
        say(
            f"schedule: at token {before.tokens:,} the learning rate goes from {before.rate:.3g} to {after:.3g} at "
            "once (schedule=rewarm rises from where it is, schedule=anneal falls from there)"
        )


class Before:
    """tokens: that a checkpoint's run had trained on. rate: the learning rate that its schedule had there."""

    def __init__(self, tokens: int, rate: float):
        self.tokens, self.rate = tokens, rate


def _before(flight: CheckedRun) -> Before | None:
    """Of the checkpoint that the run goes on from, where it tells; a folder of weights alone does not."""
    from train.checkpoints import checkpoint
    from train.instantiate import construct

    path = flight.resume or flight.init_from
    config = _config(path) if path else None
    if path is None or config is None:
        return None
    train = section(TrainSettings, _known(config["train"]))
    tokens = train.reached(checkpoint.manifest(path))
    rate = config["optimizer"]["lr"] * construct(config["schedule"]).multiplier(tokens, train.total_tokens)
    return Before(tokens, rate)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Those that say how long a run is: another version of farspan may have written others."""
    return {key: values[key] for key in ("tokens", "steps", "batch_tokens") if key in values}


def _config(path: Path) -> dict[str, Any] | None:
    """The configuration that a checkpoint carries, or its run; None where that trains nothing. Raises ValueError."""
    for folder in (path, path.parent.parent):
        if (folder / configuration.CONFIG).exists():
            try:
                found = configuration.read(folder)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
            return found if {"train", "optimizer", "schedule"} <= found.keys() else None
    return None


def _moments(flight: CheckedRun) -> None:
    from train.checkpoints import checkpoint

    asked, path = flight.train.init_optimizer, flight.init_from
    if asked == "reset" or flight.resume is not None:
        return
    if path is None:
        raise ValueError(f"train.init_optimizer={asked}: must be reset without init_from")
    if not checkpoint.has_moments(path):
        raise ValueError(f"train.init_optimizer={asked}: must be reset, {path} holds no optimizer state")
    config, own = _config(path), _name(flight.config["optimizer"])
    if config is not None and (was := _name(config["optimizer"])) != own:
        raise ValueError(f"train.init_optimizer={asked}: must be reset, {path} is of {was}, and this run of {own}")


def _name(node: dict[str, Any]) -> str:
    """Of the class that it builds, wherever that lies: torch's AdamW and another have the same state."""
    return node["_target_"].rpartition(".")[2]
