"""RG-LRU, HGRN, LRU, Longhorn and mLSTM as whole layers, each against its paper written token by token; how they start,
and what their kernels promise beyond being right: angles that stay exact, memory that does not grow with the state."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.axes import initialise
from models.kernels.complex_decay import ComplexSpan, wrap
from models.kernels.longhorn import LonghornSpan
from models.mixers import MIXERS
from models.mixers.rglru import STEEPEST, BoundedSqrt
from models.sequence import Whole

DIM, DOCUMENTS = 8, (19, 1, 50)
POSITIONS = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]


def convolve(conv, x, t, start):
    """Σ_j w_j x_{t-j} + b within the document that starts at `start`."""
    return sum(conv.weight[:, j] * x[t - j] for j in range(4) if t - j >= start) + conv.bias


def rglru(m, x):
    """2402.19427, figure 2 and equations 1 to 4; the authors' code at a document's first token."""
    u, h, outs = x @ m.x.weight.T, None, []
    for t in range(len(x)):
        v = convolve(m.conv, u, t, 0)
        per_head = torch.einsum("hk,hkj->hj", v.view(2, -1), m.gates) + m.gates_bias
        i, r = (gate.flatten() for gate in per_head.sigmoid().chunk(2, -1))
        a = torch.exp(-8 * F.softplus(m.Lambda) * r)
        h = i * v if h is None else a * h + (1 - a**2).sqrt() * i * v
        outs.append(h * F.gelu(x[t] @ m.y.weight.T, approximate="tanh"))
    return torch.stack(outs) @ m.out.weight.T


def hgrn(m, x):
    """2311.04823, equations 1 to 4 without the angle, the layer being the lowest: no bound."""
    h, outs = 0.0, []
    for x_t in x:
        f = (m.f.weight @ x_t).sigmoid()
        h = f * h + (1 - f) * F.silu(m.i.weight @ x_t)
        outs.append(h / (h.square().mean() + 1e-5).sqrt() * m.norm.weight * F.silu(m.gate.weight @ x_t))
    return torch.stack(outs) @ m.out.weight.T


def lru(m, x):
    """2303.06349, appendix A's listing, in complex numbers; the layer's gelu and gated linear unit after it."""
    value, gate = m.glu.weight.chunk(2)
    eigenvalues = torch.exp(torch.complex(-m.nu_log.exp(), m.theta_log.exp()))
    B = torch.view_as_complex(m.B.weight.unflatten(0, (-1, 2)).movedim(1, -1).contiguous())
    C = torch.view_as_complex((m.C.weight.unflatten(1, (-1, 2)) * torch.tensor([1.0, -1.0])).contiguous())
    h, outs = 0.0, []
    for x_t in x:
        h = eigenvalues * h + m.gamma_log.exp() * (B @ x_t.to(B.dtype))
        y = F.gelu((C @ h).real + m.D * x_t, approximate="tanh")
        outs.append((value @ y) * (gate @ y).sigmoid())
    return torch.stack(outs)


def longhorn(m, x):
    """2407.14207, algorithm 1 in Mamba's block."""
    u, S, outs = x @ m.x.weight.T, 0.0, []
    for t in range(len(x)):
        v = F.silu(convolve(m.conv, u, t, 0))
        dt, k, q = (m.dkq.weight @ v).split(m.widths)
        beta = (m.dt.weight @ dt + m.dt.bias).sigmoid()
        delta = beta / (1 + beta * (k @ k))
        S = (1 - delta[:, None] * k**2) * S + (delta * v)[:, None] * k
        outs.append((S @ q + m.D * v) * F.silu(m.z.weight @ x[t]))
    return torch.stack(outs) @ m.out.weight.T


def mlstm(m, x):
    """2405.04517, equations 19 to 27 without stabilisation, which fp64 can do without; h over max(|n·q|, 1).

    m is here only for the 1e-6 that the authors' code adds to the normaliser, in units of e^m.
    """
    C, n, m_t, outs = 0.0, 0.0, torch.full((2,), -torch.inf, dtype=x.dtype), []
    for x_t in x:
        q, k, v = ((w.weight @ x_t).view(2, -1) for w in (m.q, m.k, m.v))
        rates = (m.rates.weight @ x_t).view(2, 2) + m.rates_bias
        i, f = (15 * (rates / 15).tanh()).unbind(-1)
        C = f.sigmoid()[:, None, None] * C + i.exp()[:, None, None] * k[:, :, None] * v[:, None, :]
        n = f.sigmoid()[:, None] * n + i.exp()[:, None] * k
        read = torch.einsum("hkv,hk->hv", C, q) / q.shape[-1] ** 0.5
        m_t = torch.maximum(F.logsigmoid(f) + m_t, i)
        norm = ((n * q).sum(-1).abs() / q.shape[-1] ** 0.5).clamp_min(1.0) + 1e-6 * m_t.exp()
        h = read / norm[:, None]
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        outs.append(h.flatten() * m.norm.weight * (m.gate.weight @ x_t).sigmoid())
    return torch.stack(outs) @ m.out.weight.T


LAYERS = {
    "rglru": (rglru, 2),
    "hgrn": (hgrn, None),
    "lru": (lru, None),
    "longhorn": (longhorn, None),
    "mlstm": (mlstm, 2),
}


def build(name, dim=DIM):
    heads = LAYERS[name][1]
    return initialise(MIXERS[name](dim=dim, **({} if heads is None else {"heads": heads})), 0)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_paper_written_token_by_token(name):
    layer, paper = build(name).double(), LAYERS[name][0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        if name == "mlstm":
            layer.rates_bias[:, 0] += 12  # weights around 1, where the normaliser is at work
    x = torch.randn(1, sum(DOCUMENTS), DIM, generator=generator, dtype=torch.float64)
    got = layer(x, Whole.of(POSITIONS), slot="s")[0]
    want = torch.cat([paper(layer, document) for document in x[0].split(DOCUMENTS)])
    assert (got - want).norm() <= 1e-11 * want.norm(), ((got - want).norm() / want.norm()).item()


def test_the_square_root_is_exact_and_its_derivative_bounded():
    x = torch.tensor([0.0, 1e-12, 1e-3, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    y = BoundedSqrt.apply(x)
    assert torch.equal(y, x.sqrt())
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, (0.5 / x.detach().sqrt()).clamp_max(STEEPEST))


def test_states_start_by_forgetting_at_the_papers_rates():
    forget = torch.exp(-8 * F.softplus(build("rglru", 512).Lambda))
    assert forget.min() >= 0.9 - 1e-4 and forget.max() <= 0.999 + 1e-4
    assert abs(forget.mean() - 0.9495) < 0.01  # of U(0.9, 0.999)
    layer = build("lru", 512)
    size = torch.exp(-layer.nu_log.exp())
    torch.testing.assert_close(layer.gamma_log.exp(), (1 - size**2).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(size.square().mean(), torch.tensor((0.81 + 0.998001) / 2), rtol=1e-3, atol=0)
    assert size.min() > 0.9 and size.max() < 0.999 and layer.theta_log.exp().max() <= 6.28
    biases = build("mlstm").rates_bias
    assert biases[:, 0].eq(-10).all() and biases[:, 1].tolist() == [3.0, 6.0]


@pytest.mark.parametrize("wrong", [{"r_min": 0.99, "r_max": 0.9}, {"r_max": 1.0}, {"max_phase": 7.0}])
def test_a_circle_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="r_min=.*must|max_phase=.*must"):
        MIXERS["lru"](dim=DIM, **wrong)


def test_angles_stay_exact_over_a_million_tokens():
    """A state of 1 that only turns. In fp32 radians, wrapped every 64 tokens, this is off by 0.09."""
    T, turns = 1_000_000, torch.rand(1, 1, 3, generator=torch.Generator().manual_seed(0))
    starts, u = torch.zeros(1, T, dtype=torch.bool), torch.zeros(1, T, 3, 2)
    effect = ComplexSpan(u, torch.zeros(1, T, 3), turns.expand(1, T, 3), starts=starts, size=1000).effect
    want = wrap(turns[0].double() * T)
    assert (wrap(effect.A[..., 1].double() - want) * 2 * math.pi).abs().max() < 1e-6


def test_longhorn_keeps_no_state_of_a_token():
    """What a pass saves for its gradient is its inputs and a state a block, not one a token."""
    T, D, N = 256, 8, 16
    q, k = torch.randn(1, T, N), torch.randn(1, T, N)
    v, delta = torch.randn(1, T, D, requires_grad=True), torch.full((1, T, D), 0.02)
    sizes = []

    def keep(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        LonghornSpan(q, k, v, delta, starts=torch.zeros(1, T, dtype=torch.bool)).finish(None)
    assert sizes and max(sizes) <= T * max(D, N) < T * D * N // 4
