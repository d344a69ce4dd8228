"""`farspan plan`: what a run would do, without training: mesh, parameters, FLOPs, memory per rank, the first plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch import preflight
from launch.placement import Node, place
from launch.preflight import Flight
from launch.templates import Machines
from launch.user import UserError

if TYPE_CHECKING:  # torch is loaded once the configuration has been read
    from models.accounting import Account


def plan(overrides: list[str]) -> int:
    """Prints the plan of a run. Raises UserError."""
    config = preflight.configure(overrides)
    planned = _planned(config)
    with preflight.refusals(config):
        device = planned.device(config["cluster"]["device"]) if planned else None
    flight = preflight.clear(config, print, device=device)
    with preflight.refusals(config):
        print("\n".join(lines(flight, planned.nodes_planned(flight.device) if planned else _nodes(flight))))
    return 0


def _planned(config: dict[str, Any]) -> Machines | None:
    """The machines of the cluster's template; None where there is none, or the cluster itself can be asked."""
    from launch import nodes, template

    address = config["cluster"]["address"]
    found = template.machines(config)
    if found is None or address is None:
        return found
    try:
        nodes.check_answers(nodes.address_of(address))
    except UserError as error:
        print(f"{error}; planned on the machines of cluster.template")
        return found
    return None


def _nodes(flight: Flight) -> list[Node]:
    if flight.cluster.kind != "ray":
        return [Node("this machine", "127.0.0.1", flight.cluster.workers)]
    from launch.nodes import room

    return room(flight.cluster, flight.device)


def lines(flight: Flight, nodes: list[Node]) -> list[str]:
    """The plan of a run on `nodes`. Raises ValueError when it does not fit them."""
    from train.construct import construct
    from train.observe import pieces

    config, train = flight.config, flight.train
    batch = flight.batches.batch(config["seed"], 0)
    lengths = [len(s.tokens) for s in batch]
    first = construct(config["scheduler"]).plan(0, lengths, data=flight.data, sequence=flight.sequence)
    placement = place(flight.cluster.workers, nodes, flight.sizes)
    costs = _costs(flight)
    held = max(
        sum(end - begin for begin, end in spans)
        for micro in first.micro_steps
        for group in micro.groups
        for spans in group.spans
    )
    return [
        f"mesh        {flight.cluster.workers} workers on {flight.device}: data {flight.data} x sequence "
        f"{flight.sequence}; parameters sharded over all of them",
        *(f"{'' if i else 'placement':<12}{line}" for i, line in enumerate(placement.lines())),
        f"budget      {train.total_steps:,} steps of {train.batch_tokens:,} tokens = {train.total_tokens:,}",
        f"parameters  {costs.parameters:,}, of which {costs.activated:,} act on a token",
        *_flops(costs, [n for s in batch for n in pieces(s.starts)], config["engine"].get("recompute", "none")),
        *_memory(flight, costs, held),
        f"state       {_size(costs.state(lengths[0]))} to go on after {lengths[0]:,} tokens",
        *first.text().splitlines(),
    ]


def _costs(flight: Flight) -> Account:
    """Raises ValueError for a model whose costs are not known."""
    import torch

    from models.accounting import account
    from train.construct import construct
    from train.precision import dtypes

    with torch.device("meta"):
        model = construct(flight.config["model"])
    model.compute = dtypes(flight.config["precision"]["compute"], flight.device)[0]
    try:
        return account(model, device=flight.device)
    except NotImplementedError as error:
        raise ValueError(f"model: {error}") from None


def _flops(costs: Account, documents: list[int], recompute: str) -> list[str]:
    """Of the first batch, its documents as they are: the work of attention depends on their lengths."""
    flops, tokens = costs.flops(documents), sum(documents)
    attention = 1 - sum(costs.per_token[:2]) * tokens / flops.model
    again = f", again {_count(flops.recompute / tokens)} for what is recomputed" if recompute == "full" else ""
    return [
        f"FLOPs       a token {_count(flops.forward / tokens)} forward, {_count(flops.backward / tokens)} backward"
        f"{again}; a step {_count(flops.model)}",
        f"            {attention:.1%} of them are products of queries, keys and values in softmax attention",
    ]


def _memory(flight: Flight, costs: Account, held: int) -> list[str]:
    """Bytes on the fullest rank: states are exact, activations those that a layer keeps for its backward."""
    from train.precision import dtypes

    compute, master = dtypes(flight.config["precision"]["compute"], flight.device)
    engine, model = flight.config["engine"], flight.config["model"]
    states = costs.parameters * 4 * master.itemsize / flight.cluster.workers
    gathered = costs.parameters * master.itemsize
    if engine["reshard_after_forward"]:
        gathered = gathered * 2 // model["layers"]
    kept = costs.activations
    if engine["recompute"] == "full":  # every layer's input, and all of one layer while it runs again
        kept = model["dim"] * compute.itemsize * model["layers"] + kept / model["layers"]
    chunk = min(held, flight.config["train"].get("loss_chunk") or held)
    parts = {
        "weights, gradients, moments": states,
        "gathered weights": gathered,
        "activations" + (", at most" if engine["recompute"] == "selective" else ""): kept * held,
        "logits": chunk * model["vocabulary"] * (compute.itemsize + 8),
    }
    return [
        f"memory      {_size(sum(parts.values()))} a rank at {held:,} tokens a micro-step, besides the runtime",
        *(f"            {_size(value):>10}  {name}" for name, value in parts.items()),
    ]


def _count(number: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or unit == "P":
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    raise AssertionError


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError
