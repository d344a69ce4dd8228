"""Further mixers as whole layers, each against its paper written token by token: what a test of the rule alone, in
`test_recurrence.py`, and of the mixer over the rule, in `test_mixers.py`, take on trust."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.axes import initialise
from models.depth import Depth
from models.mixers import MIXERS
from models.sequence import Whole

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


LAYERS = {
    "lightning": (lightning, 2),
    "mingru": (mingru, None),
    "minlstm": (minlstm, None),
    "gateloop": (gateloop, None),
    "lightnet": (lightnet, 2),
    "rwkv6": (rwkv6, 2),
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
