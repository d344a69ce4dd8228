"""Convolution, experts, initialisation, hybrids: each against something written independently."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.axes import declarations, declare, initial, initialise
from models.conv import ShortConv
from models.kernels import norm
from models.lm import LM
from models.mixers import MIXERS
from models.pattern import unroll
from models.sequence import Memory, Whole
from tests.parity import VOCABULARY, small_model

POSITIONS = torch.tensor([[*range(5), 0, *range(2), *range(9)], [3, 4, 5, *range(14)]])


def test_convolution_equals_a_loop_that_stops_at_document_starts():
    conv = initialise(ShortConv(6), 0).double()
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    y = conv(x, Whole.of(POSITIONS), slot="s")
    for b in range(2):
        for t in range(17):
            taps = [j for j in range(4) if j <= POSITIONS[b, t] and t >= j]
            want = sum(conv.weight[:, j] * x[b, t - j] for j in taps)
            torch.testing.assert_close(y[b, t], F.silu(want))


def test_a_parameter_starts_from_seed_and_name_alone():
    first, second = initialise(small_model(), 3), initialise(small_model(), 3)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, initial(3, name, declarations(first)[name], tuple(a.shape)))
    other = initialise(small_model(), 4)
    assert not torch.equal(first.embedding, other.embedding)
    layers = [first.get_parameter(f"layers.{i}.mixer.out.weight") for i in (1, 3)]
    assert not torch.equal(*layers)
    with pytest.raises(ValueError, match="axes"):
        declare(2, 3, axes=("embed",), init=lambda shape, generator: torch.zeros(shape))


def test_a_future_token_changes_nothing_before_it():
    model = initialise(small_model().double(), 0)
    model.compute = torch.float64
    tokens = torch.randint(0, VOCABULARY, (1, 17))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % VOCABULARY
    seq = Whole.of(POSITIONS[:1])
    before, after = (model(x, seq).logits for x in (tokens, changed))
    # Not bitwise: the changed token may move to another expert, whose matmul then has other shapes.
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=1e-11, atol=1e-11)
    assert (before[:, 12] - after[:, 12]).abs().max() > 1e-3


def test_a_document_does_not_depend_on_what_it_is_packed_with():
    model = initialise(small_model().double(), 0)
    model.compute = torch.float64
    a, b = torch.randint(0, VOCABULARY, (1, 70)), torch.randint(0, VOCABULARY, (1, 21))
    packed = model(torch.cat((a, b), 1), Whole.of(torch.cat((torch.arange(70), torch.arange(21)))[None])).logits
    for tokens, part in ((a, packed[:, :70]), (b, packed[:, 70:])):
        alone = model(tokens, Whole.of(torch.arange(tokens.shape[1])[None])).logits
        torch.testing.assert_close(part, alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 2, 40, 3]])
def test_reading_span_after_span_equals_reading_at_once(cuts):
    model = initialise(small_model().double(), 0)
    model.compute = torch.float64
    total = sum(cuts)
    tokens = torch.randint(0, VOCABULARY, (1, total))
    whole = model(tokens, Whole.of(torch.arange(total)[None])).logits
    memory, at, parts = Memory(), 0, []
    for cut in cuts:
        positions = torch.arange(at, at + cut)[None]
        parts.append(model(tokens[:, at : at + cut], Whole.of(positions, memory=memory)).logits)
        memory.advance()
        at += cut
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="heads=5: must divide dim=32"):
        MIXERS["attention"](dim=32, heads=5, kv_heads=1)
    with pytest.raises(ValueError, match="kv_heads=3: must divide heads=4"):
        MIXERS["attention"](dim=32, heads=4, kv_heads=3)
    for name in ("gla", "gated_deltanet"):
        with pytest.raises(ValueError, match=r"heads=5: must divide dim \* expand_k"):
            MIXERS[name](dim=32, heads=5)
    with pytest.raises(ValueError, match="pattern"):
        LM(vocabulary=8, dim=8, layers=2, pattern=["a", "x"], blocks={"a": partial(int)})
    assert unroll(["a", "b", "b"], 5, ["a", "b"]) == ["a", "b", "b", "a", "b"]


def test_torchs_own_norm_equals_ours_where_it_takes_over(monkeypatch):
    x, weight = torch.randn(5, 7, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    found = []
    for devices in (norm.FUSED, ("cpu",)):
        monkeypatch.setattr(norm, "FUSED", devices)
        leaves = [y.clone().requires_grad_() for y in (x, weight)]
        outs = norm.rms_norm(*leaves, 1e-2), norm.l2_norm(leaves[0], 1e-2)
        found.append([*outs, *torch.autograd.grad(sum((y**3).sum() for y in outs), leaves)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm()
