"""The costs of a run's steps, for the adaptive scheduler: of its own model, from its shapes, on its ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from models.accounting import account
from models.lm import LM
from parallel.schedule.adaptive.cost import Cluster, Costs, NoRoomError, Wire, powers
from parallel.schedule.adaptive.scheduler import Adaptive
from parallel.schedule.adaptive.search import TooLongError
from parallel.schedule.adaptive.shapes import Pairs, Shapes, fitting, model_of
from parallel.schedule.comm_volume import How, Unit, of_weights
from parallel.schedule.mesh import Mesh
from train.cost_profile import found_profile, machine_name, said
from train.metrics.comm_trace import asked, weight_units
from train.optim.build import moments
from train.precision import dtypes, gathered_weights
from train.run_config import RunConfig

_GIB = 2**30
_UNLIMITED = 2.0**60  # bytes of a rank whose memory nobody gave


class AssumedMachine(NamedTuple):
    """Assumptions about a device where nothing is measured: FLOP/s of a rank, and the wire between any two."""

    rate: float
    wire: Wire


ASSUMED = {
    "cuda": AssumedMachine(150e12, Wire(50e9, 2e-5)),
    "cpu": AssumedMachine(3e10, Wire(1e9, 2e-4)),
}
"""An A100's rate on bf16 and a 400 Gbit/s network card; a core's rate on fp32 and a loopback of gloo."""

LAUNCH = {"cuda": 1e-3, "cpu": 5e-3}
"""Seconds that a layer's forward and backward passes take at least, whatever they compute: some hundred kernels or
operators, and FSDP's hooks. Assumed, too."""


def shaped(
    config: RunConfig,
    model: LM,
    cluster: Cluster,
    *,
    device: str,
    rate: float,
    launch: float | None = None,
    quantum: int = 128,
    recompute: bool = False,
    spans: int = 1,
) -> Costs:
    """The costs of a model on the meta device, read off its shapes, in groups of the sizes that its transports serve.

    model: computing in `model.compute`. rate: FLOP/s of a rank. launch: seconds of a micro-step; None for what it
    gathers, and `LAUNCH` for each layer. recompute: a group may compute activations again where the engine
    keeps them. spans: of a rank in a group. Raises ValueError for a model whose costs are not known, NoRoomError where
    its states fill a rank.
    """
    compute, master = dtypes(config.precision.compute, device)
    engine, shape = config.engine, config.model
    try:
        known = account(model, device=device)
        asks = asked(model, device=device)
    except NotImplementedError as error:
        raise ValueError(f"model: {error}") from None
    reshard, recomputed = engine.get("reshard_after_forward", True), engine.get("recompute", "none")
    gathered = known.parameters * master.itemsize
    if reshard:
        gathered = gathered * 2 // shape["layers"]
    head = shape["dim"] * compute.itemsize
    chunk = config.train.loss_chunk or quantum
    flops = known.per_token
    inputs = head * shape["layers"] + known.activations / shape["layers"]  # kept where all else is computed again
    activations = {"full": inputs, "selective": inputs + known.dear}.get(recomputed, known.activations)
    several: dict[tuple[float, int | None], int] = {}
    for layer in known.attention:
        several[layer.flops, layer.window] = several.get((layer.flops, layer.window), 0) + 1
    shapes = Shapes(
        name=config.model.get("name") or f"of {known.parameters / 1e6:,.1f} M parameters",
        token_flops=flops.forward + flops.backward + (flops.recompute if recomputed == "full" else 0),
        pairs=tuple(Pairs(count, pair, window) for (pair, window), count in several.items()),
        state_bytes=(2 * known.parameters + moments(config.optimizer.build(), model)) * master.itemsize,
        activation_bytes=activations,
        logit_bytes=head,
        resident_bytes=gathered + chunk * shape["vocabulary"] * (compute.itemsize + 8),
        again=flops.recompute,
        kept_again=inputs if recompute and recomputed in ("none", "planned") else 0.0,
    )
    transport = config.parallel.transport
    recurrence = "gather" if transport.recurrence == "auto" else transport.recurrence
    how = How(recurrence, transport.attention, transport.blocks, keys=transport.keys)
    sizes = fitting(asks, how, powers(cluster.ranks))
    coded, gradients = gathered_weights(config.precision, model, device), engine.get("gradients", "high")
    units = weight_units(model, itemsize=compute.itemsize, reshard=reshard, gradients=gradients, coded=coded)
    again, once = (sent / cluster.wire(cluster.ranks).bandwidth for sent in weight_bytes(units, cluster.ranks))
    if launch is None:
        launch = again + LAUNCH["cpu" if device == "cpu" else "cuda"] * shape["layers"]
    return Costs(model_of(shapes, asks, how, sizes, rate=rate, launch=launch, once=once, spans=spans), cluster, sizes)


def weight_bytes(units: Iterable[Unit], ranks: int) -> tuple[float, float]:
    """Bytes of weights and their gradients that a rank receives for each micro-step, and for a step beside those."""
    one, two = (sum(of_weights(units, ranks, micro_steps).bytes.values()) for micro_steps in (1, 2))
    return two - one, 2 * one - two


def costs_of(
    config: RunConfig, scheduler: Adaptive, model: LM, *, device: str, mesh: Mesh, threads: int
) -> tuple[Costs, str]:
    """The costs that a run plans by, and a line that says where they come from.

    model: on the meta device, computing in `model.compute`. threads: of a rank. Raises ValueError, one line that opens
    with the key.
    """
    rate, wire = ASSUMED["cpu" if device == "cpu" else "cuda"]
    memory = _UNLIMITED if scheduler.memory is None else scheduler.memory * _GIB
    most = math.inf if scheduler.tokens_per_rank is None else float(scheduler.tokens_per_rank)
    cluster = Cluster(f"{mesh.planned} ranks", mesh.planned, memory, {1: wire}, most_tokens=most)
    planned, spans = config.engine.get("recompute", "none") == "planned", 2 if scheduler.layout == "auto" else 1
    try:
        costs = shaped(
            config, model, cluster, device=device, rate=rate, quantum=scheduler.quantum, recompute=planned, spans=spans
        )
    except NoRoomError as error:
        raise ValueError(f"scheduler.memory={scheduler.memory:g}: {error}") from None
    if mesh.expert > 1:  # ranks of several groups meet in every layer
        costs = Costs(replace(costs.model, meets=True), cluster, costs.sizes)
    if (profile := found_profile(config, machine_name(device, threads))) is not None:
        reshard = config.engine.get("reshard_after_forward", True)
        master = dtypes(config.precision.compute, device)[1]
        coded, gradients = gathered_weights(config.precision, model, device), config.engine.get("gradients", "high")
        units = weight_units(model, itemsize=master.itemsize, reshard=reshard, gradients=gradients, coded=coded)
        return profile[0].applied(costs, *weight_bytes(units, mesh.planned)), said(*profile)
    return costs, (
        f"scheduler: plans by the model's shapes at {rate / 1e12:g} TFLOP/s a rank and {wire.bandwidth / 1e9:g} GB/s "
        "between ranks, which are assumed"
    )


def check_fits(scheduler: Adaptive, costs: Costs, longest: int) -> None:
    """Raises ValueError, one line that opens with the key, where a sequence of so many tokens fits no group."""
    try:
        scheduler.pack(costs, [longest])
    except TooLongError as error:
        key = "memory" if scheduler.tokens_per_rank is None else "tokens_per_rank"
        raise ValueError(
            f"scheduler.{key}={getattr(scheduler, key)}: {error}; data.max_length={error.limit} cuts such "
            "documents, or leaves them out with data.too_long=skip"
        ) from None
