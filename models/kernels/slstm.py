"""sLSTM token by token (2405.04517, section 2.2; equation numbers as of v2): gates that see the output before them.

With (ĩ, f̃, z̃, õ) = W x_t + R h_{t-1} + b, R one matrix a head,

    c_t = σ(f̃)·c_{t-1} + e^ĩ·tanh z̃,  n_t = σ(f̃)·n_{t-1} + e^ĩ,  h_t = σ(õ)·c_t / n_t     (equations 8 to 14)

c and n are stored divided by e^{m_t}, m_t = max(log σ(f̃) + m_{t-1}, ĩ) (equation 15). m cancels in h, so it carries no
gradient; before the first token it is absent, and n is at least 1 after it.

A state is [B, H, 4, K]: c, n, m, h; zeros are the state of a document that has not begun.

Legend: B spans, T tokens, H heads, K channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.mlstm import ABSENT
from models.nonlinear_recurrence import masked, starts_of


def run(x_BTH4K: Tensor, R_HK4K: Tensor, positions_BT: Tensor, state_BH4K: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, H, 4K] is W x + b, R [H, K, 4K] -> h [B, T, H, K] and the last state."""
    if x_BTH4K.is_meta:  # as much work, of the same shapes, at once
        h, c, n, m = step(x_BTH4K, R_HK4K, *x_BTH4K.chunk(4, -1))
        return h, torch.stack([y[:, -1] for y in (c, n, m, h)], 2)
    c, n, m, h = state_BH4K.unbind(2)
    m = torch.where(n > 0, m, ABSENT).detach()
    starts, outs = starts_of(positions_BT), []
    for t, x in enumerate(x_BTH4K.unbind(1)):
        if t in starts:
            c, n, h = (masked(starts[t], state) for state in (c, n, h))
            m = masked(starts[t], m, ABSENT)
        h, c, n, m = step(x, R_HK4K, c, n, m, h)
        outs.append(h)
    return torch.stack(outs, 1), torch.stack((c, n, m, h), 2)


def step(x: Tensor, R_HK4K: Tensor, c: Tensor, n: Tensor, m: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """x [B, H, 4K], the others [B, H, K] -> h, c, n, m."""
    i, f, z, o = (x + (h.unsqueeze(-2) @ R_HK4K).squeeze(-2)).chunk(4, -1)
    before = F.logsigmoid(f) + m
    m = torch.maximum(before, i).detach()
    forget, new = (before - m).exp(), (i - m).exp()
    c, n = torch.addcmul(forget * c, new, z.tanh()), torch.addcmul(new, forget, n)
    return o.sigmoid() * c / n, c, n, m
