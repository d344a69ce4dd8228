"""A model's requests to its sequence, by shape: the part of `parallel.schedule.comm_volume` that the model knows.

No module states it: the model runs once on the meta device, on a sequence that notes what it is asked.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.accounting import Traced, by_shape
from models.kernels.coded_weight import as_matrix
from models.kernels.indexed_attention import Index, Selected, packed
from models.kernels.low_precision import BF16, DTYPES, Scaling, shares
from models.lm import LM
from models.moe import mixtures
from models.mtp import Ahead
from models.nonlinear_recurrence import Serial
from models.recurrence import Recurrence
from parallel.schedule.comm_volume import Ask, AttendCall, GradientFormat, Halo, KeysCall, ScanCall, SumCall, Unit
from parallel.schedule.expert_volume import ExpertCall

TOKENS = 64


def asked(model: LM, *, device: str = "cpu") -> tuple[Ask, ...]:
    """Returns what a forward pass of training asks, of a model on the meta device, computing in `model.compute` on a
    `device`, in order.

    Raises NotImplementedError for a model whose course depends on data.
    """
    seq: Any = _Noting.of_length(TOKENS)
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    ahead = [tokens] * model.mtp_layers
    try:
        with by_shape(model, device):
            model(tokens, seq, ahead=Ahead(torch.stack(ahead), torch.stack(ahead)) if ahead else None)
    except RuntimeError as error:  # what the meta device cannot do
        raise NotImplementedError(f"what it asks: {(str(error).splitlines() or [''])[0]}") from error
    return tuple(seq.asks)


def check_heads(model: LM, attention: str, ranks: int, *, tensor: int = 1) -> None:
    """Raises ValueError where that transport of keys cannot share out the heads of a model on the meta device.

    tensor: ranks that share out the heads before that. A window needs none of it; a model whose course depends on data
    is not known here, and speaks when it runs.
    """
    try:
        asks = asked(model)
    except NotImplementedError:
        return
    for ask in asks:
        if isinstance(ask, AttendCall) and ask.window is None:
            ask.here(tensor).split(ranks, attention)


def weight_units(
    model: LM,
    *,
    itemsize: int,
    reshard: bool,
    experts: int = 1,
    gradients: GradientFormat = "high",
    coded: Mapping[str, Scaling] | None = None,
) -> list[Unit]:
    """Returns what FSDP gathers at a time, as `parallel.fsdp.shard` wraps it: each layer and module of multi-token
    prediction, then the rest.

    itemsize: bytes of a master weight. reshard: whether a layer's weights are let go after each forward and backward.
    experts: ranks over which experts are cut: where there are several, these are units of their own (`expert_units`).
    gradients: `engine.gradients`.
    coded: the scaling of each weight that is gathered in few bits, by name (`train.precision.gathered_weights`).
    """
    scaled = coded or {}
    apart = set() if experts == 1 else {p for moe in mixtures(model).values() for p in moe.experts.parameters()}
    layers = [
        {name: p for name, p in layer.named_parameters(prefix=f"{where}.{n}") if p not in apart}
        for where, several in (("layers", model.layers), ("mtp", model.mtp))
        for n, layer in several.items()
    ]
    inside = {name for layer in layers for name in layer}
    rest = {name: p for name, p in model.named_parameters() if name not in inside and p not in apart}

    def unit(parameters: dict[str, torch.nn.Parameter], stays: bool) -> Unit:
        return _unit({name: (p.shape, scaled.get(name)) for name, p in parameters.items()}, itemsize, stays, gradients)

    return [*(unit(layer, not reshard) for layer in layers), unit(rest, True)]


def _unit(
    weights: Mapping[str, tuple[torch.Size, Scaling | None]], itemsize: int, stays: bool, gradients: GradientFormat
) -> Unit:
    """weights: the shape of each, and its scaling where it is gathered in few bits."""
    shapes = tuple((shape[0], math.prod(shape[1:])) for shape, _ in weights.values())
    few, scales = [], 0
    for shape, scaling in weights.values():
        if scaling is not None:
            few.append((shape[0], math.prod(shape[1:]), DTYPES[scaling.format].itemsize))
            matrix, as_one = as_matrix(shape, scaling)
            scales += 0 if scaling.format == BF16 else math.prod(shares(torch.Size(matrix), as_one))
    return Unit(shapes, itemsize, stays, tuple(few), scales, gradients)


def expert_units(
    model: LM,
    *,
    itemsize: int,
    reshard: bool,
    experts: int,
    gradients: GradientFormat = "high",
    coded: Mapping[str, Scaling] | None = None,
) -> list[Unit]:
    """Returns what FSDP gathers at a time of experts cut over so many ranks, among those that hold the same."""
    units, names = [], {id(p): name for name, p in model.named_parameters()}
    for moe in mixtures(model).values():
        weights = {
            each: (torch.Size((len(p) // experts, *p.shape[1:])), (coded or {}).get(names[id(p)]))
            for each, p in moe.experts.named_parameters()
        }
        units.append(_unit(weights, itemsize, not reshard, gradients))
    return units


def expert_calls(model: LM) -> list[ExpertCall]:
    """Returns what each layer's experts ask of other ranks, computing in `model.compute`."""
    return [
        ExpertCall(
            moe.top_k, moe.num_experts, moe.experts.gate_up.shape[1], model.compute.itemsize, moe.capacity_factor
        )
        for moe in mixtures(model).values()
    ]


@dataclass(kw_only=True)
class _Noting(Traced):
    asks: list[Ask] = field(default_factory=list)

    def before(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        self.asks.append(Halo(width, x[0, 0].numel(), x.itemsize))
        return super().before(x, width, slot=slot)

    def scan(self, recurrence: Recurrence | Serial, *xs: Tensor, slot: str) -> Tensor:
        if isinstance(recurrence, Serial):
            out, left = recurrence.begin(*xs, positions=self.positions, state=None)
            self.asks.append(ScanCall(recurrence.rule, 0, left[0].numel(), 1, left.itemsize, serial=True))
            return out
        begun = recurrence.begin(*xs, starts=self.starts)
        A, U, _ = begun.effect
        extent = U.shape[recurrence.block_axis]
        self.asks.append(ScanCall(type(recurrence).__name__, A[0].numel(), U[0].numel(), extent, U.itemsize))
        return begun.finish(None)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        slot: str,
        window: int | None = None,
        sinks: int = 0,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        values_in_keys: bool = False,
    ) -> Tensor:
        (H, K), (G, V) = q.shape[2:], v.shape[2:]
        self.asks.append(AttendCall(H, G, K, V, k.itemsize, window, sinks, values_in_keys))
        return super().attend(q, k, v, slot=slot, window=window, sinks=sinks, softcap=softcap, sink_logits=sink_logits)

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        keys, values = packed(k, v, index.k)
        self.asks.append(KeysCall(keys.shape[-1] + values.shape[-1], keys.itemsize))
        return super().attend_selected(q, k, v, index, slot=slot)

    def sum(self, x: Tensor) -> Tensor:
        self.asks.append(SumCall(x[0, 0].numel(), x.itemsize, x.requires_grad))
        return super().sum(x)
