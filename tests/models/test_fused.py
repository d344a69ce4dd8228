"""Norms, gates and rotary positions, each in one kernel of flash-linear-attention's, held to its signature and to fp64;
and casts of a layer's weights together. The stand-ins promise what fla-core 0.6 does: inputs, dtypes, outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import linear
from models.dispatch import Here
from models.kernels import fla, registry
from models.kernels.decay_gate import channel_decay, head_decay
from models.kernels.norm import l2_norm
from models.kernels.swiglu import swiglu
from models.norm import GatedRMSNorm, RMSNorm
from models.positions import turn
from models.sequence import Whole
from tests.parity import Sample, small_model
from train.loss import sums

HALF = torch.bfloat16


def unit(x: Tensor, eps: float) -> Tensor:
    return x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    assert x.dtype == HALF and weight.shape == x.shape[-1:] and bias is residual is None
    return (unit(x, eps) * weight).to(x.dtype)


def rms_norm_gated(
    x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6
):
    assert x.dtype == g.dtype == HALF and x.shape == g.shape and weight.shape == x.shape[-1:] and bias is None
    gate = {"swish": F.silu, "sigmoid": torch.sigmoid}[activation]
    return (unit(x, eps) * weight * gate(g.float())).to(x.dtype)


def l2norm(x, eps=1e-6, output_dtype=None):
    y = x.float() * (x.float().square().sum(-1, keepdim=True) + eps).rsqrt()
    return y.to(output_dtype or x.dtype)


def fused_swiglu(x, y):
    assert x.shape == y.shape and x.dtype == y.dtype == HALF
    return (F.silu(x.float()) * y.float()).to(x.dtype)


def rotary_embedding(
    x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, chunk_indices=None
):
    half = cos.shape[-1]
    assert (
        x.dtype == cos.dtype == sin.dtype and x.dim() == 4 and len(cos) >= x.shape[1] and 2 * half <= x.shape[-1] <= 256
    )
    left, right, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    c, s = cos[: x.shape[1], None], sin[: x.shape[1], None]
    return torch.cat((left * c - right * s, left * s + right * c, rest), -1)


def fused_gdn_gate(g, A_log, dt_bias=None, output_dtype=torch.float32):
    assert A_log.shape == dt_bias.shape == g.shape[-1:]
    return (-A_log.float().exp() * F.softplus(g.float() + dt_bias.float())).to(output_dtype)


def fused_kda_gate(g, A_log=None, dt_bias=None, lower_bound=None, output_dtype=torch.float32):
    H, K = g.shape[-2:]
    assert A_log.shape == (H,) and dt_bias.shape == (H * K,) and lower_bound is None
    return (-A_log.float().exp()[:, None] * F.softplus(g.float() + dt_bias.float().view(H, K))).to(output_dtype)


STAND_INS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rms_norm_gated": rms_norm_gated,
    "l2_norm": l2norm,
    "swiglu": fused_swiglu,
    "rotary": rotary_embedding,
    "head_decay": fused_gdn_gate,
    "channel_decay": fused_kda_gate,
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has a CPU take the stand-ins for kernels; those that were called."""
    names: list[str] = []

    def function(name: str) -> Callable[..., Any]:
        names.append(name)
        return STAND_INS[name]

    monkeypatch.setattr(registry, "TRITON", ("cuda", "cpu"))
    monkeypatch.setattr(registry, "_missing", lambda name: None if name in fla.FUSED else "not here")
    monkeypatch.setattr(fla, "function", function)
    return names


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def of_norm(norm: Callable[..., Any]) -> Callable[..., Tensor]:
    """A norm's output, as a function of its inputs and its weight."""

    def run(*xs: Tensor) -> Tensor:
        module = norm(xs[0].shape[-1])
        return torch.func.functional_call(module, {"weight": xs[-1]}, xs[:-1])  # type: ignore[no-any-return]

    return run


ANGLES = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def turned(x: Tensor) -> Tensor:
    c, s = ANGLES.cos()[:, :, None], ANGLES.sin()[:, :, None]
    left, right, rest = x.split((6, 6, 4), -1)
    return torch.cat((left * c - right * s, left * s + right * c, rest), -1)


# What is called, the same written with operators in fp64, and shapes of its inputs; those in fp32 are marked.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]], int]] = {
    "rms_norm": (of_norm(RMSNorm), rms, [(2, 9, 32), (32,)], 1),
    "rms_norm_gated": (
        of_norm(GatedRMSNorm),
        lambda x, g, w: rms(x, w) * F.silu(g),
        [(2, 9, 3, 16), (2, 9, 3, 16), (16,)],
        2,
    ),
    "rms_norm_gated by a sigmoid": (
        of_norm(lambda dim: GatedRMSNorm(dim, activation=torch.sigmoid)),
        lambda x, g, w: rms(x, w) * g.sigmoid(),
        [(2, 9, 3, 16), (2, 9, 3, 16), (16,)],
        2,
    ),
    "l2_norm": (
        lambda x: l2_norm(x, 1e-6),
        lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt(),
        [(2, 9, 3, 16)],
        1,
    ),
    "swiglu": (swiglu, lambda x: F.silu(x[..., :16]) * x[..., 16:], [(2, 9, 32)], 1),
    "rotary": (lambda x: turn(x, ANGLES.cos(), ANGLES.sin()), turned, [(2, 9, 3, 16)], 1),
    "head_decay": (head_decay, lambda x, a, b: -a.exp() * F.softplus(x + b), [(2, 9, 4), (4,), (4,)], 1),
    "channel_decay": (
        channel_decay,
        lambda x, a, b: -a.exp()[:, None] * F.softplus(x + b.view(4, 8)),
        [(2, 9, 4, 8), (4,), (32,)],
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_operators_in_fp64(called, case):
    run, formula, shapes, halves = CASES[case]
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) for shape in shapes]
    xs = [x.to(HALF if i < halves else torch.float32).requires_grad_() for i, x in enumerate(xs)]
    wide = [x.detach().double().requires_grad_() for x in xs]
    y, want = run(*xs), formula(*wide)
    assert called == [case.partition(" ")[0]]
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    found = [y, *torch.autograd.grad(y, xs, grad.to(y.dtype))]
    for a, b in zip(found, [want, *torch.autograd.grad(want, wide, grad)], strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_nothing_wider_than_16_bits_goes_there(called):
    x = torch.randn(2, 9, 3, 16)
    RMSNorm(16)(x), GatedRMSNorm(16)(x, x), l2_norm(x, 1e-6), swiglu(x), turn(x, ANGLES.cos(), ANGLES.sin())
    head_decay(x[..., 0], x[0, 0, :, 0], x[0, 0, :, 0])
    assert not called


def test_the_kernels_have_the_signatures_of_the_stand_ins():
    pytest.importorskip("fla")
    import inspect

    for name, stand_in in STAND_INS.items():
        real = fla.function(name)
        if name != "swiglu":  # an autograd function's `apply`
            assert list(inspect.signature(stand_in).parameters) == list(inspect.signature(real).parameters), name


def loss_and_gradients(together: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor | None]]:
    monkeypatch.setattr(linear, "TOGETHER", ("cpu",) if together else ())
    torch.manual_seed(0)
    model = small_model()
    model.compute = HALF
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    sample = Sample((5, 1, 14))
    tokens, targets, positions = (torch.from_numpy(x)[None] for x in (sample.tokens, sample.targets, sample.positions))
    documents = (positions == 0).cumsum(1) - 1
    seq = Whole(
        positions=positions, documents=documents, num_documents=3, counted=torch.ones_like(positions, dtype=bool)
    )
    loss = sums(model(tokens, seq, targets)).cross_entropy
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_weights_cast_together_are_those_cast_one_by_one(monkeypatch):
    casts = []
    real = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (casts.append(len(to)), real(to, of))[1])
    apart, gradients = loss_and_gradients(False, monkeypatch)
    assert not casts
    loss, found = loss_and_gradients(True, monkeypatch)
    assert len(casts) == 2 * (4 + 2) and min(casts) == 2 and max(casts) > 4  # of each layer and of its experts
    assert torch.equal(loss, apart)
    for name, gradient in gradients.items():
        assert (found[name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(found[name], gradient), name


def test_rows_lie_where_counting_puts_them():
    experts = torch.tensor([[0, 3], [3, 1], [4, 3]])  # 4: of none
    sent = Here(dropping=True).send(torch.arange(3.0)[:, None], experts, 4, None)
    assert sent.offsets.dtype == torch.int32 and sent.offsets.tolist() == [1, 2, 2, 5]
    assert sent.rows.flatten().tolist() == [0, 1, 0, 1, 2] and sent.order.tolist() == [0, 3, 1, 2, 5]
