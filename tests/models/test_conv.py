"""The short convolution and the norms, tiled by hand, against the formulas that they are written from."""

import pytest
import torch
from torch import Tensor

from models.kernels import conv as kernel
from models.kernels import norm as norms

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def token_loop(x_BPD: Tensor, taps_WD: Tensor, bias_D: Tensor | None, positions_BT: Tensor, silu: bool) -> Tensor:
    """y_t = Σ_j taps_j x_{t-j} + b over the taps inside the document, token by token."""
    width, rows = len(taps_WD), []
    for b, positions in enumerate(positions_BT.tolist()):
        for t, position in enumerate(positions):
            taps = range(min(position, width - 1) + 1)
            y_D = sum((taps_WD[j] * x_BPD[b, width - 1 + t - j] for j in taps), torch.zeros_like(x_BPD[0, 0]))
            y_D = y_D if bias_D is None else y_D + bias_D
            rows.append(y_D * y_D.sigmoid() if silu else y_D)
    return torch.stack(rows).view(*positions_BT.shape, -1)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= TOLERANCE[b.dtype] * b.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("width", "bias", "silu"), [(4, False, True), (4, True, False), (2, True, True), (1, False, True)]
)
def test_tiles_are_the_token_loop_with_every_gradient(monkeypatch, dtype, width, bias, silu):
    monkeypatch.setattr(
        kernel, "TILE", 2 * 5 * 3
    )  # three tokens of two spans: some tiles start a document, some do not
    torch.manual_seed(width)
    positions_BT = torch.stack([torch.tensor([*range(13)]), torch.tensor([7, 8, 9, 0, 0, 1, 0, 1, 2, 3, 4, 5, 6])])
    leaves = [torch.randn(2, width - 1 + 13, 5), torch.randn(width, 5), *([torch.randn(5)] if bias else [])]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    arguments = [*leaves, None][:3]
    out = kernel.conv(*arguments, positions_BT, silu=silu)
    expected = token_loop(*arguments, positions_BT, silu)
    assert out.dtype == dtype and close(out, expected)
    weights = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad((out * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert close(got, wanted)


def test_not_even_infinity_crosses_the_start_of_a_document(monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 8)
    x_BPD = torch.ones(1, 3 + 8, 2)
    x_BPD[:, :7] = torch.nan
    x_BPD.requires_grad_()
    taps = torch.ones(4, 2)
    y_BTD = kernel.conv(x_BPD, taps, None, torch.tensor([[9, 10, 11, 12, 0, 1, 2, 3]]), silu=True)
    assert y_BTD[:, 4:].isfinite().all() and y_BTD[:, :4].isnan().all()
    (dx_BPD,) = torch.autograd.grad(y_BTD[:, 4:].sum(), x_BPD)
    assert dx_BPD[:, 7:].isfinite().all()


def test_bf16_is_summed_in_fp32():
    torch.manual_seed(0)
    x_BPD, taps_WD = torch.randn(1, 3 + 50, 4), torch.randn(4, 4)
    x_BPD, taps_WD = x_BPD.bfloat16(), taps_WD.bfloat16()
    y_BTD = kernel.conv(x_BPD, taps_WD, None, torch.arange(50)[None], silu=True)
    exact = token_loop(x_BPD.float(), taps_WD.float(), None, torch.arange(50)[None], True)
    assert y_BTD.dtype == torch.bfloat16 and torch.equal(y_BTD, exact.bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_norms_are_their_formulas_with_every_gradient(monkeypatch, dtype, weighted):
    monkeypatch.setattr(norms, "TILE", 7 * 4)  # four rows: the last tile is smaller
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 7, dtype=dtype)
    x[0, 0] *= 1e-4  # where eps matters
    x.requires_grad_()
    weight = torch.randn(7, dtype=dtype, requires_grad=True) if weighted else None
    leaves = [x] if weight is None else [x, weight]
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for got, wanted in (
        (norms.rms_norm(x, weight, 1e-5), rms if weight is None else rms * weight),
        (norms.l2_norm(x, 1e-6), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()),
    ):
        assert got.dtype == dtype and close(got, wanted)
        factors = torch.randn_like(got)
        theirs = torch.autograd.grad((wanted * factors).sum(), leaves, allow_unused=True)
        mine = torch.autograd.grad((got * factors).sum(), leaves, allow_unused=True)
        assert [g is None for g in mine] == [g is None for g in theirs]
        assert all(g is None or close(g, w) for g, w in zip(mine, theirs, strict=True))
    assert norms.rms_norm(x.detach().bfloat16(), weight, 1e-5).dtype == torch.float32
    assert norms.l2_norm(x[:0], 1e-6).shape == (0, 5, 3, 7)
