"""The scan over chunks: the one loop that is sequential, with its gradient written out.

Legend: N chunks, B spans, H heads, C tokens a chunk, K key width, W columns of the state: V values, and K more where
the effect of the span on an incoming state is wanted too.
"""

from typing import Any

import torch
from torch import Tensor


class Add(torch.autograd.Function):
    """S ← kept·S + update. kept [N,B,H,1 or K], update [N,B,H,K,W], state [B,H,K,W] -> states before each chunk
    [N,B,H,K,W], and after the last one."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        states = update.new_empty(len(update) + 1, *update.shape[1:])
        states[0] = state
        factor = decay.unsqueeze(-1)
        for n in range(len(update)):
            torch.addcmul(update[n], factor[n], states[n], out=states[n + 1])
        before = states[:-1]
        ctx.save_for_backward(decay, before)
        return before, states[-1].clone()

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_state: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        decay, before = ctx.saved_tensors
        d_states, factor = before.new_empty(len(before) + 1, *before.shape[1:]), decay.unsqueeze(-1)
        d_states[-1] = d_state
        for n in reversed(range(len(before))):
            torch.addcmul(d_before[n], factor[n], d_states[n + 1], out=d_states[n])
        d_update = d_states[1:]
        return (d_update * before).sum(-1).sum_to_size(decay.shape), d_update, d_states[0].clone()


class Replace(torch.autograd.Function):
    """written = u - w·S, S ← kept·S + writesᵀ·written. u [N,B,H,C,W], w and writes [N,B,H,C,K] -> states before each
    chunk [N,B,H,K,W], what each token wrote [N,B,H,C,W], and the state after the last chunk."""

    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, u: Tensor, w: Tensor, writes: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, B, H, _, W = u.shape
        K = w.shape[-1]
        before, written = u.new_empty(N, B * H, K, W), torch.empty_like(u).flatten(1, 2)
        factor = decay.flatten(1, 2).unsqueeze(-1)
        u_, w_, writes_ = (x.flatten(1, 2) for x in (u, w, writes))
        state = state.flatten(0, 1)
        for n in range(N):
            before[n] = state
            torch.baddbmm(u_[n], w_[n], state, alpha=-1, out=written[n])
            state = torch.baddbmm(factor[n] * state, writes_[n].mT, written[n])
        ctx.save_for_backward(decay, w, writes, before, written)
        return before.view(N, B, H, K, W), written.view_as(u), state.view(B, H, K, W)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_before: Tensor, d_written: Tensor, d_last: Tensor
    ) -> tuple[Tensor, ...]:
        decay, w, writes, before, written = ctx.saved_tensors
        N, B, H, C, K = w.shape
        d_before, d_written = d_before.flatten(1, 2), d_written.flatten(1, 2)
        factor, w_, writes_ = decay.flatten(1, 2).unsqueeze(-1), w.flatten(1, 2), writes.flatten(1, 2)
        d_after, d_u = torch.empty_like(before), torch.empty_like(written)
        d_state = d_last.flatten(0, 1)
        for n in reversed(range(N)):
            d_after[n] = d_state
            torch.baddbmm(d_written[n], writes_[n], d_state, out=d_u[n])
            d_state = torch.baddbmm(torch.addcmul(d_before[n], factor[n], d_state), w_[n].mT, d_u[n], alpha=-1)
        d_w = (d_u @ before.mT).neg_().view_as(w)
        d_writes = (written @ d_after.mT).view_as(w)
        d_kept = (d_after * before).sum(-1).view(N, B, H, K).sum_to_size(decay.shape)
        return d_kept, d_u.view(N, B, H, C, -1), d_w, d_writes, d_state.view(B, H, K, -1)
