"""What a layer keeps for when it is computed again: handed out once, in order, unchanged."""

import pytest
import torch

from models.linear import Linear
from models.recompute import Tape, keeping, kept, unkept

A, B = torch.arange(3.0), torch.arange(4.0)


def test_results_come_back_in_order_and_nothing_is_computed_twice():
    tape, runs = Tape(), []

    def run():
        return kept(lambda: runs.append(1) or A + 1), *kept(lambda: (runs.append(2), (B, B + 2))[1])

    with tape.recording():
        first = run()
    assert tape.bytes == 4 * (3 + 4 + 4) and not keeping()
    with tape.replay():
        again = run()
    assert runs == [1, 2] and tape.bytes == 0
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with tape.replay(), pytest.raises(RuntimeError, match="or a second time"):
        run()


def test_what_was_changed_in_place_is_not_handed_out():
    tape = Tape()
    with tape.recording():
        kept(lambda: A + 1).add_(1)
    with tape.replay(), pytest.raises(RuntimeError, match="changed in place"):
        kept(lambda: A)


def test_what_is_asked_for_inside_is_part_of_it():
    for outer in (lambda f: kept(f), lambda f: unkept(lambda _: f(), A)):
        tape = Tape()
        with tape.recording():
            outer(lambda: kept(lambda: A + 1) + kept(lambda: A + 2))
            assert keeping()
        assert len(tape.results) <= 1


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_is_kept_has_the_gradients_of_one_that_is_not(bias):
    layer = Linear(5, 7, axes=(None, None), bias=bias).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, grad = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 7, dtype=torch.float64)
    want = layer(x)
    tape, inputs = Tape(), [x, *layer.parameters()]
    with tape.recording():
        layer(x)
    with torch.no_grad():  # the second pass takes the product from the first, whatever the weight is by now
        saved = layer.weight.clone()
        layer.weight.zero_()
    with tape.replay():
        got = layer(x)
    assert torch.equal(got, want)
    with torch.no_grad():
        layer.weight.set_(saved)
    for a, b in zip(
        torch.autograd.grad(layer(x), inputs, grad), torch.autograd.grad(_recorded(layer, x), inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def _recorded(layer, x):
    with Tape().recording():
        return layer(x)
