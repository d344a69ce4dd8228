"""Compiled layers against one process that compiles nothing: of one process what torch's compiler traces, of two ranks
(slow) also what the backend of a run compiles."""

from functools import partial

import pytest
import torch
from torch import nn

from models import compiled
from models.axes import initialise
from models.compiled import Asked, compile_layer, compiled_pieces
from models.sequence import Memory, Whole
from parallel.sequence.states import AllScan
from tests.parallel.test_parity import BATCH, unequal_pair, zigzag
from tests.parity import Sample, assert_close, small_model, spread, truth

pytestmark = pytest.mark.dist


def compiled_model(backend):
    """Each layer of the small hybrid compiled; its parameters have the names that they have without."""
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    for layer in model.layers.values():
        compile_layer(layer, backend=backend)
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
    return model


def _several(backend, cases):
    build = partial(compiled_model, backend)
    return [spread(BATCH, plan, precision, build=build, **more) for plan, precision, more in cases]


CASES = [
    (unequal_pair(), "fp64", {}),
    (zigzag(), "fp64", {"remat": "full"}),
    (zigzag(), "fp64", {"remat": "selective", "recurrence": AllScan()}),
]


def held_to_one_process(found, cases):
    for passes in found:
        for got, (_, precision, _) in zip(passes, cases, strict=True):
            assert_close(got, truth(BATCH, precision), precision)


@pytest.mark.slow
def test_traced_layers_on_two_ranks_are_one_process(run):
    held_to_one_process(run(2, _several, "eager", CASES, timeout=280), CASES)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_compiled_layers_on_two_ranks_are_one_process(run, precision):
    cases = [(plan, precision, more) for plan, _, more in CASES]
    held_to_one_process(run(2, _several, "inductor", cases, timeout=1800), cases)


def gradients_in_two_spans(model: nn.Module, sample: Sample, cut: int):
    """The logits of two spans in time, and their gradients of the first one's tokens alone."""
    memory, parts = Memory(), []
    tokens, positions = (torch.from_numpy(x)[None] for x in (sample.tokens, sample.positions))
    for begin, end in ((0, cut), (cut, len(sample.tokens))):
        seq = Whole.of(positions[:, begin:end], memory=memory)
        parts.append(model(tokens[:, begin:end], seq).logits)
        memory.advance()
    logits = torch.cat(parts, 1)
    model.zero_grad()
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def test_a_compiled_layer_has_states_of_its_own_and_compiles_each_length_no_more(monkeypatch):
    plain, traced = small_model().double(), compiled_model("eager").double()
    for model in (plain, traced):
        initialise(model, 0)
        model.compute = torch.float64
    want = gradients_in_two_spans(plain, Sample((5, 20)), 9)
    for got, expected in zip(gradients_in_two_spans(traced, Sample((5, 20)), 9), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for lengths, cut in (((7, 25), 11), ((3, 1, 30), 20)):
        gradients_in_two_spans(traced, Sample(lengths), cut)
    pieces = compiled_pieces()
    for lengths, cut in (((9, 4, 20), 15), ((31, 6), 12)):
        gradients_in_two_spans(traced, Sample(lengths), cut)
    assert compiled_pieces() == pieces > 0

    # Without its own name each layer would read what another one left.
    honest = Asked.__init__
    monkeypatch.setattr(compiled.Asked, "__init__", lambda self, seq, name, tape: honest(self, seq, "", tape))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        gradients_in_two_spans(traced, Sample((5, 20)), 9)
