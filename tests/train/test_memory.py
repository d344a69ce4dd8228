"""What saves memory saves it, and changes no number: chunks, tiles, recomputation, the host."""

from collections import Counter
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist

from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU, tiled
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Memory, Whole
from parallel import activation_memory, collectives
from parallel.parallelize import parallelise
from parallel.schedule.static import Static
from tests import parity
from tests.benchmarks.memory import measure
from tests.parity import Sample, assert_close
from train.engines.fsdp import FSDP

BATCH = [Sample((40, 24, 1, 1, 2, 60)), Sample((130, 3), masked=(60, 133))]
LENGTHS = [len(s.tokens) for s in BATCH]
CHOICES = {
    "chunks": {"chunk": 16},
    "tiles": {"tile": 32},
    "selective": {"recompute": "selective"},
    "selective, tiles": {"tile": 32, "recompute": "selective"},
    "full": {"recompute": "full"},
    "all": {"chunk": 16, "tile": 32, "recompute": "full"},
}


def small(vocabulary=32, layers=4):
    """GLA, Gated DeltaNet and grouped attention, with dense and expert feed-forwards, in fp64."""
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12, shared_hidden=8)
    mixers = {
        "gla": partial(MIXERS["gla"], heads=2),
        "gdn": partial(MIXERS["gated_deltanet"], heads=2),
        "attn": partial(MIXERS["attention"], heads=4, kv_heads=2),
    }
    blocks = {
        n: partial(Block, mixer=m, ffn=partial(SwiGLU, hidden=96) if n == "gdn" else moe) for n, m in mixers.items()
    }
    model = LM(vocabulary=vocabulary, dim=32, layers=layers, pattern=["gla", "gdn", "attn", "gdn"], blocks=blocks)
    model.compute = torch.float64
    return initialise(model.double(), 0)


@cache
def plain():
    """A step that saves nothing."""
    return measure(small(), 192)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "tiles")) for n in CHOICES])
def test_a_step_has_the_same_loss_and_gradients(name):
    want = plain()
    got = measure(small(), 192, **CHOICES[name])
    assert abs(got.loss - want.loss) <= 1e-12 * want.loss
    assert got.gradients.keys() == want.gradients.keys()
    for key, gradient in want.gradients.items():
        assert (got.gradients[key] - gradient).norm() <= 1e-10 * gradient.norm(), key


def test_a_policy_asked_for_every_operator_is_the_same_step():
    """The way of devices that have kernels of their own."""
    want, asked = plain(), small()
    activation_memory.recompute(asked.layers, "selective", device="cuda")
    got = measure(asked, 192)
    assert abs(got.loss - want.loss) <= 1e-12 * want.loss and got.saved < want.saved
    for key, gradient in want.gradients.items():
        assert (got.gradients[key] - gradient).norm() <= 1e-10 * gradient.norm(), key


def test_chunks_tiles_and_recomputation_hold_less_than_two_fifths():
    plain, saving = measure(small(512, 4), 1024), measure(small(512, 4), 1024, chunk=64, tile=64, recompute="full")
    assert saving.saved < 0.2 * plain.saved and saving.most < 0.4 * plain.most
    assert abs(saving.loss - plain.loss) <= 1e-12 * plain.loss


def test_selective_keeps_more_than_full_and_less_than_everything():
    saved = {policy: measure(small(), 1024, recompute=policy).saved for policy in activation_memory.RECOMPUTE}
    assert saved["full"] < saved["selective"] < saved["none"]


@pytest.mark.parametrize("tile", [1, 5, 7, 100])
def test_a_tile_at_a_time_is_the_same_function(tile):
    ffn = initialise(SwiGLU(dim=6, hidden=10).double(), 0)
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    gate, up = (x @ ffn.gate_up.weight.T).chunk(2, dim=-1)
    want = (gate * gate.sigmoid() * up) @ ffn.down.weight.T
    ffn.tile = tile
    got, _ = ffn(x, Whole.of(torch.arange(7).expand(3, -1)))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    grad, inputs = torch.randn_like(got), [x, *ffn.parameters()]
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_tile_holds_its_inside_alone():
    widest = []

    def f(x):
        widest.append(len(x))
        return x * x

    x = torch.randn(2, 11, 3, requires_grad=True)
    tiled(f, x, 4).sum().backward()
    assert max(widest) == 4 and sum(widest) == 2 * 22, "each token once forward, once backward"
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("cuts", [[192], [70, 1, 121]])
def test_a_recurrence_in_tiles_reads_documents_and_spans_as_at_once(cuts):
    whole, tiles = small(), small()
    activation_memory.tile(tiles, 32)
    tokens = torch.randint(0, 32, (1, 192))
    positions = torch.cat([torch.arange(n) for n in (40, 1, 1, 100, 50)])[None]
    memories, at = (Memory(), Memory()), 0
    for cut in cuts:
        want, got = (
            model(tokens[:, at : at + cut], Whole.of(positions[:, at : at + cut], memory=kept)).logits
            for model, kept in zip((whole, tiles), memories, strict=True)
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        for kept in memories:
            kept.advance()
        at += cut


def run_and_count(remat, **more):
    """Loss and gradients, and how often this rank communicated, by the function of torch.distributed.

    It breaks into modules: this process is the test's own.
    """
    calls = Counter()

    def count(module, name):
        honest = getattr(module, name)

        def counting(*args, **kwargs):
            calls[name] += 1
            return honest(*args, **kwargs)

        setattr(module, name, counting)

    for module, name in ((collectives, "all_gather_into"), (collectives, "reduce_scatter_into"), (dist, "all_reduce")):
        count(module, name)
    parity.parallelise = partial(parallelise, **more)
    plan = Static().plan(0, LENGTHS, data=1, sequence=2)
    return parity.spread(BATCH, plan, "fp64", remat), dict(calls)


@pytest.mark.dist
@pytest.mark.slow
def test_selective_sends_nothing_twice(run):
    (want, sent), (_, selective), (_, full) = (
        run(2, run_and_count, policy)[0] for policy in ("none", "selective", "full")
    )
    assert selective == sent and sum(sent.values()) > 0
    assert sum(full.values()) > sum(sent.values()), "or this would hold for any policy"
    for got, _ in run(2, run_and_count, "selective"):
        assert_close(got, parity.truth(BATCH, "fp64"), "fp64")


@pytest.mark.dist
@pytest.mark.parametrize(
    "remat", [pytest.param(n, marks=[pytest.mark.slow] * (n != "selective")) for n in activation_memory.RECOMPUTE]
)
def test_everything_at_once_equals_one_process(run, remat):
    more = {"tile": 24, "offload_activations": True, "offload_optimizer": True}
    want = parity.truth(BATCH, "fp64")
    for got, _ in run(2, run_and_count, remat, **more):
        assert_close(got, want, "fp64")


def test_what_a_layer_saves_goes_to_the_host_and_comes_back(monkeypatch):
    """There is no other device here, so that the journey itself is not made; which tensors would go is seen."""
    packed = []
    monkeypatch.setattr(
        activation_memory, "to_host", lambda x, held: packed.append(x.untyped_storage().data_ptr() in held) or x
    )
    monkeypatch.setattr(activation_memory, "from_host", lambda x: x)
    plain, moved = small(), small()
    activation_memory.offload(moved.layers)
    want, got = (measure(model, 96) for model in (plain, moved))
    assert any(packed) and not all(packed), "parameters are told from activations"
    assert got.loss == want.loss
    for key, gradient in want.gradients.items():
        assert torch.equal(got.gradients[key], gradient)


def test_values_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="engine.recompute=some: must be one of none, full, selective"):
        FSDP(recompute="some")
    with pytest.raises(ValueError, match="engine.tile=0: must be at least 1, or null"):
        FSDP(tile=0)
