"""Softmax attention to the keys that an index selects (DeepSeek Sparse Attention, DeepSeek-V3.2, 2512.02556,
section 2).

Some light heads score the tokens of a document before a query, I_ts = Σ_j w_tj·ReLU(q_tj·k_s), and the query attends to
the `top_k` of largest score, its own token among the candidates. Equal scores, and ReLU makes many that are 0, go to
the nearer token, so that any device chooses the same.

The choice has no gradient. The index learns by a loss of its own, the divergence Σ_s p_ts log(p_ts / softmax_s(I_ts))
of its distribution from p, the mean over heads of what attention gave each key, as a constant; over the selected keys,
or over all where `dense` has attention see all of them, which is how an index begins.

Queries are taken some at a time, and computed again for their gradients: no more is held than keys, queries and
outputs.

Legend: B rows, T queries, S keys on the key axis, H heads, G key/value heads, R = H / G, K key width, V value width, J
heads of the index, I its width, X selected keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.precision import wide

NUMBERS = 1 << 24  # of scores of the index that exist at a time


class Index(NamedTuple):
    """The index's part of a layer: queries [B, T, J, I], their weights [B, T, J], keys [B, T, I]; how many keys a query
    selects; whether attention sees all keys instead, while the index learns."""

    q: Tensor
    weights: Tensor
    k: Tensor
    top_k: int
    dense: bool


class Selected(NamedTuple):
    """The reads of attention, [B, T, H, V], and the index's loss of each query, [B, T]."""

    out: Tensor
    loss: Tensor


def packed(k: Tensor, v: Tensor, index_k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, T, G, K] with those of the index [B, T, I], and values [B, T, G, V], as one head of each."""
    return torch.cat((k.flatten(2), index_k), dim=-1).unsqueeze(2), v.flatten(2).unsqueeze(2)


def attend_selected(q: Tensor, keys: Tensor, values: Tensor, index: Index, first: Tensor, last: Tensor) -> Selected:
    """Attends from q [B, T, H, K] to `packed` keys and values on the key axis [B or 1, S, 1, ...].

    first, last: [B, T] int64, where the key axis has the first token that a query may see, and the query's own.
    """
    B, T, _, K = q.shape
    S, width = keys.shape[1], index.k.shape[-1]
    rows = [x.expand(B, *x.shape[1:]) for x in (keys.squeeze(2), values.squeeze(2))]
    k_BSGK, k_BSI = rows[0][..., :-width].unflatten(-1, (-1, K)), rows[0][..., -width:]
    v_BSGV = rows[1].unflatten(-1, (k_BSGK.shape[2], -1))
    step = max(1, NUMBERS // (B * S * index.q.shape[2]))
    outs = []
    for at in range(0, T, step):
        part = slice(at, at + step)
        xs = (
            q[:, part],
            k_BSGK,
            v_BSGV,
            index.q[:, part],
            index.weights[:, part],
            k_BSI,
            first[:, part],
            last[:, part],
        )
        if torch.is_grad_enabled() and T > step:
            outs.append(checkpoint(_some, *xs, index.top_k, index.dense, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(_some(*xs, index.top_k, index.dense))
    return Selected(*(torch.cat(each, dim=1) for each in zip(*outs, strict=True)))


def _some(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    q_BTJI: Tensor,
    w_BTJ: Tensor,
    k_BSI: Tensor,
    first_BT: Tensor,
    last_BT: Tensor,
    count: int,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and losses of some queries."""
    place_S = torch.arange(k_BSGK.shape[1], device=q_BTHK.device)
    seen_BTS = (place_S >= first_BT.unsqueeze(-1)) & (place_S <= last_BT.unsqueeze(-1))
    scores_BTJS = torch.einsum("btji,bsi->btjs", wide(q_BTJI), wide(k_BSI)).relu()
    scores_BTS = torch.einsum("btjs,btj->bts", scores_BTJS, wide(w_BTJ))
    q_BTGRK = wide(q_BTHK).unflatten(2, (k_BSGK.shape[2], -1)) * q_BTHK.shape[-1] ** -0.5
    if dense or count >= len(place_S):
        logits = torch.einsum("btgrk,bsgk->btgrs", q_BTGRK, wide(k_BSGK))
        there, v = seen_BTS, wide(v_BSGV).unsqueeze(1)
    else:
        places_BTX = select(scores_BTS.detach(), seen_BTS, count)
        there, scores_BTS = (x.gather(-1, places_BTX) for x in (seen_BTS, scores_BTS))
        row_B11 = torch.arange(len(q_BTHK), device=q_BTHK.device).view(-1, 1, 1)
        logits = torch.einsum("btgrk,btxgk->btgrx", q_BTGRK, wide(k_BSGK[row_B11, places_BTX]))
        v = wide(v_BSGV[row_B11, places_BTX])
    p = logits.masked_fill(~there[:, :, None, None], -torch.inf).softmax(-1)
    out_BTHV = torch.einsum("btgrx,btxgv->btgrv", p, v.expand(*p.shape[:2], *v.shape[2:])).flatten(2, 3)
    target = p.detach().mean((2, 3))
    learnt = scores_BTS.masked_fill(~there, -torch.inf).log_softmax(-1).masked_fill(~there, 0.0)
    return out_BTHV.to(q_BTHK.dtype), (torch.special.xlogy(target, target) - target * learnt).sum(-1)


def select(scores_BTS: Tensor, seen_BTS: Tensor, count: int) -> Tensor:
    """The places [B, T, X] int64 of each query's `count` largest scores among the keys that it may see, in order, the
    nearer of equals first; where it sees fewer, others that it may not see fill up."""
    scores_BTS = scores_BTS.masked_fill(~seen_BTS, -torch.inf)
    least_BT1 = scores_BTS.topk(count, dim=-1).values[..., -1:]
    above_BTS, equal_BTS = scores_BTS > least_BT1, scores_BTS == least_BT1
    room_BT1 = count - above_BTS.sum(-1, keepdim=True)
    nearer_BTS = equal_BTS.flip(-1).cumsum(-1).flip(-1)
    chosen_BTS = above_BTS | equal_BTS & (nearer_BTS <= room_BT1)
    S = scores_BTS.shape[-1]
    order_S = torch.arange(S, 0, -1, device=scores_BTS.device)
    return S - (chosen_BTS * order_S).topk(count, dim=-1).values


class AddLoss(torch.autograd.Function):
    """y, with the gradient of weight·loss: a loss that a layer has by itself joins the backward pass of its output."""

    @staticmethod
    def forward(ctx, y: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return grad, torch.full((), ctx.weight, dtype=dtype, device=grad.device), None


def joined(y: Tensor, loss: Tensor, weight: float) -> Tensor:
    """The same y; what is differentiated through it has weight·loss, a scalar, beside it."""
    added: Tensor = AddLoss.apply(y, loss, weight)  # type: ignore[no-untyped-call]
    return added


def causal(positions_BT: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """`first` and `last` of queries one after another, whose own keys begin at `offset` on the key axis."""
    last_BT = (offset + torch.arange(positions_BT.shape[1], device=positions_BT.device)).expand_as(positions_BT)
    return (last_BT - positions_BT).clamp_min(0), last_BT
