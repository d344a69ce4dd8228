"""flash-linear-attention's Triton kernels (github.com/fla-org/flash-linear-attention, fla-core), as kernels of ours.

All take one packed batch: rows and documents become the N sequences between `cu_seqlens` [N + 1], each with a state
[N, H, K, V] of its own, so that a document that starts in a row resets exactly. The first sequence of a row is entered
with the row's state, and the last one's final state is the row's.

A state forgets by decays alone, or by matrices too. By decays, a span's effect and what its outputs lack of S are
products over its tokens (`models.kernels.span_effect`), and the kernel runs from a zero state while S is on its way. By
matrices, the effect comes of that pass: values are given K columns more, zeros, and the state as many, the identity,
which turn into A, and their outputs into what S is to be multiplied by.

Legend: B spans, T tokens, N sequences, H heads, K key width, V value width, W columns of the state.
"""

from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from models.kernels import span_effect
from models.kernels.chunking import Begun, Effect
from models.kernels.pieces import known, upload
from models.precision import wide

WIDEST = 256  # columns of a key that the delta rules' kernels hold
HALF = (torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """The place of a rule's kernel, the names of its inputs behind q, k and v, and whether its A is dense."""

    module: str
    function: str
    gates: tuple[str, ...] = ()
    dense: bool = False


# linear attention is called as a decay of nothing: chunk_linear_attn divides by a sum unless told not to, and has not
# taken packed batches in every version.
CALLS = {
    "linear": Call("fla.ops.simple_gla", "chunk_simple_gla", ("g",)),
    "simple_gla": Call("fla.ops.simple_gla", "chunk_simple_gla", ("g",)),
    "gla": Call("fla.ops.gla", "chunk_gla", ("g",)),
    "delta_rule": Call("fla.ops.delta_rule", "chunk_delta_rule", ("beta",), dense=True),
    "gated_delta_rule": Call("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", ("g", "beta"), dense=True),
    "kda": Call("fla.ops.kda", "chunk_kda", ("g", "beta"), dense=True),
    "gdn2": Call("fla.ops.gdn2", "chunk_gdn2", ("g", "b", "w"), dense=True),
}


# What lies between products, each in one kernel: what they read and give is in 16 bits, what they compute in fp32.
FUSED = {
    "rms_norm": Call("fla.modules.norm.layernorm", "rms_norm"),
    "rms_norm_gated": Call("fla.modules.norm.fused_norm_gate", "rms_norm_gated"),
    "l2_norm": Call("fla.modules.norm.l2norm", "l2norm"),
    "swiglu": Call("fla.modules.activations", "swiglu"),
    "rotary": Call("fla.modules.rotary", "rotary_embedding"),
    "head_decay": Call("fla.ops.gated_delta_rule.gate", "fused_gdn_gate"),
    "channel_decay": Call("fla.ops.kda.gate", "fused_kda_gate"),
}


def function(name: str) -> Callable[..., Any]:
    """The kernel of a rule, or the one that does what `FUSED` names.

    Raises ImportError, or whatever else importing it does, where it is not to be had.
    """
    call = CALLS[name] if name in CALLS else FUSED[name]
    module = import_module(call.module)
    if not hasattr(module, call.function):
        raise ImportError(f"{call.module} has no {call.function}")
    return getattr(module, call.function)


def multiplied_in(*qkv: Tensor) -> torch.dtype:
    """The dtype of a kernel's products: 16 bits where one of q, k and v has come from the model's activations as it
    was. The others have been in fp32 on the way: normalised keys of a delta rule, values times a step in Mamba-2."""
    return next((x.dtype for x in qkv if x.dtype in HALF), qkv[0].dtype)


class VarlenRows(NamedTuple):
    """Rows [B, T] as sequences one after another."""

    bounds: Tensor  # [N + 1] int64, where they begin, and the number of tokens
    first: Tensor  # [B] int64, each row's first sequence
    last: Tensor  # [B] int64, its last
    enters: Tensor  # [B] bool: the row's state enters it, as no document starts at its first token

    @classmethod
    def of(cls, starts: Tensor) -> "VarlenRows":
        B, T = starts.shape
        enters = ~starts[:, 0]
        if (pieces := known(starts)) is not None:
            begins = [b * T + piece.begin for b, row in enumerate(pieces) for piece in row]
            counts = list(accumulate(len(row) for row in pieces))
            rows = torch.tensor([*begins, B * T, 0, *counts[:-1], *(n - 1 for n in counts)])
            bounds, first, last = upload(rows, starts.device).split((len(begins) + 1, B, B))
            return cls(bounds, first, last, enters)
        beginning = starts.clone()
        beginning[:, 0] = True
        counts_B = beginning.sum(1).cumsum(0)
        bounds = F.pad(beginning.flatten().nonzero().squeeze(-1), (0, 1), value=B * T)
        return cls(bounds, F.pad(counts_B[:-1], (1, 0)), counts_B - 1, enters)


_PACKINGS = WeakTensorKeyDictionary()  # one for all layers


def packing(starts: Tensor) -> VarlenRows:
    known = _PACKINGS.get(starts)
    if known is None or known[0] != starts._version:
        known = _PACKINGS[starts] = (starts._version, VarlenRows.of(starts))
    return known[1]


class FLASpan(Begun):
    """A begun span. q, k [B,T,H,K], v [B,T,H,V], then the rule's gates, starts [B,T] bool.

    Products are in the dtype that `multiplied_in` says. Decays, states and effects are in fp32, outputs in v's dtype.
    """

    def __init__(self, rule: str, *xs: Tensor, starts: Tensor, scale: float | None = None):
        self.call, self.function, self.starts = CALLS[rule], function(rule), starts
        self.q, self.k, self.v, *gates = xs
        self.dtype = multiplied_in(self.q, self.k, self.v)
        self.g = gates[0] if "g" in self.call.gates and gates else None
        if rule == "linear":
            gates = [wide(self.k.new_zeros(self.k.shape[:-1]))]
        self.gates = dict(zip(self.call.gates, gates, strict=True))
        if "g" in self.gates:
            self.gates["g"] = wide(self.gates["g"])
        self.scale = self.k.shape[-1] ** -0.5 if scale is None else scale
        self.packing = packing(starts)
        self._open: tuple[Tensor, Tensor] | None = None

    def _run(self, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, H, W] and each sequence's last state [N, H, K, W], from `state` [B, H, K, W] where one
        enters."""
        (B, T), (bounds, first, _, enters) = self.starts.shape, self.packing
        if state is not None:
            entering = wide(state).new_zeros(len(bounds) - 1, *state.shape[1:])
            state = entering.index_put((first,), torch.where(enters[:, None, None, None], wide(state), 0.0))
        packed = [x.reshape(1, B * T, *x.shape[2:]).contiguous() for x in (self.q, self.k, v)]
        gates = dict(self.gates)
        if "w" in gates:  # of values, columns for the effect included
            gates["w"] = F.pad(gates["w"], (0, v.shape[-1] - gates["w"].shape[-1]))
        out, states = self.function(
            *(x.to(self.dtype) for x in packed),
            **{name: x.reshape(1, B * T, *x.shape[2:]).contiguous() for name, x in gates.items()},
            scale=self.scale,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=bounds,
        )
        return out.view(B, T, *out.shape[2:]), states

    def _opened(self) -> tuple[Tensor, Tensor]:
        """Outputs from zero and, of a dense A, sequences' last states, those of the identity's columns behind them."""
        if self._open is None:
            if self.call.dense:
                K, V = self.k.shape[-1], self.v.shape[-1]
                identity = torch.eye(K, V + K, device=self.k.device, dtype=wide(self.k).dtype).roll(V, 1)
                B, _, H = self.k.shape[:3]
                self._open = self._run(F.pad(self.v, (0, K)), identity.expand(B, H, -1, -1))
            else:
                self._open = self._run(self.v, None)
        return self._open

    @property
    def effect(self) -> Effect:
        if not self.call.dense:
            return span_effect.effect(self.k, self.v, self.g, self.starts)
        state, V = wide(self._opened()[1])[self.packing.last], self.v.shape[-1]
        return Effect(state[..., V:], state[..., :V], (~self.starts.any(1)).to(state.dtype))

    def ahead(self) -> None:
        self._opened()

    def finish(self, state: Tensor | None) -> Tensor:
        if self._open is None:
            return self._run(self.v, state)[0].to(self.v.dtype)
        out, V = self._open[0], self.v.shape[-1]
        if state is None:
            return out[..., :V].to(self.v.dtype)
        if self.call.dense:
            past = (wide(out[..., V:]).transpose(1, 2) @ wide(state)).transpose(1, 2)
        else:
            past = span_effect.past(wide(self.q) * self.scale, self.g, self.starts, state)
        return (out[..., :V] + past).to(self.v.dtype)
