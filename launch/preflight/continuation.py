"""A run that goes on from another: where its schedule begins, and what of the other's optimizer there is to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.preflight.checked import CheckedRun
from train import configuration
from train.run_config import ObjectConfig
from train.settings import TrainSettings, section

JUMP = 0.01  # of the larger rate: less than that from one schedule to the next is not worth a line


def settled(run: CheckedRun, say: Callable[[str], None]) -> CheckedRun:
    """The run with numbers where its schedule says null, which it keeps: resumed later, it has the same curve.

    Checks the schedule, and the optimizer's state, against the checkpoint. Raises ValueError.
    """
    _moments(run)
    before = _before(run)
    node, rate = run.config.schedule, run.config.optimizer["lr"]
    if node.get("begin", 0) is None:
        node = node.having(begin=before.tokens if before and run.resume else 0)
    if node.get("start", 0) is None:
        node = node.having(start=node.build().start if before is None or not rate else before.rate / rate)
    schedule, total = node.build(), run.train.total_tokens
    schedule.check(total, max(run.train.ramp.sizes))
    run = replace(run, config=replace(run.config, schedule=node))
    if before is None or not run.resume:
        return run
    after = rate * schedule.multiplier(before.tokens, total)
    if abs(after - before.rate) > JUMP * max(after, before.rate):
        say(
            f"schedule: at token {before.tokens:,} the learning rate goes from {before.rate:.3g} to {after:.3g} at "
            "once (schedule=rewarm rises from where it is, schedule=anneal falls from there)"
        )
    return run


class Before:
    """tokens: that a checkpoint's run had trained on. rate: the learning rate that its schedule had there."""

    def __init__(self, tokens: int, rate: float):
        self.tokens, self.rate = tokens, rate


def _before(flight: CheckedRun) -> Before | None:
    """Reads the checkpoint that the run goes on from; None for a folder of weights alone, which tells nothing."""
    path = flight.resume or flight.init_from
    config = _config(path) if path else None
    if path is None or config is None:
        return None
    from train.checkpoints import checkpoint

    train = section(TrainSettings, _known(config["train"]))
    tokens = train.reached(checkpoint.manifest(path))
    schedule = ObjectConfig(config["schedule"]).build()
    rate = config["optimizer"]["lr"] * schedule.multiplier(tokens, train.total_tokens)
    return Before(tokens, rate)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Those that say how long a run is: another version of farspan may have written others."""
    return {key: values[key] for key in ("tokens", "steps", "batch_tokens") if key in values}


def _config(path: Path) -> dict[str, Any] | None:
    """The configuration that a checkpoint carries, or its run; None where that trains nothing. Raises ValueError."""
    for folder in (path, path.parent.parent):
        if (folder / configuration.CONFIG).exists():
            try:
                config = configuration.read(folder)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
            return config if {"train", "optimizer", "schedule"} <= config.keys() else None
    return None


def _moments(flight: CheckedRun) -> None:
    wanted, path = flight.train.init_optimizer, flight.init_from
    if wanted == "reset" or flight.resume is not None:
        return
    if path is None:
        raise ValueError(f"train.init_optimizer={wanted}: must be reset without init_from")
    from train.checkpoints import checkpoint

    if not checkpoint.has_moments(path):
        raise ValueError(f"train.init_optimizer={wanted}: must be reset, {path} holds no optimizer state")
    config, own = _config(path), _name(flight.config.optimizer.values)
    if config is not None and (was := _name(config["optimizer"])) != own:
        raise ValueError(f"train.init_optimizer={wanted}: must be reset, {path} is of {was}, and this run of {own}")


def _name(node: Mapping[str, Any]) -> str:
    """The name of the class that a node builds, wherever that lies: torch's AdamW and another have the same state."""
    return node["_target_"].rpartition(".")[2]
