"""Further mixers as whole layers, each against its paper written token by token: what a test of the rule alone, in
`test_recurrence.py`, and of the mixer over the rule, in `test_mixers.py`, take on trust."""

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.axes import initialise
from models.block import Block
from models.cross_layer import Depth
from models.ffn import ChannelMix, SwiGLU
from models.kernels import delta_gates
from models.lm import LM
from models.mixers import MIXERS
from models.sequence import Memory, Whole
from tests.models import test_recurrence

DIM, DOCUMENTS = 8, (19, 1, 50)
POSITIONS = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
DEPTH = Depth(1, 4)


def lightning(m, x):
    """MiniMax-01's code: slope 2^{-8(h+1)/H}·(1 - l/(L - 1 + 1e-5) + 1e-5), heads of [q, k, v] side by side."""
    S, outs = torch.zeros(2, 4, 4, dtype=x.dtype), []
    slopes = torch.tensor([2**-4, 2**-8], dtype=x.dtype) * (1 - 1 / (3 + 1e-5) + 1e-5)
    for x_t in x:
        q, k, v = F.silu(m.qkv.weight @ x_t).view(2, 3, 4).unbind(1)
        S = torch.exp(-slopes)[:, None, None] * S + k[:, :, None] * v[:, None, :]
        o = torch.einsum("hkv,hk->hv", S, q).flatten()
        o = o / (o.square().mean() + 1e-5).sqrt() * m.norm.weight
        outs.append(o * (m.gate.weight @ x_t).sigmoid())
    return torch.stack(outs) @ m.out.weight.T


def candidate(x):
    """2410.01201, appendix B's listing."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def mingru(m, x):
    """2410.01201, section 3.1, with the listing's g."""
    h, outs = 0.0, []
    for x_t in x:
        z = (m.z.weight @ x_t).sigmoid()
        h = (1 - z) * h + z * candidate(m.h.weight @ x_t)
        outs.append(h)
    return torch.stack(outs) @ m.out.weight.T


def minlstm(m, x):
    """2410.01201, section 3.2, with the listing's g."""
    h, outs = 0.0, []
    for x_t in x:
        f, i = (m.f.weight @ x_t).sigmoid(), (m.i.weight @ x_t).sigmoid()
        h = f / (f + i) * h + i / (f + i) * candidate(m.h.weight @ x_t)
        outs.append(h)
    return torch.stack(outs) @ m.out.weight.T


def gateloop(m, x):
    """2311.01927, in complex numbers: one head a channel."""
    h, outs = 0.0, []
    for x_t in x:
        q, k, v = (m.qkv.weight @ x_t).view(-1, 3).unbind(-1)
        size = (m.alpha.weight @ x_t + m.alpha_bias).sigmoid()
        h = size * torch.exp(1j * (m.beta.weight @ x_t + m.beta.bias)) * h + k * v
        outs.append(q * h.real * F.silu(m.gate.weight @ x_t))
    return torch.stack(outs) @ m.out.weight.T


def lightnet(m, x):
    """2405.21022: in every key channel a softmax over the past, over all of it again for each token."""
    q, k, v = (part.view(len(x), 2, -1) for part in (x @ m.qkv.weight.T).split(m.widths, -1))
    outs = []
    for t in range(len(x)):
        weights = k[: t + 1].softmax(0)
        o = torch.einsum("hk,shk,shv->hv", F.silu(q[t]), weights, v[: t + 1]).flatten() / q.shape[-1] ** 0.5
        o = o / (o.square().mean() + 1e-5).sqrt() * m.norm.weight
        outs.append(o * F.silu(m.gate_out.weight @ m.gate_in.weight @ x[t]))
    return torch.stack(outs) @ m.out.weight.T


def rwkv6(m, x):
    """2404.05892, Finch, and the authors' code of it: the state is read before the token's decay and write."""
    S, past, outs = torch.zeros(2, 4, 4, dtype=x.dtype), torch.zeros_like(x[0]), []
    for x_t in x:
        delta, past = past - x_t, x_t
        low = (m.mix_in.weight @ (x_t + delta * m.mix)).tanh().view(5, -1)
        mixed = [x_t + delta * (m.mixes[n] + low[i] @ m.mix_out[i]) for i, n in enumerate("wkvrg")]
        w = torch.exp(-torch.exp(m.decay + m.decay_out.weight @ (m.decay_in.weight @ mixed[0]).tanh())).view(2, 4, 1)
        k, v, r = ((p.weight @ mixed[i]).view(2, 4) for i, p in enumerate((m.k, m.v, m.r), 1))
        written = k[:, :, None] * v[:, None, :]
        o = torch.einsum("hkv,hk->hv", S + m.bonus.view(2, 4, 1) * written, r)
        S = w * S + written
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
        outs.append((o.flatten() * m.norm.weight + m.norm.bias) * F.silu(m.gate.weight @ mixed[4]))
    return torch.stack(outs) @ m.out.weight.T


def rwkv7(m, x, first=None):
    """2503.14456 and the authors' code of it, a state at a time; `first`: the values of the first layer, if another."""
    S, past, outs = torch.zeros(2, 4, 4, dtype=x.dtype), torch.zeros_like(x[0]), []
    for t, x_t in enumerate(x):
        delta, past = past - x_t, x_t
        r, w, k, v, a, g = (x_t + delta * m.mixes[name] for name in "rwkvag")
        low = {n: getattr(m, n).into.weight for n in ("decay", "rate", "gate")}
        up = {n: getattr(m, n).out.weight for n in low}
        w = torch.exp(-math.exp(-0.5) * (m.decay.bias + up["decay"] @ (low["decay"] @ w).tanh()).sigmoid())
        a = (m.rate.bias + up["rate"] @ low["rate"] @ a).sigmoid()
        gate = up["gate"] @ (low["gate"] @ g).sigmoid()
        value = m.v.weight @ v
        if m.share is not None:
            by = (m.share.bias + m.share.out.weight @ m.share.into.weight @ v).sigmoid()
            value = value + (first[t] - value) * by
        r, k = m.r.weight @ r, m.k.weight @ k
        away = (k * m.removal).view(2, 4)
        away = away / away.norm(dim=-1, keepdim=True)
        k = (k * (1 + (a - 1) * m.replacement)).view(2, 4)
        r, value, a, w = (y.view(2, 4) for y in (r, value, a, w))
        A = torch.diag_embed(w) - (a * away)[:, :, None] * away[:, None, :]
        S = A @ S + k[:, :, None] * value[:, None, :]
        o = torch.einsum("hkv,hk->hv", S, r)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
        bonus = (r * k * m.bonus.view(2, 4)).sum(-1, keepdim=True) * value
        outs.append((o.flatten() * m.norm.weight + m.norm.bias + bonus.flatten()) * gate)
    return torch.stack(outs) @ m.out.weight.T


def gated_deltaproduct(m, x):
    """2502.10297 in Gated DeltaNet's block: e^g Π_j (I - β_j k_j k_jᵀ), the matrices themselves multiplied."""
    u, S, outs, identity = x @ m.qkv.weight.T, torch.zeros(2, 4, 4, dtype=x.dtype), [], torch.eye(4, dtype=x.dtype)
    for t in range(len(x)):
        taps = sum(m.conv.weight[:, j] * u[t - j] for j in range(4) if t >= j)
        q, k, v = F.silu(taps).split((DIM, 2 * DIM, 2 * DIM))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q.view(2, 4), k.view(2, 2, 4)))
        beta = 2 * (m.beta.weight @ x[t]).sigmoid().view(2, 2, 1, 1)
        S = torch.exp(-m.A_log.exp() * F.softplus(m.dt.weight @ x[t] + m.dt_bias))[:, None, None] * S
        for j in range(2):
            S = (identity - beta[j] * k[j][:, :, None] * k[j][:, None, :]) @ S
            S = S + beta[j] * k[j][:, :, None] * v.view(2, 2, 4)[j][:, None, :]
        o = torch.einsum("hkv,hk->hv", S, q) / 2
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        outs.append(o.flatten() * F.silu(m.gate.weight @ x[t]))
    return torch.stack(outs) @ m.out.weight.T


def gated_deltanet2(m, x):
    """2605.22791: b by key channel takes away, w by value channel writes; the rest is Kimi Delta Attention's."""
    u, S, outs = x @ m.qkv.weight.T, torch.zeros(2, 4, 4, dtype=x.dtype), []
    for t in range(len(x)):
        q, k, v = F.silu(sum(m.conv.weight[:, j] * u[t - j] for j in range(4) if t >= j)).view(3, 2, 4)
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        dt = F.softplus(m.decay_out.weight @ (m.decay_in.weight @ x[t]) + m.dt_bias).view(2, 4)
        b, w = ((gate.weight @ x[t]).sigmoid().view(2, 4) for gate in (m.erase, m.write))
        S = torch.exp(-m.A_log.exp()[:, None] * dt)[..., None] * S
        erasing = torch.eye(4, dtype=x.dtype) - k[:, :, None] * (b * k)[:, None, :]
        S = erasing @ S + k[:, :, None] * (w * v)[:, None, :]
        o = torch.einsum("hkv,hk->hv", S, q) / 2
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        gate = m.gate_out.weight @ (m.gate_in.weight @ x[t]) + m.gate_out.bias
        outs.append(o.flatten() * gate.sigmoid())
    return torch.stack(outs) @ m.out.weight.T


def mamba(m, x):
    """2312.00752, algorithm 2 and figure 3, with the authors' code's Euler step of B."""
    u, S, outs = x @ m.x.weight.T, 0.0, []
    for t in range(len(x)):
        v = F.silu(sum(m.conv.weight[:, j] * u[t - j] for j in range(4) if t >= j) + m.conv.bias)
        dt, b, c = (m.dbc.weight @ v).split(m.widths)
        delta = F.softplus(m.dt.weight @ dt + m.dt_bias)[:, None]
        S = torch.exp(-delta * m.A_log.exp()) * S + delta * v[:, None] * b
        outs.append((S @ c + m.D * v) * F.silu(m.z.weight @ x[t]))
    return torch.stack(outs) @ m.out.weight.T


def mamba3(m, x):
    """2603.15569: the trapezoidal rule on a complex state, step by step: pairs of rows are complex numbers, each
    multiplied by e^{-iΔθ} in a token, B and C stay as they are. θ, A and the biases are those of the authors' code."""
    N, H = m.key_dim, len(m.D)
    pairs = len(m.angles.weight)
    state, written = torch.zeros(H, N, m.value_dim, dtype=x.dtype), torch.zeros(H, N, m.value_dim, dtype=x.dtype)
    outs = []

    def normed(norm, y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    def rotated(rows, angle):
        """[H, N, V] by e^{-i angle}, angle [H, pairs]."""
        z = torch.complex(rows[:, 0 : 2 * pairs : 2], rows[:, 1 : 2 * pairs : 2])
        z = z * torch.exp(-1j * angle)[..., None]
        return torch.cat((torch.stack((z.real, z.imag), 2).flatten(1, 2), rows[:, 2 * pairs :]), 1)

    for x_t in x:
        v = (m.x.weight @ x_t).view(H, -1)
        dt, a, trap = (m.rates.weight @ x_t).view(H, 3).unbind(1)
        dt, trap = F.softplus(dt + m.dt_bias), trap.sigmoid()
        A = -torch.where(a >= 0, 1 + a, 1 / (1 - a))
        b, c = (m.bc.weight @ x_t).view(-1, 2, N).unbind(1)
        b, c = (y.repeat_interleave(H // len(y), 0) for y in (normed(m.b_norm, b), normed(m.c_norm, c)))
        b, c = b + m.b_bias, c + m.c_bias
        angle = dt[:, None] * torch.pi * (m.angles.weight @ x_t).tanh()
        alpha, halves = torch.exp(dt * A)[:, None, None], ((1 - trap) * dt)[:, None, None]
        state = rotated(alpha * (state + halves * written), angle)
        written = b[:, :, None] * v[:, None, :]
        state = state + (trap * dt)[:, None, None] * written
        y = torch.einsum("hnv,hn->hv", state, c) + m.D[:, None] * v
        outs.append(y.flatten() * F.silu(m.z.weight @ x_t))
    return torch.stack(outs) @ m.out.weight.T


def titans(m, x):
    """2501.00663, equations 10, 12 and 13 with gradients by autograd; 1/√K on queries, as in flash-linear-attention."""
    u, M, S, outs = x @ m.qkv.weight.T, torch.zeros(2, 4, 4, dtype=x.dtype), 0.0, []
    for t in range(len(x)):
        q, k, v = F.silu(sum(m.conv.weight[:, j] * u[t - j] for j in range(4) if t >= j)).view(3, 2, 4)
        q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
        alpha, eta, theta = ((m.rates.weight @ x[t]).view(2, 3) + m.rates_bias).sigmoid()[..., None, None].unbind(1)
        memory = M.detach().requires_grad_()
        loss = (torch.einsum("hkv,hk->hv", memory, k.detach()) - v.detach()).square().sum()
        S = eta * S - theta / 2 * torch.autograd.grad(loss, memory)[0]
        M = (1 - alpha) * M + S
        o = torch.einsum("hkv,hk->hv", M, q) / 2
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        outs.append(o.flatten() * F.silu(m.gate.weight @ x[t]))
    return torch.stack(outs) @ m.out.weight.T


def mom(m, x):
    """2502.13685, section 3.2: softmax, two of four, their weights renormalised; each memory reads its tokens alone."""

    def alone(memory, tokens):
        return memory(tokens[None], Whole.of(torch.arange(len(tokens))[None]), slot="s")[0]

    scores = (x @ m.router.weight.T).softmax(-1)
    best = scores.topk(2, dim=-1).indices
    y = alone(m.shared, x)
    for e, memory in enumerate(m.memories):
        at = (best == e).any(-1).nonzero().flatten()
        if len(at):
            share = scores[at, e] / scores[at[:, None], best[at]].sum(-1)
            y = y.index_add(0, at, share[:, None] * alone(memory, x[at]))
    return y


def slstm(m, x):
    """2405.04517, equations 8 to 14; as in the authors' code, i and f see the convolution, z and o do not."""
    c = n = h = torch.zeros(2, 4, dtype=x.dtype)
    outs = []
    for t in range(len(x)):
        u = F.silu(sum(m.conv.weight[:, j] * x[t - j] for j in range(4) if t >= j))
        gates = (m.gates.weight @ u).view(2, 2, 4), (m.values.weight @ x[t]).view(2, 2, 4)
        recurrent = torch.einsum("hk,hkj->hj", h, m.R).view(2, 4, 4)
        i, f, z, o = (torch.cat(gates, 1) + recurrent + m.bias).unbind(1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outs.append(F.layer_norm(h, (4,), eps=1e-6).flatten() * m.norm.weight)
    return torch.stack(outs) @ m.out.weight.T


LAYERS = {
    "lightning": (lightning, 2),
    "mingru": (mingru, None),
    "minlstm": (minlstm, None),
    "gateloop": (gateloop, None),
    "lightnet": (lightnet, 2),
    "mamba": (mamba, None),
    "mamba3": (mamba3, 2),
    "rwkv6": (rwkv6, 2),
    "gated_deltanet2": (gated_deltanet2, 2),
    "gated_deltaproduct": (gated_deltaproduct, 2),
    "rwkv7": (rwkv7, 2),
    "titans": (titans, 2),
    "mom": (mom, 2),
    "slstm": (slstm, 2),
}


def build(name, dim=DIM, **options):
    heads = LAYERS[name][1]
    given = {} if heads is None else {"heads": heads}
    if name in ("lightning", "rwkv6"):
        given["depth"] = DEPTH
    return initialise(MIXERS[name](dim=dim, **(given | options)), 0)


def shaken(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_paper_written_token_by_token(name):
    layer, paper = shaken(build(name).double()), LAYERS[name][0]
    x = torch.randn(1, sum(DOCUMENTS), DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = layer(x, Whole.of(POSITIONS), slot="s")[0]
    want = torch.cat([paper(layer, document) for document in x[0].split(DOCUMENTS)])
    assert (got - want).norm() <= 1e-11 * want.norm(), ((got - want).norm() / want.norm()).item()


def test_a_gate_that_erases_in_the_place_of_the_other_is_caught(monkeypatch):
    honest = delta_gates.step

    def swapped(xs, *given, **sizes):
        *qkvg, b, w = xs
        return honest((*qkvg, w, b), *given, **sizes)

    monkeypatch.setattr(delta_gates, "step", swapped)
    with pytest.raises(AssertionError):
        test_a_layer_is_its_paper_written_token_by_token("gated_deltanet2")


@pytest.mark.parametrize("lost", ["the half that comes late", "the rotation", "the start of a document"])
def test_a_part_of_the_trapezoidal_rule_that_is_lost_is_caught(monkeypatch, lost):
    file = sys.modules["models.mixers.mamba3"]
    name, instead = {
        "the half that comes late": ("previous", lambda x, seq, *, slot: 0 * x),
        "the rotation": ("_turn", lambda x, rotor: x),
        "the start of a document": ("previous", lambda x, *_, slot: torch.cat((0 * x[:, :1], x[:, :-1]), 1)),
    }[lost]
    monkeypatch.setattr(file, name, instead)
    with pytest.raises(AssertionError):
        test_a_layer_is_its_paper_written_token_by_token("mamba3")


def test_lightning_forgets_by_head_and_layer_at_either_papers_rates():
    """MiniMax's last layer keeps all but 1e-5 of a slope; TransNormerLLM's heads are even steps."""
    like = torch.zeros(1, 0, 16, 1)
    last = build("lightning", 16, heads=16, depth=Depth(7, 8)).log_decays(like)
    torch.testing.assert_close(last[-1].item(), -(2**-8) * (1e-5 + 1e-5 / 7), rtol=1e-3, atol=0)
    steps = build("lightning", 16, heads=16, rates="transnormer", depth=Depth(2, 8)).log_decays(like)
    torch.testing.assert_close(steps, -torch.arange(16) * 0.5 * 0.75)


def test_gates_that_are_both_closed_share_out_one():
    """The quotient of minLSTM's sigmoids is 0 / 0 at -200."""
    layer = build("minlstm")
    with torch.no_grad():
        layer.f.weight.fill_(-25.0)
        layer.i.weight.fill_(-25.0)
        out = layer(torch.ones(1, 3, DIM), Whole.of(torch.arange(3)[None]), slot="s")
        want = candidate(layer.h.weight.sum(1)) @ layer.out.weight.T
    torch.testing.assert_close(out[0], torch.stack([want / 2, want * 3 / 4, want * 7 / 8]))


def test_gateloop_starts_with_slow_decays_and_small_angles():
    layer = build("gateloop", 256)
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    size = layer.alpha_bias.sigmoid()
    assert size.min() > 0.899 and size.max() < 0.991
    angles = layer.beta(x)
    assert 0.05 < angles.std() < 0.2 and angles.abs().max() < math.pi / 2


def test_rwkv6_starts_with_the_authors_decays_and_adds_nothing():
    """-6 + 5·(n / (D - 1))^0.7: from 0.9975 a token to 0.69, in the first layer."""
    layer = build("rwkv6", 64, depth=Depth(0, 12))
    kept = torch.exp(-torch.exp(layer.decay))
    torch.testing.assert_close(kept[[0, -1]], torch.tensor([math.exp(-math.exp(-6)), math.exp(-math.exp(-1))]))
    assert (kept[1:] < kept[:-1]).all()
    assert layer.mixes["k"][0] == 1 and layer.mixes["r"][16] == 1 - 0.25**0.5
    assert not layer(torch.randn(1, 5, 64), Whole.of(torch.arange(5)[None]), slot="s").any()
    assert build("rwkv6", 16, depth=Depth(0, 1)).bonus.isfinite().all()


def test_values_of_the_first_layer_of_rwkv7_reach_the_others():
    """Three layers: the first has no share to mix by, the others mix with the first one's values, not each other's."""
    layers = [shaken(build("rwkv7", depth=Depth(i, 3)).double()) for i in range(3)]
    assert [layer.share is None for layer in layers] == [True, False, False]
    x = torch.randn(1, 19, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seq, first = Whole.of(torch.arange(19)[None]), None
    for layer in layers:
        out, handed = layer.handing(x, seq, first, slot="s")
        assert (handed is None) == (first is not None)
        first = handed if first is None else first
        want = rwkv7(layer, x[0], first[0])
        assert (out[0] - want).norm() <= 1e-11 * want.norm()


def test_a_model_hands_the_first_layers_values_on():
    """Among layers of another kind; a token's values in the first such layer move the last one's output at once."""
    blocks = {
        n: partial(Block, mixer=partial(MIXERS[n], heads=2), ffn=partial(SwiGLU, hidden=8)) for n in ("gla", "rwkv7")
    }
    pattern = ["gla", "rwkv7", "gla", "rwkv7"]
    model = shaken(initialise(LM(vocabulary=8, dim=DIM, layers=4, pattern=pattern, blocks=blocks), 0))
    seen = []
    for layer in model.layers.values():
        if layer.hands:
            honest = layer.mixer.handing

            def spy(x, seq, first, honest=honest, **rest):
                out = honest(x, seq, first, **rest)
                seen.append((first, out[1]))
                return out

            layer.mixer.handing = spy
    model(torch.arange(5)[None] % 8, Whole.of(torch.arange(5)[None]))
    (none, own), (given, on) = seen
    assert none is None and own is not None and given is own and on is None


def test_rwkv7_starts_as_the_authors_do():
    """w0 = -6 + 6·(n / (D - 1))^(1 + (l / (L - 1))^0.3) + ½ + 2.5·zigzag; and its ranks at a width of 2048."""
    layer = build("rwkv7", 128, heads=2, depth=Depth(0, 12))
    n = torch.arange(128)
    z = ((n % 64) - 31.5) / 31.5
    torch.testing.assert_close(layer.decay.bias, -6 + 6 * (n / 127) ** 1.0 + 0.5 + 2.5 * z * z.abs())
    torch.testing.assert_close(layer.rate.bias, -0.19 + 0.3 * z * z.abs() + 0.4 * (n / 127 - 0.5))
    with torch.device("meta"):
        large = MIXERS["rwkv7"](dim=2048, heads=32, depth=Depth(1, 2))
    ranks = [low.into.weight.shape[0] for low in (large.decay, large.rate, large.share, large.gate)]
    assert ranks == [128, 128, 64, 224]


def channel_mix(m, x):
    """RWKV-6's feed-forward, and RWKV-7's where there is no gate: the authors' code, token by token."""
    past, outs = torch.zeros_like(x[0]), []
    for x_t in x:
        delta, past = past - x_t, x_t
        y = m.value.weight @ F.relu(m.key.weight @ (x_t + delta * m.mix)) ** 2
        outs.append(y if m.gate is None else y * (m.gate.weight @ (x_t + delta * m.gate_mix)).sigmoid())
    return torch.stack(outs)


@pytest.mark.parametrize("receptance", [False, True])
@pytest.mark.parametrize("tile", [None, 7])
def test_channel_mix_sees_the_token_before_of_its_document(receptance, tile):
    """Over a packing, over spans in time, and a tile at a time."""
    ffn = shaken(initialise(ChannelMix(dim=DIM, hidden=12, receptance=receptance, depth=DEPTH), 0).double())
    ffn.tile = tile
    x = torch.randn(1, sum(DOCUMENTS), DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = torch.cat([channel_mix(ffn, document) for document in x[0].split(DOCUMENTS)])
    got, _ = ffn(x, Whole.of(POSITIONS))
    assert (got[0] - want).norm() <= 1e-12 * want.norm()
    memory, parts = Memory(), []
    for span, where in zip(x.split([5, 1, 30, 34], 1), POSITIONS.split([5, 1, 30, 34], 1), strict=True):
        parts.append(ffn(span, Whole.of(where, memory=memory))[0])
        memory.advance()
    assert (torch.cat(parts, 1)[0] - want).norm() <= 1e-12 * want.norm()


def test_layers_of_channel_mix_do_not_read_each_others_tokens():
    """Two layers in spans: each remembers the last token of its own input."""
    block = partial(Block, mixer=partial(MIXERS["linear"], heads=2), ffn=partial(ChannelMix, hidden=12))
    model = LM(vocabulary=8, dim=DIM, layers=2, pattern=["a"], blocks={"a": block})
    model = shaken(initialise(model, 0)).double()
    model.compute = torch.float64
    tokens = torch.randint(0, 8, (1, 12), generator=torch.Generator().manual_seed(0))
    whole = model(tokens, Whole.of(torch.arange(12)[None])).logits
    memory, parts = Memory(), []
    for begin, end in ((0, 5), (5, 12)):
        parts.append(model(tokens[:, begin:end], Whole.of(torch.arange(begin, end)[None], memory=memory)).logits)
        memory.advance()
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert model.layers["1"].ffn.slot == "layers.1/ffn"


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
def test_a_shift_across_document_starts_is_caught(name, monkeypatch):
    def blind(x, seq, *, slot):
        return torch.cat((seq.before(x, 1, slot=slot), x[:, :-1]), 1)

    monkeypatch.setattr(f"models.mixers.{name}.previous", blind)
    with pytest.raises(AssertionError):
        test_a_layer_is_its_paper_written_token_by_token(name)


def test_sums_of_states_in_different_units_are_caught(monkeypatch):
    monkeypatch.setattr("models.kernels.lightnet.add", torch.add)
    with pytest.raises(AssertionError):
        test_recurrence.test_effects_of_three_spans_compose_to_the_effect_of_the_whole("lightnet")
