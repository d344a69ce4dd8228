"""Whole mixers against the layers of `transformers` with the same weights, in fp32, and against papers' equations."""

import importlib

import pytest
import torch
import torch.nn.functional as F
import transformers

from models.axes import initialise
from models.mixers import MIXERS
from models.sequence import Whole

B, T, DIM = 2, 71, 32
SEQ = Whole.of(torch.arange(T).expand(B, T))


def published(kind, config, layer, **options):
    """One layer, its weights drawn so that every part of it is seen: large enough to matter, small enough to forget."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    made = getattr(module, layer)(getattr(transformers, config)(hidden_size=DIM, **options), layer_idx=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            p.copy_(mean + 0.3 * torch.randn(p.shape, generator=generator))
    return made


def taps(conv1d):
    """[D, W] with the present token's first, as `models.conv` has them."""
    return conv1d.weight.squeeze(1).flip(-1)


def equal(mixer, weights, theirs):
    """Outputs and the gradient of the input, fp32, 1e-5 of the norm; `weights` must name every parameter."""
    assert weights.keys() == dict(mixer.named_parameters()).keys()
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(weights[name].reshape(p.shape))
    x = torch.randn(B, T, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    pull = torch.randn(B, T, DIM, generator=torch.Generator().manual_seed(2))
    for got, want in zip(
        *((y, torch.autograd.grad((y * pull).sum(), x)[0]) for y in (mixer(x, SEQ, slot="s"), theirs(x))), strict=True
    ):
        assert (got - want).norm() <= 1e-5 * want.norm(), ((got - want).norm() / want.norm()).item()


def test_gated_deltanet_is_qwen3_nexts():
    """Two value heads to a key head; their projections are in the order of key heads: q, k, 2 v, 2 z and 2 b, 2 a."""
    layer = published(
        *("qwen3_next", "Qwen3NextConfig", "Qwen3NextGatedDeltaNet"),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
    )
    q, k, v, z = (w.flatten(0, 1) for w in layer.in_proj_qkvz.weight.unflatten(0, (2, -1)).split((8, 8, 24, 24), dim=1))
    b, a = (w.flatten(0, 1) for w in layer.in_proj_ba.weight.unflatten(0, (2, 4)).split((2, 2), dim=1))
    weights = {
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "qkv.weight": torch.cat((q, k, v)),
        "conv.weight": taps(layer.conv1d),
        "rates.weight": torch.stack((a, b), 1),
        "gate.weight": z,
        "norm.weight": layer.norm.weight,
        "out.weight": layer.out_proj.weight,
    }
    equal(
        MIXERS["gated_deltanet"](dim=DIM, heads=2, value_heads=4, expand_k=0.5, expand_v=1.5, norm_eps=1e-6),
        weights,
        layer,
    )


def test_kda_is_kimi_linears():
    """Theirs has no bias on the output's gate."""
    layer = published(
        *("kimi_linear", "KimiLinearConfig", "KimiLinearDeltaAttention"),
        linear_num_heads=2,
        linear_head_dim=16,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    forget = layer.forget_gate
    weights = {
        "A_log": forget.A_log,
        "dt_bias": forget.dt_bias,
        "qkv.weight": torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]),
        "conv.weight": taps(layer.conv1d),
        "decay_in.weight": forget.f_a_proj.weight,
        "decay_out.weight": forget.f_b_proj.weight,
        "beta.weight": layer.b_proj.weight,
        "gate_in.weight": layer.g_a_proj.weight,
        "gate_out.weight": layer.g_b_proj.weight,
        "gate_out.bias": torch.zeros(DIM),
        "norm.weight": layer.o_norm.weight,
        "out.weight": layer.o_proj.weight,
    }
    equal(MIXERS["kda"](dim=DIM, heads=2), weights, layer)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_the_published_layer(groups):
    layer = published(
        *("mamba2", "Mamba2Config", "Mamba2Mixer"),
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=groups,
        expand=2,
        chunk_size=32,
    )
    z, x, b, c, dt = layer.in_proj.weight.split((64, 64, 8 * groups, 8 * groups, 4))

    def by_group(b, c):  # ours has a group's B and C side by side
        return torch.stack([w.unflatten(0, (groups, 8)) for w in (b, c)], 1).flatten(0, 2)

    def parts(w):
        x, b, c = w.split((64, 8 * groups, 8 * groups))
        return x, by_group(b, c)

    (tap, bc_tap), (bias, bc_bias) = parts(taps(layer.conv1d)), parts(layer.conv1d.bias)
    weights = {
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "D": layer.D,
        "x.weight": x,
        "z.weight": z,
        "bc.weight": by_group(b, c),
        "dt.weight": dt,
        "conv.weight": tap,
        "conv.bias": bias,
        "bc_conv.weight": bc_tap,
        "bc_conv.bias": bc_bias,
        "norm.weight": layer.norm.weight,
        "out.weight": layer.out_proj.weight,
    }
    equal(MIXERS["mamba2"](dim=DIM, heads=4, state=8, groups=groups), weights, layer)


def drawn(name, **options):
    """A mixer in fp64 with its initial weights, its x, and the parts of its first projection by head, [B, T, H, ·]."""
    mixer = initialise(MIXERS[name](dim=DIM, heads=2, **options), 0).double()
    x = torch.randn(B, T, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = mixer.qfv if name == "hgrn2" else mixer.qkv
    return mixer, x, [p.unflatten(-1, (2, -1)) for p in (x @ first.weight.T).split(mixer.widths, -1)]


def normed(o):
    return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5)


def same(mixer, x, out):
    torch.testing.assert_close(mixer(x, SEQ, slot="s"), out.flatten(2) @ mixer.out.weight.T, rtol=1e-10, atol=1e-12)


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()


@pytest.mark.parametrize("normalise", [False, True])
def test_linear_attention_is_the_papers_as_one_matrix(normalise):
    """2006.16236: φ(q)·φ(k), φ = elu + 1, for softmax's e^{q·k}; without the denominator, K^-½ takes its place."""
    mixer, x, (q, k, v) = drawn("linear", normalise=normalise)
    phi = [torch.where(u > 0, u + 1, u.exp()) for u in (q, k)]
    scores = torch.einsum("bthk,bshk->bhts", *phi) * CAUSAL
    scores = scores / scores.sum(-1, keepdim=True) if normalise else scores / 16**0.5
    same(mixer, x, normed(torch.einsum("bhts,bshv->bthv", scores, v)))


def test_retention_is_the_papers_parallel_form():
    """2307.08621: (Q Kᵀ ⊙ D) V, D_ts = γ^(t-s), Q and K turned by position; then norm and silu gate."""
    mixer, x, (q, k, v) = drawn("retnet")
    t = torch.arange(T, dtype=torch.float64)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), t[:, None] * 1e4 ** (-torch.arange(8) / 8.0).double())
    q, k = (torch.complex(*u.chunk(2, -1)) * turn[:, None] for u in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(2, dtype=torch.float64))
    decay = torch.where(CAUSAL, gamma[:, None, None] ** (t[:, None] - t).clamp_min(0), 0.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k.conj()).real * decay / 16**0.5
    gate = (x @ mixer.gate.weight.T).unflatten(-1, (2, -1))
    same(mixer, x, normed(torch.einsum("bhts,bshv->bthv", scores, v)) * F.silu(gate))


def test_hgrn2_is_the_papers_recurrence():
    """2404.07904: h_t = diag(f_t) h_{t-1} + (1 - f_t) ⊗ i_t, read by silu(q); a norm over all heads."""
    mixer, x, (q, f, i) = drawn("hgrn2")
    bound = torch.linspace(0.1, 0.9, DIM, dtype=torch.float64)
    f = bound.view(2, 16) + (1 - bound.view(2, 16)) * f.sigmoid()
    h, outs = x.new_zeros(B, 2, 16, 16), []
    for t in range(T):
        h = f[:, t, :, :, None] * h + (1 - f[:, t])[..., None] * i[:, t, :, None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", h, F.silu(q[:, t])) / 16**0.5)
    want = normed(torch.stack(outs, 1).flatten(2)) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x, SEQ, slot="s", lower_bound=bound), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_deltanet_writes_the_error_of_what_it_remembers(negative_eigenvalues):
    """2406.06484: S_t = S_{t-1} + β_t k_t ⊗ (v_t - S_{t-1}ᵀ k_t), keys and queries of norm 1."""
    mixer, x, _ = drawn("deltanet", negative_eigenvalues=negative_eigenvalues)
    u = F.pad(x @ mixer.qkv.weight.T, (0, 0, 3, 0)).transpose(1, 2)
    u = F.silu(F.conv1d(u, mixer.conv.weight.flip(-1)[:, None], groups=3 * DIM)).transpose(1, 2)
    q, k, v = (p.unflatten(-1, (2, -1)) for p in u.chunk(3, -1))
    q, k = (p * torch.rsqrt(p.square().sum(-1, keepdim=True) + 1e-6) for p in (q, k))
    beta = (x @ mixer.beta.weight.T).sigmoid() * (2 if negative_eigenvalues else 1)
    S, outs = x.new_zeros(B, 2, 16, 16), []
    for t in range(T):
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
        outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / 16**0.5)
    same(mixer, x, normed(torch.stack(outs, 1)))
