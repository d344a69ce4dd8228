"""Costs read off a model on the meta device, against what a real run multiplies, keeps and leaves, and hand sums."""

import inspect
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from launch.config.compose import composed
from launch.config.validate import build
from models.accounting import Account, AttentionCost, Flops, LayerWork, account
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.kernels import decay
from models.kernels.decay_pairs import Doubling
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.recompute import Tape
from models.sequence import Memory, Whole
from tests.parity import VOCABULARY, small_model
from train.metrics.timing import Utilisation, matmul_peak, pieces
from train.tracking.panels import scalars

T = 192  # whole chunks of 64
SIZES = {"heads": 4, "kv_heads": 2}
ATEN = torch.ops.aten
FUSED = {  # what the counter does not know: the CPU's fused attention, with its own formulas for a GPU's
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad, q, k, v
    ),
}


# Latents are values of 4 head widths behind keys of 4.5, and the fused kernel makes them as wide as the keys.
PADDED = {"mla": 18 / 17}


def single(mixer: str, dtype: torch.dtype = torch.float64) -> LM:
    """Two layers of one mixer."""
    wanted = inspect.signature(MIXERS[mixer].__init__).parameters
    make = partial(MIXERS[mixer], **{key: value for key, value in SIZES.items() if key in wanted})
    block = partial(Block, mixer=make, ffn=partial(SwiGLU, hidden=48))
    model = LM(vocabulary=VOCABULARY, dim=32, layers=2, pattern=["a"], blocks={"a": block})
    model.compute = dtype
    return model


def named(make) -> str:
    return make.args[0] if isinstance(make, partial) else make.__name__


def on_meta(make) -> Account:
    return _on_meta(make.func, *make.args) if isinstance(make, partial) else _on_meta(make)


@pytest.fixture(autouse=True)
def decays_count_as_strong(monkeypatch):
    """Where no number can be looked at, decays by channel cost what strong ones do (`models.kernels.decay_pairs`)."""
    monkeypatch.setattr(decay, "pairs_of", lambda g: Doubling)


@cache  # partials are equal where function and arguments are
def _on_meta(make, *args) -> Account:
    with torch.device("meta"):
        return account(make(*args))


def small(dtype: torch.dtype = torch.float64) -> LM:
    model = small_model()
    model.compute = dtype  # fp64: the experts' matmuls are a plain loop, which the counter sees
    return model


OFTEN = (
    "attention",
    "gated_conv",
    "gated_deltanet",
    "gla",
    "mamba2",
    "mla",
    "mlstm",
    "mom",
)  # of each form of cost one
EACH = [
    small,
    *(pytest.param(partial(single, n), marks=[pytest.mark.slow] * (n not in OFTEN)) for n in sorted(MIXERS)),
]


def whole(tokens: int, memory: Memory | None = None) -> Whole:
    return Whole.of(torch.arange(tokens).unsqueeze(0), memory=memory)


def counted(model: LM, tokens: int) -> tuple[int, int]:
    """FLOPs of a real forward and backward over one document, softmax attention's as full squares."""
    initialise(model.to(model.compute), 0)
    x = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=FUSED) as forward:
        output = model(x, whole(tokens))
    with FlopCounterMode(display=False, custom_mapping=FUSED) as backward:
        output.logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def square(costs: Account, tokens: int) -> int:
    return sum(layer.flops * tokens**2 for layer in costs.attention)


@pytest.mark.parametrize("make", EACH, ids=named)
def test_flops_are_those_that_a_real_run_multiplies(make):
    costs = on_meta(make)
    forward, backward = counted(make(), T)
    in_square = square(costs, T) * PADDED.get(named(make), 1)
    if "mom" in str(make):  # each memory fills its last chunk, of as many tokens as happen to go there
        assert T * costs.per_token.forward == pytest.approx(forward, rel=0.2)
        return
    assert T * costs.per_token.forward + in_square == pytest.approx(forward, rel=1e-6)
    # The fused backward computes the scores again: five products for the forward's two, of which the model needs four.
    assert T * costs.per_token.backward + 2.5 * in_square == pytest.approx(backward, rel=0.02)
    assert costs.per_token.recompute == costs.per_token.forward - 2 * VOCABULARY * 32


@pytest.mark.parametrize("make", EACH, ids=named)
def test_state_is_what_a_real_run_leaves(make):
    memory = Memory()
    model = make()
    with torch.no_grad():
        initialise(model.to(model.compute), 0)(torch.zeros(1, T, dtype=torch.long), whole(T, memory))
    left = [x for x in tree_leaves(memory.leaving) if isinstance(x, torch.Tensor)]
    assert on_meta(make).state(T) == sum(x.numel() * x.itemsize for x in left)


@pytest.mark.parametrize("make", [small, *(partial(single, name) for name in ("attention", "gated_deltanet", "gla"))])
def test_dear_results_are_those_that_a_real_run_keeps(make):
    model, tape = initialise(make(torch.float32), 0), Tape()
    with tape.recording():
        x = torch.randn(1, 256, 32, requires_grad=True)
        for layer in model.layers.values():
            x = layer(x, whole(256))[0]
    costs = on_meta(lambda: make(torch.float32))
    assert costs.dear * 256 == tape.bytes
    assert 0 < costs.dear < costs.activations


@pytest.mark.parametrize("make", [small, *(partial(single, name) for name in ("attention", "gated_deltanet", "gla"))])
def test_activations_are_what_a_real_run_keeps(make):
    model = initialise(make(torch.float32), 0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    x = torch.randn(1, 256, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        for layer in model.layers.values():
            x, *_ = layer(x, whole(256))
    real = sum(storage.nbytes() for storage in kept.values())
    assert 256 * on_meta(partial(make, torch.float32)).activations == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (3, 2), (7, 9), (20, 4)])
def test_pairs_are_those_of_a_causal_window_and_sinks(window, sinks):
    for length in (1, 2, 7, 13, 31):
        q, k = torch.arange(length)[:, None], torch.arange(length)
        seen = (k <= q) & ((k > q - (window or length)) | (k < sinks))
        assert AttentionCost(1, 1, window, sinks).pairs(length) == seen.sum()


def test_documents_cost_what_their_tokens_and_pairs_do_however_they_are_packed():
    layers = (AttentionCost(10, 4, None), AttentionCost(10, 4, None), AttentionCost(100, 4, 2))
    costs = Account(
        parameters=0,
        embedding=0,
        activated=0,
        per_token=Flops(1000, 2000, 500),
        layers=(LayerWork(Flops(1000, 2000, 500), layers),),
        head=0,
        attention=layers,
        activations=0,
        dear=0,
        recurrent=64,
    )
    on_pairs = 20 * (6 + 6 + 1) + 100 * (5 + 5 + 1)
    assert costs.flops([3, 1, 3]) == (7000 + on_pairs, 14000 + 2 * on_pairs, 3500 + on_pairs)
    assert costs.flops([3, 1, 3]).model == 21000 + 3 * on_pairs
    assert costs.layers[0].flops(3) == costs.flops([3]).model / 3
    assert costs.state(10) == 64 + 2 * 4 * 10 + 4 * 1


def test_a_dense_model_of_a_billion_parameters_costs_what_the_hand_says():
    costs = account(build(composed(["model=llama_1b"])))
    dim, layers, vocabulary, hidden, keys = 2048, 16, 128_256, 8192, 2 * 8 * 64
    matrices = layers * (2 * dim * dim + dim * keys + 3 * dim * hidden)
    norms = (2 * layers + 1) * dim
    assert costs.parameters == matrices + norms + vocabulary * dim == 1_235_814_400  # as published
    assert costs.per_token.forward == 2 * (matrices + vocabulary * dim)
    assert costs.per_token.backward == 2 * costs.per_token.forward
    n = 4096
    causal = 3 * layers * 2 * 2 * dim * n * (n + 1) // 2  # forward and twice that, QK and PV
    assert costs.flops([n]).model == 6 * n * (matrices + vocabulary * dim) + causal
    assert costs.state(n) == layers * keys * n * 4


def test_a_token_meets_the_experts_that_it_goes_to_and_one_row_of_the_embedding():
    costs = on_meta(small)
    idle = 2 * 2 * 3 * 32 * 12  # two layers with experts, of 4 two each, three matrices
    assert costs.parameters - costs.activated == idle + (VOCABULARY - 1) * 32
    assert costs.embedding == VOCABULARY * 32


def test_the_form_in_which_experts_run_changes_bytes_and_no_flop():
    with torch.device("meta"):
        model = small(torch.bfloat16)
    here, there = account(model), account(model, device="cuda")
    assert here.per_token == there.per_token and here.activations < there.activations


def test_accounting_leaves_the_model_as_it_was():
    with torch.device("meta"):
        model = small_model()
    moes = [m for m in model.modules() if isinstance(m, MoE)]
    before = [m.dispatch for m in moes]
    account(model)
    assert [m.dispatch for m in moes] == before and all("forward" not in vars(m.experts) for m in moes)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="must be on the meta device"):
        account(small_model())


class Chooses(nn.Module):
    """A feed-forward whose course depends on data."""

    def __init__(self, *, dim: int):
        super().__init__()

    def forward(self, x, seq):
        return (x if x.sum().item() > 0 else -x), None


def test_a_layer_that_looks_at_its_data_is_named():
    block = partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=Chooses)
    with torch.device("meta"):
        model = LM(vocabulary=8, dim=16, layers=1, pattern=["odd"], blocks={"odd": block})
    with pytest.raises(NotImplementedError, match=r"costs of layers.0 \(odd\): .*meta"):
        account(model)


def test_utilisation_is_the_share_of_the_peak():
    costs = on_meta(small)
    starts = torch.tensor([True, False, False, True, False]).numpy()
    assert pieces(starts) == [3, 2]
    found = Utilisation(costs, peak=1e9).of([starts, starts], seconds=0.5)
    assert found["model_flops"] == pytest.approx(costs.flops([3, 2, 3, 2]).model / 0.5)
    assert found["mfu"] == pytest.approx(found["model_flops"] / 1e9)
    assert scalars({"step": 1, **found}) == {"step": 1, **found}


def test_the_peak_of_matmuls_draws_no_random_number_and_is_a_rate():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    peak = matmul_peak("cpu", torch.float32, seconds=0.05)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < peak < 1e14
