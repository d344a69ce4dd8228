"""Weights that learn while they are read, a large chunk at a time (LaCT, 2505.23884, section 3).

f_W(x) = W1 (silu(W0 x) ⊙ W2 x). The tokens of a chunk read the weights that it was entered with, o = f_W(q), and at its
end these take one step down the loss Σ_t -v_t·f_W(k_t), with a rate a token and weight: with G the gradient's negative
and μ̄ the mean of the tokens' momenta,

    M ← μ̄·M + G,   W ← rows of (W + NS(M)) at the norms that the rows had at first,

NS the orthogonal matrix nearest to M (Muon; `models.kernels.newton_schulz`). The chunks of a document lie on a grid
that begins with it, so that no cut of the sequence moves them: of a chunk that is not over, what leaves a span is the
sum of its tokens' gradients so far. It is no affine map.

A state is [B, H, 9 N + 2], N = E·K: W0, W1, W2, the three M, the three sums of G, the sum of the momenta, and 1 once a
document has begun. Zeros are the state before one.

Legend: B spans, T tokens, H heads, K channels of a head, E hidden channels; W0, W2 are [H, E, K], W1 [H, K, E].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels.newton_schulz import FIVE, newton_schulz
from models.kernels.pieces import pieces_of

Three = tuple[Tensor, Tensor, Tensor]
EPSILON = 1e-5  # beside the norm of a row


class Learning(NamedTuple):
    """One span's, [H, ...]."""

    weights: Three
    momenta: Three
    sums: Three
    mu: Tensor  # [H]


def read(weights: Three, x_HTK: Tensor) -> Tensor:
    """f_W(x), [H, T, K]."""
    W0, W1, W2 = weights
    return (torch.nn.functional.silu(x_HTK @ W0.mT) * (x_HTK @ W2.mT)) @ W1.mT


def gradients(weights: Three, k_HTK: Tensor, v_HTK: Tensor, rates_HT3: Tensor) -> Three:
    """Σ_t rate_t ∂(v_t·f_W(k_t)) / ∂W of each weight."""
    W0, W1, W2 = weights
    inner, gate = k_HTK @ W0.mT, k_HTK @ W2.mT
    share = inner.sigmoid()
    d_hidden, silu = v_HTK @ W1, inner * share
    rate_0, rate_1, rate_2 = (rate.unsqueeze(-1) for rate in rates_HT3.unbind(-1))
    return (
        (rate_0 * d_hidden * gate * share * (1 + inner - silu)).mT @ k_HTK,
        (rate_1 * v_HTK).mT @ (silu * gate),
        (rate_2 * d_hidden * silu).mT @ k_HTK,
    )


def step(now: Learning, first: Three, tokens: int) -> Learning:
    """The end of a chunk of so many tokens; `first`: the weights that a document begins with."""
    mu = (now.mu / tokens)[:, None, None]
    momenta = [mu * m + g for m, g in zip(now.momenta, now.sums, strict=True)]
    moved = [w + newton_schulz(m, each=FIVE) for w, m in zip(now.weights, momenta, strict=True)]
    weights = [
        w / (w.norm(dim=-1, keepdim=True) + EPSILON) * f.norm(dim=-1, keepdim=True)
        for w, f in zip(moved, first, strict=True)
    ]
    return Learning(tuple(weights), tuple(momenta), _nothing(first), torch.zeros_like(now.mu))  # type: ignore[arg-type]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    mu: Tensor,
    first: Three,
    positions: Tensor,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, T, H, K], rates [B, T, H, 3], mu [B, T, H], first the three weights, positions [B, T], state
    [B, H, S] -> outputs [B, T, H, K] and the last state."""
    outs, left, pieces = [], [], None if positions.is_meta else pieces_of(positions)
    for b in range(len(q)):
        row = [x[b].transpose(0, 1) for x in (q, k, v, rates, mu)]
        runs = [range(q.shape[1])] if pieces is None else [range(p.past, p.past + p.end - p.begin) for p in pieces[b]]
        at = [position for run in runs for position in run]
        out, now = _span(row, first, at, _unpacked(state[b], first), chunk)
        outs.append(out.transpose(0, 1))
        left.append(_packed(now))
    taught = 0 * (rates.sum() + mu.sum())  # where no chunk ends nothing else has a gradient for them, and FSDP waits
    return torch.stack(outs) + taught, torch.stack(left)


def _span(row: list[Tensor], first: Three, at: list[int], now: Learning, chunk: int) -> tuple[Tensor, Learning]:
    """One span, from piece to piece of a chunk of a document; `at` are its positions."""
    cuts = [0, *(t for t in range(1, len(at)) if at[t] % chunk == 0), len(at)]
    sizes = [end - begin for begin, end in zip(cuts, cuts[1:], strict=False)]
    # Split at once: the gradient of each slice of a loop would be as long as the span.
    pieces, outs = zip(*(x.split(sizes, dim=1) for x in row), strict=True), []
    for begin, end, (q, k, v, rates, mu) in zip(cuts, cuts[1:], pieces, strict=False):
        if at[begin] == 0:
            now = Learning(first, _nothing(first), _nothing(first), torch.zeros_like(now.mu))
        outs.append(read(now.weights, q))
        (s0, s1, s2), (g0, g1, g2) = now.sums, gradients(now.weights, k, v, rates)
        now = now._replace(sums=(s0 + g0, s1 + g1, s2 + g2), mu=now.mu + mu.sum(1))
        if (at[end - 1] + 1) % chunk == 0:
            now = step(now, first, chunk)
    return torch.cat(outs, 1), now


def _nothing(first: Three) -> Three:
    W0, W1, W2 = (torch.zeros_like(w) for w in first)
    return W0, W1, W2


def _packed(now: Learning) -> Tensor:
    parts = [x.flatten(1) for x in (*now.weights, *now.momenta, *now.sums)]
    return torch.cat([*parts, now.mu.unsqueeze(-1), torch.ones_like(now.mu).unsqueeze(-1)], -1)


def _unpacked(state: Tensor, first: Three) -> Learning:
    """Splits the state of one span [H, S]; the first weights where no document has begun."""
    sizes = [w[0].numel() for w in first] * 3
    *parts, mu, begun = state.split([*sizes, 1, 1], -1)
    nine = [part.view_as(first[i % 3]) for i, part in enumerate(parts)]
    weights = [w + (1 - begun.unsqueeze(-1)) * f for w, f in zip(nine, first, strict=False)]
    return Learning(tuple(weights), tuple(nine[3:6]), tuple(nine[6:]), mu.squeeze(-1))  # type: ignore[arg-type]
