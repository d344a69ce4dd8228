"""Convolution, rotation, attention, experts, initialisation, hybrids: each against something written independently."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.axes import declarations, declare, initial, initialise
from models.conv import ShortConv
from models.kernels.softmax import attend_pieces, pieces_of
from models.lm import LM
from models.mixers import MIXERS
from models.pattern import unroll
from models.rope import rotate
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


def test_rotation_depends_on_relative_positions_only_and_is_one_at_zero():
    q, k = torch.randn(1, 1, 2, 8, dtype=torch.float64), torch.randn(1, 1, 2, 8, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]]), 1e4) * rotate(k, torch.tensor([[j]]), 1e4)).sum(-1)

    torch.testing.assert_close(score(7, 3), score(1_000_004, 1_000_000))
    assert torch.equal(rotate(q, torch.zeros(1, 1, dtype=torch.long), 1e4), q)
    pair = rotate(q, torch.tensor([[2]]), 1e4)[0, 0, 0, [1, 5]]  # frequency 1 of 4: 10000^(-2/8)
    angle = torch.tensor(2 * 1e4**-0.25, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    torch.testing.assert_close(pair, turn @ q[0, 0, 0, [1, 5]])


def test_attention_by_pieces_equals_one_masked_softmax():
    q, k, v = (torch.randn(2, 17, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    documents = (POSITIONS == 0).cumsum(1)
    allowed = (documents[:, :, None] == documents[:, None, :]) & torch.ones(17, 17, dtype=torch.bool).tril()
    pieces = [[p._replace(past=0) if p.begin == 0 else p for p in row] for row in pieces_of(POSITIONS)]
    got = attend_pieces(q, k, v, pieces, [0, 0])
    keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, keys) / 8**0.5
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(got, torch.einsum("bhts,bshv->bthv", weights, values))


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
