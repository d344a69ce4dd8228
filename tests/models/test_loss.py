"""The cross-entropy that never holds all logits: against log probabilities written out, in a model, on any chunk."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.kernels.cross_entropy import cross_entropy, score
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Whole
from train.loss import sums

N, D, V = 37, 12, 29
VOCABULARY = 32
CHUNKS = [None, 1, 5, 8, 37, 100]


def case(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[0, 3, 4, 5, 6, 7, 20, 36]] = -100
    return x, weight, targets


def hybrid(tied, vocabulary=VOCABULARY):
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12, shared_hidden=8)
    blocks = {
        "gla": partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=moe),
        "attn": partial(Block, mixer=partial(MIXERS["attention"], heads=4, kv_heads=2), ffn=partial(SwiGLU, hidden=24)),
    }
    return LM(vocabulary=vocabulary, dim=32, layers=2, pattern=["gla", "attn"], blocks=blocks, tied=tied)


def by_hand(x, weight, targets):
    """Σ -log(e^{z_target} / Σ_v e^{z_v}), token by token, in fp64."""
    total = x.new_zeros((), dtype=torch.float64)
    for x_D, target in zip(x.double(), targets.tolist(), strict=True):
        if target != -100:
            odds = torch.stack([(x_D * row).sum().exp() for row in weight.double()])
            total = total - (odds[target] / odds.sum()).log()
    return total


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradients_equal_the_formula(dtype, tolerance, chunk):
    x, weight, targets = case(dtype)
    want = by_hand(x, weight, targets)
    got = cross_entropy(x, weight, targets, chunk=chunk)
    assert got.dtype == dtype
    assert abs(got - want) <= tolerance * want
    for a, b in zip(
        torch.autograd.grad(0.3 * got, [x, weight]), torch.autograd.grad(0.3 * want, [x, weight]), strict=True
    ):
        assert a.dtype == dtype
        assert (a - b).norm() <= tolerance * b.norm()


def test_bf16_activations_meet_fp32_weights_and_gradients():
    x, weight, targets = case(torch.float32)
    rounded = x.detach().bfloat16().requires_grad_()
    got = cross_entropy(rounded, weight, targets, chunk=8)
    got.backward()
    assert got.dtype == torch.float32 and rounded.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    want = torch.autograd.grad(by_hand(x, weight, targets), [x, weight])
    for a, b in zip((rounded.grad, weight.grad), want, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()


def test_without_a_target_the_gradients_are_zeros_and_not_missing():
    x, weight, _ = case(torch.float64)
    loss = cross_entropy(x, weight, torch.full((N,), -100), chunk=8)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [x, weight]):
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("chunk", CHUNKS)
def test_without_gradients_the_loss_is_the_same_and_right_answers_are_counted(chunk):
    x, weight, targets = case(torch.float64)
    likeliest = [max(range(V), key=[(row @ x_D).item() for row in weight].__getitem__) for x_D in x]
    targets[10:20] = torch.tensor(likeliest[10:20])
    expected = sum(a == b for a, b in zip(likeliest, targets.tolist(), strict=True))
    loss, right, nats, each = score(x, weight, targets, chunk=chunk)
    assert not loss.requires_grad and loss == cross_entropy(x, weight, targets, chunk=chunk)
    assert 10 <= right.item() == expected < (targets != -100).sum()
    assert each.tolist() == [a == b for a, b in zip(likeliest, targets.tolist(), strict=True)]
    own = torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="none")
    torch.testing.assert_close(nats, own, rtol=1e-10, atol=1e-12)
    assert score(x, weight, torch.full((N,), -100), chunk=chunk)[1] == 0
    with torch.no_grad():
        assert cross_entropy(x, weight, targets, chunk=chunk) == loss


def test_evaluation_holds_the_logits_of_a_chunk_alone():
    model = hybrid(tied=False, vocabulary=VOCABULARY + 1)
    model.loss_chunk, widest = 64, []
    tokens = torch.randint(0, VOCABULARY, (1, 128))

    class Widest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (VOCABULARY + 1,):
                widest.append(out.numel() // out.shape[-1])
            return out

    with torch.no_grad(), Widest():
        output = model(tokens, Whole.of(torch.arange(128)[None]), tokens)
    assert widest and max(widest) == 64 and output.logits.numel() == 0 and output.correct is not None


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_has_the_same_loss_and_gradients_as_from_its_logits(tied, chunk):
    model = initialise(hybrid(tied).double(), 1)
    model.compute, model.loss_chunk = torch.float64, chunk
    tokens, targets = torch.randint(0, VOCABULARY, (2, 2, 31))
    targets[0, 3:9] = -100
    seq = Whole.of(torch.arange(31).expand(2, -1))
    results = []
    for part in (sums(model(tokens, seq, targets)), sums(model(tokens, seq), targets)):
        loss = part.objective(targets=50, tokens=62, balance_weight=0.1)
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    (got, gradients), (want, expected) = results
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm()
