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

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from models.precision import wide

ROWS = 128

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tile(Protocol):
    """One way to compute a part."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [1, H, n, K] and lse."""
        ...

    @staticmethod
    def backward(
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

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        causal, mask = Fused._mask(q, k, causal, window)
        return _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)

    @staticmethod
    def backward(
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
    """Matmuls in at least fp32, `ROWS` queries at a time."""

    @staticmethod
    def _blocks(n: int, m: int, causal: bool, window: int | None) -> list[tuple[slice, slice]]:
        """Blocks of queries, and the keys that some query of each sees."""
        blocks = []
        for a in range(0, n, ROWS):
            b = min(a + ROWS, n)
            low = 0 if window is None else max(0, a + m - n - window + 1)
            blocks.append((slice(a, b), slice(low, b + m - n) if causal else slice(0, m)))
        return blocks

    @staticmethod
    def _scores(q_GRnK: Tensor, k_GmK: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
        n, m = q_GRnK.shape[-2], k_GmK.shape[-2]
        s_GRnm = scale * (q_GRnK @ k_GmK.transpose(-1, -2).unsqueeze(1))
        return s_GRnm + bias(n, m, window, s_GRnm.dtype, s_GRnm.device) if causal else s_GRnm

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        q_GRnK, k_GmK, v_GmK = wide(q[0]).unflatten(0, (k.shape[1], -1)), wide(k[0]), wide(v[0])
        outs, lses = [], []
        for rows, columns in Plain._blocks(q.shape[2], k.shape[2], causal, window):
            s_GRnm = Plain._scores(q_GRnK[:, :, rows], k_GmK[:, columns], causal, window, scale)
            lse_GRn = s_GRnm.logsumexp(-1)
            outs.append((s_GRnm - lse_GRn.unsqueeze(-1)).exp() @ v_GmK[:, columns].unsqueeze(1))
            lses.append(lse_GRn)
        return torch.cat(outs, -2).flatten(0, 1)[None].to(q.dtype), torch.cat(lses, -1).flatten(0, 1)[None]

    @staticmethod
    def backward(
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
            s_GRnm = Plain._scores(block, keys, causal, window, scale)
            p_GRnm = (s_GRnm - lse_GRn[:, :, rows, None]).exp()
            dp_GRnm = g_GRnK[:, :, rows] @ values.transpose(-1, -2).unsqueeze(1)
            ds_GRnm = scale * p_GRnm * (dp_GRnm - delta_GRn[:, :, rows, None])
            dq[:, :, rows] = ds_GRnm @ keys.unsqueeze(1)
            dk[:, columns] += (ds_GRnm.transpose(-1, -2) @ block).sum(1)
            dv[:, columns] += (p_GRnm.transpose(-1, -2) @ g_GRnK[:, :, rows]).sum(1)
        return dq.flatten(0, 1)[None], dk[None], dv[None]


def tile_for(device: torch.device) -> type[Tile]:
    """The way that `device` has."""
    return Fused if device.type == "cpu" else Plain
