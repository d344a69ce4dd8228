"""The product between the two matrices of a SwiGLU, in tiles."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from models.kernels import swiglu


def plain(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 0, 8), (2, 37, 24), (5, 200)])
def test_outputs_and_gradients_are_those_of_plain_operators_to_the_bit(monkeypatch, shape, dtype):
    monkeypatch.setattr(swiglu, "TILE", 240)  # rows of 24 in tiles of 10, rows of 200 one by one
    torch.manual_seed(0)
    inner = torch.randn(shape, dtype=dtype)
    wide = torch.randn(*shape[:-1], shape[-1], dtype=dtype)
    for grad in (wide[..., ::2], wide[..., : shape[-1] // 2]):  # neither is contiguous
        found = []
        for product in (swiglu.swiglu, plain):
            x = inner.clone().requires_grad_()
            y = product(x)
            y.backward(grad)
            found.append((y.detach(), x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(swiglu.swiglu(inner), plain(inner))


def test_the_inner_rows_alone_are_kept():
    inner, kept = torch.randn(3, 8, requires_grad=True), []
    with saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda _: inner):
        swiglu.swiglu(inner)
    assert kept == [inner.data_ptr()]
