"""The rules of `models.kernels.registry` a token at a time: the state before a token is known, so nothing is left of
chunks, of the effect of a span, or of documents that start inside it.

A step takes one token of every row and its state, and returns the output and the state after the token. It may
overwrite the state that it is given. Nothing is differentiated here; the kernels of spans are. Equations are those of
the kernel of the same rule, whose file cites the paper.

Legend: B rows, H heads, K key width, V value width, D channels, N width of a channel's state. States are in at least
fp32, as the kinds of `models.recurrence` keep them; the inputs are the kernel's without their axis of tokens.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.kernels import lightnet, mlstm
from models.kernels.chunking import scaled
from models.kernels.complex_decay import wrap
from models.precision import wide

Stepped = tuple[Tensor, Tensor]  # the output, in the dtype of the values, and the state
RecurrentStep = Callable[..., Stepped]  # (*xs, *shared, state=, scale=)


def _read(x: Tensor, S: Tensor) -> Tensor:
    """Sᵀ x: [..., K], [..., K, V] -> [..., V]."""
    return (x.unsqueeze(-2) @ S).squeeze(-2)


def _write(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S + k vᵀ, in the place of S."""
    return S.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))


def gated_linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, state: Tensor, scale: float | None
) -> Stepped:
    """q, k [B, H, K], v [B, H, V], g [B, H] or [B, H, K] or None, state [B, H, K, V]."""
    if g is not None:
        state = state.mul_(_by_row(wide(g).exp(), k))
    state = _write(state, wide(k), wide(v))
    return _read(scaled(wide(q), scale), state).to(v.dtype), state


def _by_row(decay: Tensor, k: Tensor) -> Tensor:
    return decay.unsqueeze(-1) if decay.dim() == k.dim() else decay[..., None, None]


def delta(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, state: Tensor, scale: float | None) -> Stepped:
    """q, k [B, H, K], v [B, H, V], perhaps g [B, H] or [B, H, K], and beta [B, H]; state [B, H, K, V]."""
    *decays, beta = gates
    for g in decays:
        state = state.mul_(_by_row(wide(g).exp(), k))
    k = wide(k)
    state = _write(state, k, wide(beta).unsqueeze(-1) * (wide(v) - _read(k, state)))
    return _read(scaled(wide(q), scale), state).to(v.dtype), state


def delta_gates(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, *, state: Tensor, scale: float | None
) -> Stepped:
    """q, k, g, b [B, H, K], v, w [B, H, V]; state [B, H, K, V]."""
    state = state.mul_(wide(g).exp().unsqueeze(-1))
    state = _write(state, wide(k), wide(w) * wide(v) - _read(wide(b) * wide(k), state))
    return _read(scaled(wide(q), scale), state).to(v.dtype), state


def delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor, scale: float | None
) -> Stepped:
    """q [B, H, K], k [B, n, H, K], v [B, n, H, V], g [B, H], beta [B, n, H]; state [B, H, K, V]."""
    state = state.mul_(wide(g).exp()[..., None, None])
    for key, value, b in zip(wide(k).unbind(1), wide(v).unbind(1), wide(beta).unbind(1), strict=True):
        state = _write(state, key, b.unsqueeze(-1) * (value - _read(key, state)))
    return _read(scaled(wide(q), scale), state).to(v.dtype), state


def dplr(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, *, state: Tensor, scale: float | None
) -> Stepped:
    """q, k, g, a, b [B, H, K], v [B, H, V]; state [B, H, K, V]. `a` reads the state before its decay."""
    before = _read(wide(a), state)
    state = _write(state.mul_(wide(g).exp().unsqueeze(-1)), wide(b), before)
    state = _write(state, wide(k), wide(v))
    return _read(scaled(wide(q), scale), state).to(v.dtype), state


def titans(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, mu: Tensor, beta: Tensor, *, state: Tensor, scale: float | None
) -> Stepped:
    """q, k [B, H, K], v [B, H, V], g, mu, beta [B, H]; state [B, H, 2K, V], the memory above its momentum."""
    M, S = state.chunk(2, -2)
    k = wide(k)
    error = wide(beta).unsqueeze(-1) * (wide(v) - _read(k, M))
    S = _write(S.mul_(wide(mu).exp()[..., None, None]), k, error)
    M = M.mul_(wide(g).exp()[..., None, None]).add_(S)
    return _read(scaled(wide(q), scale), M).to(v.dtype), state


def elementwise(u: Tensor, g: Tensor, *, state: Tensor, scale: float | None) -> Stepped:
    """u, g and state [B, ...]. The output is the state: a new tensor, so that it may be handed on."""
    state = torch.addcmul(wide(u), wide(g).exp(), state)
    return state.to(u.dtype), state


def complex_elementwise(u: Tensor, g: Tensor, turns: Tensor, *, state: Tensor, scale: float | None) -> Stepped:
    """u and state [B, ..., 2] pairs, g and turns [B, ...]. The output is the state, a new tensor."""
    a = torch.polar(wide(g).exp(), 2 * math.pi * wrap(wide(turns)))
    state = wide(u) + torch.view_as_real(a * torch.complex(*state.unbind(-1)))
    return state.to(u.dtype), state


def longhorn(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, *, state: Tensor, scale: float | None) -> Stepped:
    """q, k [B, N], v, delta [B, D]; state [B, D, N]."""
    k, d = wide(k), wide(delta)
    state = state.mul_(torch.addcmul(k.new_ones(()), d.unsqueeze(-1), k.square().unsqueeze(-2), value=-1))
    state = _write(state, d * wide(v), k)
    return (state @ scaled(wide(q), scale).unsqueeze(-1)).squeeze(-1).to(v.dtype), state


def mamba(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, A: Tensor, *, state: Tensor, scale: float | None) -> Stepped:
    """q, k [B, N], v, delta [B, D], A [D, N]; state [B, D, N]."""
    d = wide(delta)
    state = _write(state.mul_((d.unsqueeze(-1) * A.to(d.dtype)).exp_()), d * wide(v), wide(k))
    return (state @ scaled(wide(q), scale).unsqueeze(-1)).squeeze(-1).to(v.dtype), state


def stabilised(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, state: Tensor, scale: float | None) -> Stepped:
    """q, k [B, H, K], v [B, H, V], i, f [B, H]; the state is that of `models.kernels.mlstm`."""
    i, before = wide(i), wide(f) + mlstm.unit(state)
    m = torch.maximum(before, i)
    C = state[..., :-2].unflatten(-1, (k.shape[-1], v.shape[-1] + 1)) * (before - m).exp()[..., None, None]
    row = torch.nn.functional.pad(wide(v), (0, 1), value=1.0)
    C = _write(C, wide(k) * (i - m).exp().unsqueeze(-1), row)
    read = _read(scaled(wide(q), scale), C)
    norm = torch.maximum(read[..., -1].abs(), (-m).exp()) + mlstm.EPS
    return (read[..., :-1] / norm.unsqueeze(-1)).to(v.dtype), mlstm.pack(C, m)


def normalised(q: Tensor, k: Tensor, v: Tensor, *, state: Tensor, scale: float | None) -> Stepped:
    """q, k [B, H, K], k logs of weights, v [B, H, V]; the state is that of `models.kernels.lightnet`."""
    k = wide(k)
    S, z_before, seen = lightnet.unpack(state)
    z = torch.logaddexp(z_before, k)
    S = _write(S * (z_before - z).exp().unsqueeze(-1), (k - z).exp(), wide(v))
    return _read(scaled(wide(q), scale), S).to(v.dtype), lightnet.pack(S, z, torch.ones_like(seen))


STEPS: dict[str, RecurrentStep] = {
    "linear": gated_linear,
    "simple_gla": gated_linear,
    "gla": gated_linear,
    "delta_rule": delta,
    "gated_delta_rule": delta,
    "kda": delta,
    "gdn2": delta_gates,
    "dplr": dplr,
    "titans": titans,
    "gated_delta_product": delta_product,
    "elementwise": elementwise,
    "longhorn": longhorn,
    "mamba": mamba,
    "complex": complex_elementwise,
    "mlstm": stabilised,
    "lightnet": normalised,
}
