"""Measured costs of a model on a machine: the file that `farspan plan cost.profile=true` writes and training reads.

A layer's seconds are pair · pairs + token · tokens + launch, forward and backward, fitted for each kind of layer; wires
are a latency and a bandwidth for each size of group. Bytes, of memory and of messages, are not measured: the model's
shapes say them exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from data import reading
from parallel.schedule.adaptive.cost import Costs, Layer, Messages, Wire
from train.run_config import RunConfig

FORMAT = 2
LONGEST = 1 << 20  # bytes of a file


@dataclass(frozen=True)
class LayerCost:
    """The costs of `count` layers of one kind: seconds a pair of a query and a key, a token, and whatever it holds.
    shared: by the size of a group of several ranks, seconds more that a rank computes whatever it holds, and a token of
    its own. error: of the fit, relative, on average and at worst."""

    kind: str
    count: int
    pair: float
    token: float
    launch: float
    window: int | None = None
    error: tuple[float, float] = (0.0, 0.0)
    shared: dict[int, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.count >= 1 and min(self.pair, self.token, self.launch) >= 0):
            raise ValueError(f"layers {self.kind} have {self.count} layers of negative seconds")
        if any(size < 2 or min(seconds) < 0 for size, seconds in self.shared.items()):
            raise ValueError(f"layers {self.kind} of several ranks have negative seconds")

    def messages(self, sizes: Sequence[int]) -> tuple[tuple[int, Messages], ...]:
        """Seconds of a rank in groups of these sizes; the largest that was measured stands for larger ones."""
        several = []
        for size in (size for size in sizes if size > 1 and self.shared):
            measured = max((s for s in self.shared if s <= size), default=min(self.shared))
            seconds, token = self.shared[measured]
            several.append((size, Messages(0.0, 0.0, 0.0, seconds, token / size)))
        return tuple(several)


@dataclass(frozen=True)
class CostProfile:
    """Constants of a model's layers and of a machine's wires. model: a digest, `model_key`. machine: `machine_name`.
    wires: (bandwidth, latency) by the size of a group. head: seconds a token of embedding, head and loss."""

    model: str
    machine: str
    layers: tuple[LayerCost, ...]
    head: float
    wires: dict[int, tuple[float, float]]

    @classmethod
    def read(cls, path: Path) -> CostProfile:
        """Raises ValueError for a file that is none."""
        try:
            card = reading.json_object(path)
            if card["format"] != FORMAT:
                raise ValueError(f"format {card['format']}")
            layers = tuple(_layer(each) for each in card["layers"])
            wires = {int(size): (float(b), float(latency)) for size, (b, latency) in card["wires"].items()}
            if not layers or any(b <= 0 or latency < 0 for b, latency in wires.values()):
                raise ValueError("no layers, or wires that carry nothing")
            return cls(str(card["model"]), str(card["machine"]), layers, float(card["head"]), wires)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is no profile of costs ({' '.join(str(error).split())[:80]})") from None

    def write(self, path: Path) -> None:
        """Writes the file aside, then renames it. Raises OSError where it cannot."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.partial")
        aside.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        aside.replace(path)

    def applied(self, costs: Costs, gathered: float, once: float) -> Costs:
        """Costs with these seconds in place of those from shapes. gathered: bytes of weights that a rank receives in a
        micro-step. once: those of weights and gradients in a step beside."""
        *_, rest = costs.model.layers  # its messages, of all layers together
        layers = [
            Layer(each.count, each.pair, each.token, each.window, by_size=each.messages(costs.sizes))
            for each in self.layers
        ]
        wires = {1: next(iter(self.wires.values()), (1e12, 0.0)), **self.wires}
        cluster = replace(costs.cluster, wires={size: Wire(*wire) for size, wire in wires.items()})
        launch, bandwidth = sum(each.count * each.launch for each in self.layers), math.inf
        if cluster.ranks > 1:
            bandwidth = cluster.wire(cluster.ranks).bandwidth
        layers, launch = [*layers, replace(rest, token=self.head)], launch + gathered / bandwidth
        model = replace(costs.model, layers=tuple(layers), launch=launch, once=once / bandwidth)
        return Costs(model, cluster, costs.sizes)

    def lines(self) -> list[str]:
        """The constants for people, a line a kind of layer and a line a size of group."""
        lines = [
            f"{each.count} x {each.kind}: {each.token * 1e6:.3g} µs a token, {each.pair * 1e9:.3g} ns a pair, "
            f"{each.launch * 1e3:.3g} ms whatever it holds; error {each.error[0]:.1%} on average, {each.error[1]:.1%} "
            "at worst"
            for each in self.layers
        ]
        for size in sorted({size for each in self.layers for size in each.shared}):
            more = [(each.count, *each.shared[size]) for each in self.layers if size in each.shared]
            fixed, token = (sum(n * pair[i] for n, *pair in more) for i in (0, 1))
            lines.append(
                f"{size} ranks a sequence: {fixed * 1e3:.3g} ms more, and {token * 1e6:.3g} µs a token of a rank"
            )
        lines.append(f"embedding, head and loss: {self.head * 1e6:.3g} µs a token")
        lines += [
            f"{size} ranks: {latency * 1e6:.3g} µs a message, {bandwidth / 1e9:.3g} GB/s"
            for size, (bandwidth, latency) in self.wires.items()
        ]
        return lines


def _layer(card: dict[str, Any]) -> LayerCost:
    shared = {int(size): (float(a), float(b)) for size, (a, b) in card["shared"].items()}
    return LayerCost(**{**card, "error": tuple(card["error"]), "shared": shared})


def model_key(config: RunConfig) -> str:
    """A digest of all that a layer's seconds depend on but the machine."""
    named = {key: value for key, value in config.model.values.items() if key != "layers"}
    parts = [named, config.precision.compute, config.engine.get("recompute", "none")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def machine_name(device: str, threads: int) -> str:
    """The device, and on a CPU its threads: the same on machines of one kind."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)} a rank"


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    import platform

    try:
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def profile_path(config: RunConfig, machine: str) -> Path:
    """The file of `cost.path`, or the one in the user's cache that is named by model and machine."""
    if config.cost.path is not None:
        return Path(config.cost.path).expanduser()
    name = hashlib.sha256(f"{model_key(config)} {machine}".encode()).hexdigest()[:16]
    cache_ = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_ / "farspan" / "costs" / f"{name}.json"


def found_profile(config: RunConfig, machine: str) -> tuple[CostProfile, Path] | None:
    """The profile that a run plans by; None where `cost.path` names none and the cache has none.

    Raises ValueError, one line that opens with the key, for a file that is missing, damaged, or of another machine or
    model.
    """
    path = profile_path(config, machine)
    if config.cost.path is None and not path.exists():
        return None
    again = f"`farspan plan cost.profile=true cost.path={path}` with this run's keys makes a new one"
    if not path.exists():
        raise ValueError(f"cost.path={config.cost.path}: no such file; {again}")
    try:
        profile = CostProfile.read(path)
    except ValueError as error:
        if config.cost.path is None:
            return None
        raise ValueError(f"cost.path={config.cost.path}: {error}; {again}") from None
    if profile.model != model_key(config):
        raise ValueError(f"cost.path={config.cost.path}: was measured with another model; {again}")
    if profile.machine != machine:
        raise ValueError(
            f"cost.path={config.cost.path}: was measured on {profile.machine}, the workers run on {machine}; {again}"
        )
    return profile, path


def said(profile: CostProfile, path: Path) -> str:
    """The line that says by what a run plans."""
    worst = max((each.error[0] for each in profile.layers), default=0.0)
    return f"scheduler: plans by costs measured on {profile.machine} ({path}; error of the fit {worst:.1%})"


def order_of(config: RunConfig, device: str, path: Path) -> dict[str, Any]:
    """An order to measure, for `train.measure_costs.run`."""
    return {"config": config, "device": device, "path": str(path)}
