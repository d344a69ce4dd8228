"""Layers whose parts are others than a mixer and then a feed-forward: against formulas, and what they refuse."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.axes import initialise
from models.block import Block
from models.ffn import MLP, clamped_swiglu
from models.kernels.cross_entropy import cross_entropy, score
from models.mixers import MIXERS
from models.moe import MoE
from models.positions import RoPE
from models.sequence import Whole
from train.rope_base import rebase

D, POSITIONS = 16, torch.cat([torch.arange(5), torch.arange(7)])[None]
HEADS = partial(MIXERS["attention"], heads=2)
FFN = partial(MLP, hidden=24)


def built(**options):
    block = initialise(Block(dim=D, slot="0", **options), 0).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return block


def inputs():
    return torch.randn(1, 12, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def test_a_stream_of_what_was_normed_is_minimaxs_formula():
    """2501.08313, as its published code has it: x <- α norm(x) + part(norm(x))."""
    block = built(mixer=HEADS, ffn=FFN, residual="normed", mixer_residual_scale=3.5, ffn_residual_scale=0.5)
    x, seq = inputs(), Whole.of(POSITIONS)
    normed = rms(x, block.mixer_norm.weight)
    want = 3.5 * normed + block.mixer(normed, seq, slot="x")
    normed = rms(want, block.ffn_norm.weight)
    want = 0.5 * normed + block.ffn(normed, seq)[0]
    torch.testing.assert_close(block(x, seq)[0], want, rtol=1e-12, atol=1e-12)


def test_a_mixer_beside_another_reads_the_same_and_adds_to_it():
    block = built(mixer=partial(MIXERS["mamba2"], heads=2), beside=HEADS, ffn=None, norm="layer")
    x, seq = inputs(), Whole.of(POSITIONS)
    normed = F.layer_norm(x, (D,), block.mixer_norm.weight, block.mixer_norm.bias, 1e-5)
    want = x + block.mixer(normed, seq, slot="x") + block.beside(normed, seq, slot="y")
    torch.testing.assert_close(block(x, seq)[0], want, rtol=1e-12, atol=1e-12)


def test_a_layer_may_be_its_feed_forward_alone():
    block = built(mixer=None, ffn=FFN)
    x, seq = inputs(), Whole.of(POSITIONS)
    assert not any(name.startswith("mixer") for name, _ in block.named_parameters())
    torch.testing.assert_close(block(x, seq)[0], x + block.ffn(rms(x, block.ffn_norm.weight), seq)[0])


@pytest.mark.parametrize("expert", ["relu2", "clamped"])
def test_experts_of_another_form_are_a_loop_over_tokens(expert):
    moe = initialise(MoE(dim=D, num_experts=3, top_k=2, hidden=6, expert=expert, bias=expert == "clamped"), 0).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)), dtype=p.dtype))
    x = 3 * inputs()
    got, want, each = moe(x, Whole.of(POSITIONS))[0], torch.zeros_like(x), moe.experts
    logits = F.linear(x, moe.router.weight, moe.router.bias)
    for t in range(12):
        values, chosen = logits[0, t].topk(2)
        for weight, e in zip(values.softmax(0), chosen.tolist(), strict=True):
            inner = x[0, t] @ each.gate_up[e]
            if expert == "relu2":
                want[0, t] += weight * (inner.relu() ** 2 @ each.down[e])
                continue
            gate, up = (inner + each.gate_up_bias[e]).split(6)
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            hidden = (up + 1) * gate / (1 + (-1.702 * gate).exp())
            want[0, t] += weight * (hidden @ each.down[e] + each.down_bias[e])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gpt_oss_clamps_both_halves():
    gate, up = torch.tensor([9.0, -9.0]), torch.tensor([-9.0, 9.0])
    want = torch.tensor([-6.0 * 7 / (1 + torch.e ** (-1.702 * 7)), 8.0 * -9 / (1 + torch.e ** (1.702 * 9))])
    torch.testing.assert_close(clamped_swiglu(gate, up), want)


def test_capped_logits_have_the_loss_and_gradients_of_the_plain_way():
    generator = torch.Generator().manual_seed(4)
    x, w = (torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (11, 13))
    targets = torch.randint(0, 13, (11,), generator=generator).index_fill(0, torch.tensor([2, 5]), -100)
    cross_entropy(x, w, targets, chunk=4, softcap=1.5).backward()
    got = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    z = 1.5 * torch.tanh(x @ w.T / 1.5)
    loss = F.cross_entropy(z, targets, reduction="sum")
    loss.backward()
    torch.testing.assert_close(got, (x.grad, w.grad), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score(x, w, targets, chunk=4, softcap=1.5).total, loss.detach())


def test_a_new_base_is_not_for_windows_that_have_their_own():
    """As Gemma 3's: what a window shows does not grow with the sequence. A window of the same base goes along."""
    far, near, own = (MIXERS["attention"](dim=D, heads=2, window=w, positions=rule(b)) for w, b in BASES)
    for base in (5e6, 1e4, 7e6):  # of which the second is the window's own
        rebase(torch.nn.ModuleList([far, near, own]), base)
        assert [each.positions.base for each in (far, near, own)] == [base, base, 1e4]
    alone = MIXERS["attention"](dim=D, heads=2, window=4)
    rebase(alone, 3e4)
    assert alone.positions.base == 3e4


BASES = ((None, 1e6), (4, 1e6), (4, 1e4))


def rule(base):
    return RoPE(base=base)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mixer": None, "ffn": None}, "mixer=null: must be a mixer where ffn is null"),
        ({"mixer": None, "beside": HEADS}, "mixer=null: must be a mixer where beside is one"),
        ({"norm": "x"}, "norm=x: must be one of rms, layer"),
        ({"residual": "x"}, "residual=x: must be one of input, normed"),
        ({"residual": "normed", "norms": "post"}, "residual=normed: must be input with norms=post"),
        ({"ffn_residual_scale": 0}, "ffn_residual_scale=0: must be above 0"),
        ({"beside": partial(MIXERS["hgrn2"], heads=2)}, "beside=HGRN2: must be a mixer that shares nothing"),
        (
            {"ffn": partial(MoE, num_experts=2, top_k=1, hidden=4, expert="x", renormalise=False)},
            "expert=x: must be one",
        ),
    ],
)
def test_layers_that_are_none_are_refused(options, line):
    with pytest.raises(ValueError) as refused:
        Block(**({"dim": D, "slot": "0", "mixer": HEADS, "ffn": FFN} | options))
    assert str(refused.value).startswith(line)
