"""The cluster and model that `farspan plan scheduler.simulate=N` simulates: the section `simulation` of a
configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from parallel.schedule.adaptive.compare import SCHEDULERS
from parallel.schedule.adaptive.cost import STATE_TRANSPORTS, Cluster, Costs, Model, StateTransport, Wire
from parallel.schedule.adaptive.profiles import MODELS, flexsp, flexsp_cluster, hybrid

_GIB = 2**30
RUN = "run"
PROFILES = (RUN, *MODELS)


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """Measured costs of steps, by which scheduler=adaptive and auto plan.

    profile: true has `farspan plan` measure the model's layers and the workers' messages on this machine, and store
    them. path: the file of the costs; null for one in the user's cache, named by model and machine, which a run uses
    where it is there. seconds: time to measure, at most some more.
    """

    profile: bool = False
    path: str | None = None
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.seconds <= 3600:
            raise ValueError(f"cost.seconds={self.seconds:g}: must be at least 1, and at most 3,600")


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """A cluster, a model and lengths for `farspan plan scheduler.simulate=N`, which needs no GPU; training reads none.

    lengths: a file of sequence lengths in tokens, in the order of the corpus: a .npy array of whole numbers, or text;
    null for the run's own batches. sequences: sequences of the file in a step. longest: tokens beyond which a sequence
    of the file is left out, and counted; null for none. quantum: lengths are planned as multiples of it. model: run,
    the model that is configured, or 7b, 13b, 30b, those of 2412.01523 as they were measured. linear, softmax: numbers
    of linear and of softmax layers in a period of a published model. states: transport of a published model's linear
    layers, scan or gather. recompute: true lets a group compute activations again to hold more. machines, per_machine:
    number of machines, and ranks of each. memory: GiB of a rank. inside, across: GB a second that a rank receives in
    groups within a machine, and over several; null for the figures of 2412.01523. latency: microseconds of a message.
    rate: TFLOP a second that a rank reaches with model=run. launch: milliseconds of a micro-step whatever it holds with
    model=run; null for gathering the weights twice and scattering their gradients. speeds: speed of each rank, relative
    to 1; null for ranks that are alike. schedulers: schedulers to compare, the first is the base of the ratios; null
    for all.
    """

    lengths: str | None = None
    sequences: int = 512
    longest: int | None = None
    quantum: int = 128
    model: str = RUN
    linear: int = 0
    softmax: int = 1
    states: StateTransport = "scan"
    recompute: bool = False
    machines: int = 8
    per_machine: int = 8
    memory: float = 28.0
    inside: float | None = None
    across: float | None = None
    latency: float = 0.0
    rate: float = 150.0
    launch: float | None = None
    speeds: list[float] | None = None
    schedulers: list[str] | None = None

    def __post_init__(self) -> None:
        if self.model not in PROFILES:
            raise ValueError(f"simulation.model={self.model}: must be one of {', '.join(PROFILES)}")
        if self.states not in STATE_TRANSPORTS:
            raise ValueError(f"simulation.states={self.states}: must be one of {', '.join(STATE_TRANSPORTS)}")
        for key in ("sequences", "longest", "quantum", "machines", "per_machine"):
            value = getattr(self, key)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"simulation.{key}={value}: must be at least 1, and below 2^31")
        for key in ("memory", "inside", "across", "rate"):
            value = getattr(self, key)
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"simulation.{key}={value}: must be positive and finite")
        for key in ("latency", "launch"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < np.inf:
                raise ValueError(f"simulation.{key}={value}: must be at least 0 and finite")
        if min(self.linear, self.softmax) < 0 or not self.linear + self.softmax:
            given = f"simulation.linear={self.linear}, simulation.softmax={self.softmax}"
            raise ValueError(f"{given}: must be at least 0, and not both 0")
        if (self.inside is None) != (self.across is None):
            raise ValueError(
                f"simulation.inside={self.inside}, simulation.across={self.across}: must both be given, or both be null"
            )
        if self.ranks > 2**16:
            raise ValueError(f"simulation.machines={self.machines}: {self.ranks:,} ranks; must be at most {2**16:,}")
        if self.speeds is not None and (len(self.speeds) != self.ranks or not 0 < min(self.speeds) <= 1e3):
            raise ValueError(
                f"simulation.speeds: has {len(self.speeds)} entries; must be {self.ranks} positive numbers"
            )
        for name in self.schedulers or ():
            if name not in SCHEDULERS:
                raise ValueError(f"simulation.schedulers={name}: must be one of {', '.join(SCHEDULERS)}")
        if self.schedulers == []:
            raise ValueError("simulation.schedulers=[]: must name a scheduler, or be null for all")

    @property
    def ranks(self) -> int:
        return self.machines * self.per_machine

    def cluster(self) -> Cluster:
        speeds = None if self.speeds is None else tuple(self.speeds)
        name = f"{self.machines} x {self.per_machine} ranks of {self.memory:g} GiB"
        if self.inside is None or self.across is None:
            published = flexsp_cluster(self.ranks, self.memory).wires
            wires = {size: Wire(wire.bandwidth, self.latency / 1e6) for size, wire in published.items()}
        else:
            inside, across = (Wire(value * 1e9, self.latency / 1e6) for value in (self.inside, self.across))
            wires = Cluster.of_machines(name, self.machines, self.per_machine, 1.0, inside, across).wires
        return Cluster(name, self.ranks, self.memory * _GIB, wires, speeds)

    def costs(self, run: Callable[[Cluster], Costs]) -> Costs:
        """run: the configured model's costs. Raises NoRoomError where its states alone fill a rank."""
        if self.model == RUN:
            return run(self.cluster())
        return Costs(self.published(), self.cluster())

    def published(self) -> Model:
        """The published model, with positions for as many tokens as the longest sequence asks for."""
        context = next((k for k in (4, 192, 384) if self.longest is None or self.longest <= k * 1000), 384)
        model = flexsp(self.model, 192 if self.longest is None else context, recompute=self.recompute)
        return hybrid(model, self.linear, self.softmax, states=self.states) if self.linear else model

    def batches(self, steps: int) -> tuple[list[list[int]], int]:
        """Draws batches from the file of lengths, and counts those of it that were left out. Raises ValueError, naming
        the key."""
        assert self.lengths is not None
        lengths = read_lengths(Path(self.lengths))
        fitting = lengths if self.longest is None else lengths[lengths <= self.longest]
        needed = steps * self.sequences
        if len(fitting) < needed:
            raise ValueError(
                f"simulation.lengths={self.lengths}: has {len(fitting):,} sequences of at most "
                f"{self.longest or 'any'} tokens; scheduler.simulate={steps} of simulation.sequences={self.sequences} "
                f"need {needed:,}"
            )
        chosen = fitting[:needed].reshape(steps, self.sequences).tolist()
        read = needed if self.longest is None else int(np.flatnonzero(lengths <= self.longest)[needed - 1]) + 1
        return chosen, read - needed


def read_lengths(path: Path) -> np.ndarray:
    """[sequences], int64, from a .npy file or from text. Raises ValueError, naming the key."""
    at = f"simulation.lengths={path}"
    try:
        if path.suffix == ".npy":
            lengths = np.load(path, mmap_mode="r", allow_pickle=False)
            if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
                raise ValueError
            lengths = np.asarray(lengths).astype(np.int64)
        else:
            with path.open(encoding="ascii") as file:
                words = (word for line in file for word in line.split())
                lengths = np.fromiter((int(word) for word in islice(words, 10**8)), dtype=np.int64)
    except OSError as error:
        raise ValueError(f"{at}: cannot be read ({error.strerror or error})") from None
    except (ValueError, OverflowError, EOFError):  # whose text may quote the file
        raise ValueError(f"{at}: must be a .npy array of one dimension, or text, of whole numbers") from None
    if not len(lengths) or lengths.min() < 1 or lengths.max() >= 2**40:
        raise ValueError(f"{at}: must hold lengths of at least 1 token, and below 2^40")
    return lengths
