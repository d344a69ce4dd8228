"""Scores of pairs of tokens by both ways, against the sum over channels written out, and which way is taken."""

import pytest
import torch
from torch import Tensor

from models.kernels.decay_pairs import WEAK, Doubling, FromStart, Splitting, pairs_of


def written_out(r: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """[..., C, C], a number for each pair from its own exponent; zero above the diagonal."""
    total = g.cumsum(-2)
    between = (total.unsqueeze(-2) - total.unsqueeze(-3)).clamp(max=0)
    return (r.unsqueeze(-2) * k.unsqueeze(-3) * between.exp()).sum(-1).tril()


def whole(tokens: int) -> Tensor:
    """Every token sees all before it."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def drawn(tokens: int, forgotten: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, another reader, keys and log decays [3, 2, 2, C, 5]; the channel that forgets most keeps e^-forgotten."""
    generator = torch.Generator().manual_seed(tokens)
    q, a, k, g = torch.randn(4, 3, 2, 2, tokens, 5, generator=generator, dtype=torch.float64)
    g = -g.abs()
    return tuple(x.to(dtype) for x in (q, a, k, g * (forgotten / -g.sum(-2).amin())))


@pytest.mark.parametrize("way", [FromStart, Doubling])
@pytest.mark.parametrize("tokens", [1, 2, 4, 32])
def test_scores_and_gradients_of_both_ways_are_those_written_out(way: type[Splitting], tokens: int) -> None:
    q, a, k, g = drawn(tokens, WEAK, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, a, k)]
    expected = [written_out(r, leaves[2], g) for r in leaves[:2]]
    factors, since, after = way.factors(g, whole(tokens))
    for ours, right in zip(way.scores((q, a), k, factors), expected, strict=True):
        torch.testing.assert_close(ours.tril(), right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(since, g.cumsum(-2).exp(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, g.sum(-2, keepdim=True) - g.cumsum(-2), rtol=1e-12, atol=1e-12)

    upstream = [torch.randn_like(x).tril(-1) for x in expected]  # of pairs of two tokens
    right_gradients = torch.autograd.grad(expected, leaves, upstream)
    ours = [torch.zeros_like(x) for x in (q, a, k)]
    on_itself = [torch.eye(tokens, dtype=torch.float64)] * 2  # is no pair, and adds nothing
    way.backward((q, a), k, factors, [u + d for u, d in zip(upstream, on_itself, strict=True)], ours[:2], ours[2])
    for mine, right in zip(ours, right_gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


def test_a_document_is_rounded_as_if_it_stood_alone() -> None:
    q, _, k, g = drawn(32, WEAK, torch.float32)
    document = torch.arange(32) >= 11
    visible = (document[:, None] == document) & whole(32)
    factors, since, _ = FromStart.factors(g, visible)
    others = FromStart.factors(torch.cat([2 * g[..., :11, :], g[..., 11:, :]], -2), visible)
    one, other = (FromStart.scores((q,), k, f)[0][..., 11:, 11:].tril() for f in (factors, others[0]))
    assert torch.equal(one, other)
    assert torch.equal(since[..., :11, :], FromStart.factors(g, whole(32))[1][..., :11, :])


def test_in_fp32_the_start_is_as_near_as_blocks_are() -> None:
    inputs = drawn(32, WEAK, torch.float64)
    right = written_out(inputs[0], inputs[2], inputs[3])
    q, _, k, g = (x.float() for x in inputs)
    scale = written_out(q.abs().double(), k.abs().double(), g.double()).clamp(min=1e-30)
    errors = [
        ((way.scores((q,), k, way.factors(g, whole(32))[0])[0].tril() - right) / scale).abs().max()
        for way in (FromStart, Doubling)
    ]
    assert max(errors) < 2e-6


def test_only_weak_decays_on_a_processor_are_split_at_the_start() -> None:
    g = drawn(32, 0.99 * WEAK, torch.float32)[3]
    assert pairs_of(g) is FromStart
    assert pairs_of(g.to("meta")) is Doubling
    assert pairs_of(1.02 * g) is Doubling
    assert pairs_of(g[..., :0, :]) is Doubling
    for strange in (float("nan"), 0.1, -torch.inf):
        other = g.clone()
        other[0, 1, 1, 3, 2] = strange
        assert pairs_of(other) is Doubling


def test_strong_decays_would_overflow_at_the_start() -> None:
    q, _, k, g = drawn(32, 1000.0, torch.float32)
    assert not torch.stack(FromStart.scores((q,), k, FromStart.factors(g, whole(32))[0])).isfinite().all()
    assert torch.stack(pairs_of(g).scores((q,), k, pairs_of(g).factors(g, whole(32))[0])).isfinite().all()
