"""`farspan plan`: what a run would do, without training: mesh, parameters, memory per rank, the first plan."""

import math
from typing import Any

from launch import preflight
from launch.placement import Node, place
from launch.preflight import Flight
from launch.templates import Machines
from launch.user import UserError

PROBE_TOKENS = 256


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

    config, train = flight.config, flight.train
    lengths = [len(s.tokens) for s in flight.batches.batch(config["seed"], 0)]
    first = construct(config["scheduler"]).plan(0, lengths, data=flight.data, sequence=flight.sequence)
    placement = place(flight.cluster.workers, nodes, flight.sizes)
    total = sum(math.prod(shape) for shape in flight.shapes.values())
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
        f"parameters  {total:,}, of which {_activated(config['model'], flight.shapes):,} act on a token",
        *_memory(flight, total, held),
        *first.text().splitlines(),
    ]


def _activated(model: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> int:
    """Parameters a token meets: of the experts, only as many as the router chooses; one row of the embedding."""
    from models.pattern import unroll

    names = unroll(model["pattern"], model["layers"], list(model["blocks"]))
    count = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if name == "embedding":
            size = shape[1]
        elif ".experts." in name:
            ffn = model["blocks"][names[int(name.split(".")[1])]]["ffn"]
            size = size // ffn["num_experts"] * ffn["top_k"]
        count += size
    return count


def _memory(flight: Flight, total: int, held: int) -> list[str]:
    """Bytes on the fullest rank. States are exact; activations are those that a layer keeps for its backward, measured

    on one layer of each kind over a few tokens and scaled.
    """
    from train.precision import dtypes

    compute, master = dtypes(flight.config["precision"]["compute"], flight.device)
    engine = flight.config["engine"]
    states = total * 4 * master.itemsize / flight.cluster.workers
    gathered = total * master.itemsize
    if engine["reshard_after_forward"]:
        layers = max(int(n.split(".")[1]) for n in flight.shapes if n.startswith("layers.")) + 1
        gathered = gathered * 2 // layers
    kept = _activations(flight.config["model"], held, compute, full=engine["recompute"] == "none")
    logits = held * flight.shapes["embedding"][0] * (compute.itemsize + 8)
    parts = {"weights, gradients, moments": states, "gathered weights": gathered, "activations": kept, "logits": logits}
    return [
        f"memory      {_size(sum(parts.values()))} a rank at {held:,} tokens a micro-step, besides the runtime",
        *(f"            {_size(value):>10}  {name}" for name, value in parts.items()),
    ]


def _activations(model: dict[str, Any], held: int, compute: Any, *, full: bool) -> float:
    import torch

    from models.axes import initialise
    from models.pattern import unroll
    from models.sequence import Whole
    from train.construct import construct

    if not full:
        return held * model["dim"] * compute.itemsize * model["layers"]
    per_token = {}
    seq = Whole.of(torch.arange(PROBE_TOKENS).unsqueeze(0))
    for name, node in model["blocks"].items():
        block = initialise(construct(node)(dim=model["dim"], slot="probe"), 0)
        x = torch.randn(1, PROBE_TOKENS, model["dim"], dtype=compute, requires_grad=True)
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in block.parameters()}

        def keep(tensor: torch.Tensor, own: set = own, kept: dict = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, _ = block(x, seq)
        del y
        per_token[name] = sum(kept.values()) / PROBE_TOKENS
    names = unroll(model["pattern"], model["layers"], list(model["blocks"]))
    return sum(per_token[name] for name in names) * held


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError
