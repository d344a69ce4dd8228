"""Softmax attention of some queries to some keys, and the logsumexp by which such parts are merged.

The backward of a part is given the out and lse of the whole softmax, not its own: with P = e^{s - lse} the gradients of
the parts then simply add up (the observation that ring attention, 2310.01889, rests on).

`Fused` is the CPU's flash kernel (2205.14135; any float dtype). `Plain` is matmuls, a block of queries at a time: it
runs on every device in every dtype, and is the reference of the other. Neither holds scores of more than `ROWS` queries
over the keys of one part.

Legend: n queries, m keys, H heads, G key/value heads, R = H / G, K width of a head. q [1, H, n, K], k and v
[1, G, m, K], lse [1, H, n] in at least fp32. Where `causal`, the last query stands at the last key and each sees the
keys up to itself, the last `window` of them where that is not None.
"""

from functools import cache, lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from models.kernels.cross_entropy import softcap_slope, softcapped
from models.precision import wide

ROWS = 128

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tile(Protocol):
    """One way to compute a part."""

    @classmethod
    def forward(
        cls, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [1, H, n, K] and lse."""
        ...

    @classmethod
    def backward(
        cls,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part's gradients of q, k, v in at least fp32, from out, its gradient and lse of the whole softmax."""
        ...


@lru_cache(maxsize=4)  # the blocks of a window share one
def bias(n: int, m: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n, m], 0 where a query sees a key, else -inf."""
    behind = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return torch.zeros(n, m, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


class Fused:
    """The CPU's flash kernel. Its backward runs in fp32 for bf16 inputs: a third of the time, and more exact."""

    @staticmethod
    def _mask(q: Tensor, k: Tensor, causal: bool, window: int | None) -> tuple[bool, Tensor | None]:
        n, m = q.shape[2], k.shape[2]
        if not causal or n == m and (window is None or window >= m):
            return causal, None
        return False, bias(n, m, window, q.dtype, q.device)

    @classmethod
    def forward(
        cls, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        causal, mask = Fused._mask(q, k, causal, window)
        return _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)

    @classmethod
    def backward(
        cls,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (wide(x) for x in (grad, q, k, v, out))
        causal, mask = Fused._mask(q, k, causal, window)
        return _flash_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)


class Plain:
    """Matmuls in at least fp32, `ROWS` queries at a time. softcap: bounds the scores, see `softcapped`; None: not."""

    softcap: ClassVar[float | None] = None

    @staticmethod
    def _blocks(n: int, m: int, causal: bool, window: int | None) -> list[tuple[slice, slice]]:
        """Blocks of queries, and the keys that some query of each sees."""
        blocks = []
        for a in range(0, n, ROWS):
            b = min(a + ROWS, n)
            low = 0 if window is None else max(0, a + m - n - window + 1)
            blocks.append((slice(a, b), slice(low, b + m - n) if causal else slice(0, m)))
        return blocks

    @classmethod
    def _scores(
        cls, q_GRnK: Tensor, k_GmK: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """The scores, and where they are capped their derivatives by what they are made of."""
        n, m = q_GRnK.shape[-2], k_GmK.shape[-2]
        s_GRnm, slope_GRnm = scale * (q_GRnK @ k_GmK.transpose(-1, -2).unsqueeze(1)), None
        if cls.softcap is not None:
            s_GRnm = softcapped(s_GRnm, cls.softcap)
            slope_GRnm = softcap_slope(s_GRnm, cls.softcap)
        return s_GRnm + bias(n, m, window, s_GRnm.dtype, s_GRnm.device) if causal else s_GRnm, slope_GRnm

    @classmethod
    def forward(
        cls, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        q_GRnK, k_GmK, v_GmK = wide(q[0]).unflatten(0, (k.shape[1], -1)), wide(k[0]), wide(v[0])
        outs, lses = [], []
        for rows, columns in Plain._blocks(q.shape[2], k.shape[2], causal, window):
            s_GRnm, _ = cls._scores(q_GRnK[:, :, rows], k_GmK[:, columns], causal, window, scale)
            lse_GRn = s_GRnm.logsumexp(-1)
            outs.append((s_GRnm - lse_GRn.unsqueeze(-1)).exp() @ v_GmK[:, columns].unsqueeze(1))
            lses.append(lse_GRn)
        return torch.cat(outs, -2).flatten(0, 1)[None].to(q.dtype), torch.cat(lses, -1).flatten(0, 1)[None]

    @classmethod
    def backward(
        cls,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        G = k.shape[1]
        q_GRnK, g_GRnK, o_GRnK, lse_GRn = (wide(x[0]).unflatten(0, (G, -1)) for x in (q, grad, out, lse))
        k_GmK, v_GmK = wide(k[0]), wide(v[0])
        dq, dk, dv = torch.empty_like(q_GRnK), torch.zeros_like(k_GmK), torch.zeros_like(v_GmK)
        delta_GRn = (g_GRnK * o_GRnK).sum(-1)
        for rows, columns in Plain._blocks(q.shape[2], k.shape[2], causal, window):
            block, keys, values = q_GRnK[:, :, rows], k_GmK[:, columns], v_GmK[:, columns]
            s_GRnm, slope_GRnm = cls._scores(block, keys, causal, window, scale)
            p_GRnm = (s_GRnm - lse_GRn[:, :, rows, None]).exp()
            dp_GRnm = g_GRnK[:, :, rows] @ values.transpose(-1, -2).unsqueeze(1)
            ds_GRnm = scale * p_GRnm * (dp_GRnm - delta_GRn[:, :, rows, None])
            ds_GRnm = ds_GRnm if slope_GRnm is None else ds_GRnm * slope_GRnm
            dq[:, :, rows] = ds_GRnm @ keys.unsqueeze(1)
            dk[:, columns] += (ds_GRnm.transpose(-1, -2) @ block).sum(1)
            dv[:, columns] += (p_GRnm.transpose(-1, -2) @ g_GRnK[:, :, rows]).sum(1)
        return dq.flatten(0, 1)[None], dk[None], dv[None]


@cache
def capped(softcap: float) -> type[Plain]:
    """`Plain` with these bounds: no fused kernel of a CPU has any."""
    return type("Capped", (Plain,), {"softcap": softcap})


def tile_for(device: torch.device, softcap: float | None = None) -> type[Tile]:
    """The way that `device` has."""
    if softcap is not None:
        return capped(softcap)
    return Fused if device.type == "cpu" else Plain


def join_sink(out_BTHK: Tensor, lse_BHT: Tensor, sink_H: Tensor) -> None:
    """Lets a logit that has no value take its share of each softmax, in place: of its result [B, T, H, K] and its
    logsumexp [B, H, T], both in at least fp32. With these the backward of the parts is that of the whole."""
    both_BHT = torch.logaddexp(lse_BHT, sink_H.to(lse_BHT.dtype)[:, None])
    out_BTHK.mul_((lse_BHT - both_BHT).exp().transpose(1, 2).unsqueeze(-1))
    lse_BHT.copy_(both_BHT)


def sink_gradient(sink_H: Tensor, grad_BTHK: Tensor, out_BTHK: Tensor, lse_BHT: Tensor) -> Tensor:
    """The gradient of these logits [H]: -p Σ grad · out over all queries, p their share, from result and logsumexp."""
    delta_BTH = (wide(grad_BTHK) * wide(out_BTHK)).sum(-1)
    share_BHT = (sink_H.to(lse_BHT.dtype)[:, None] - lse_BHT).exp()
    return -(share_BHT.transpose(1, 2) * delta_BTH).sum((0, 1)).to(sink_H.dtype)
