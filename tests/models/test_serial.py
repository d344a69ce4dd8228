"""Recurrences that are run, since their steps are no affine maps: against their papers, in pieces, and far from 1."""

import pytest
import torch

from models.axes import initialise
from models.kernels import lact, slstm
from models.kernels.newton_schulz import FIVE, newton_schulz
from models.mixers import MIXERS
from models.sequence import Whole
from tests.models.rules import slstm_loop

B, H, K = 2, 2, 3


def gates(T, size=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(B, T, H, 4 * K, generator=generator, dtype=torch.float64)
    R = 0.5 * torch.randn(H, K, 4 * K, generator=generator, dtype=torch.float64)
    return x.to(dtype), R.to(dtype)


def positions(T):
    rows = [torch.cat([torch.arange(n) for n in (a, T - a)]) for a in (T // 3, 2 * T // 3)]
    return torch.stack(rows)


def nothing(x):
    return x.new_zeros(B, H, 4, K)


@pytest.mark.parametrize("T", [1, 40])
def test_slstm_equals_the_papers_loop_without_a_stabiliser(T):
    xs = [x.requires_grad_() for x in gates(T, 2.0)]
    got, want = slstm.run(*xs, positions(T), nothing(xs[0]))[0], slstm_loop(*xs, positions=positions(T))
    weights = torch.randn_like(want)
    pairs = [(got, want), *zip(*(torch.autograd.grad((y * weights).sum(), xs) for y in (got, want)), strict=True)]
    for a, b in pairs:
        assert (a - b).norm() <= 1e-11 * b.norm().clamp_min(1e-3)


def test_slstm_carries_its_state_and_the_states_gradient():
    (x, R), where = gates(40), positions(40)
    x.requires_grad_()
    whole, last = slstm.run(x, R, where, nothing(x))
    state, parts = nothing(x), []
    for a, b in ((0, 1), (1, 14), (14, 40)):
        out, state = slstm.run(x[:, a:b], R, where[:, a:b], state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=1e-13, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (torch.cat(parts, 1), whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [1e-3, 60.0])
def test_gates_of_any_size_stay_finite_in_fp32(size):
    x, R = (y.requires_grad_() for y in gates(500, size, torch.float32))
    out, state = slstm.run(x, R, positions(500), nothing(x))
    found = [out, state, *torch.autograd.grad(out.sum(), (x, R))]
    assert all(y.isfinite().all() for y in found) and out.abs().max() <= 1 + 1e-5


def test_fast_weights_learn_on_the_grid_of_their_document():
    """Two chunks of 8 and a rest: only what a chunk before it held may move a token's output."""
    layer = initialise(MIXERS["lact"](dim=8, heads=2, chunk=8), 0).double()
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seq = Whole.of(torch.arange(20)[None])
    before = layer(x, seq, slot="s")[0]
    for t, moved in ((3, [3, *range(8, 20)]), (13, [13, 16, 17, 18, 19]), (18, [18])):
        changed = x.clone()
        changed[0, t] += 1
        differs = (layer(changed, seq, slot="s")[0] - before).abs().amax(-1) > 1e-12
        assert differs.nonzero().flatten().tolist() == moved


def test_rows_of_fast_weights_keep_their_norms_and_a_step_is_orthogonal():
    generator = torch.Generator().manual_seed(0)
    first = tuple(torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    sums = tuple(torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    nothing, mu = tuple(torch.zeros_like(w) for w in first), torch.ones(2, dtype=torch.float64)
    after = lact.step(lact.Learning(first, nothing, sums, mu), first, 8)
    for w, f in zip(after.weights, first, strict=True):
        torch.testing.assert_close(w.norm(dim=-1), f.norm(dim=-1), rtol=1e-4, atol=0)
    assert all(torch.equal(m, s) for m, s in zip(after.momenta, sums, strict=True)) and not any(
        map(torch.any, after.sums)
    )
    values = torch.linalg.svdvals(newton_schulz(sums[0], each=FIVE))
    assert values.min() > 0.85 and values.max() < 1.15
