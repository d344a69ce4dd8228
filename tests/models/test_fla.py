"""The wiring of flash-linear-attention's kernels: against a stand-in of the same signatures, and where there is a GPU
and the package, against itself.

The stand-in computes by the token loops of `rules`, one sequence of the packed batch after another.
"""

import sys
from types import ModuleType

import pytest
import torch

from models.kernels import fla, registry
from models.kernels.registry import REFERENCE, chosen
from tests.models import test_mixers
from tests.models.rules import EXAMPLES, KINDS, ORACLES
from tests.models.test_recurrence import STARTS, close, entering, starting

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RULES = sorted(fla.CALLS)


def packed(rule, q, k, v, *gates, scale, initial_state, output_final_state, cu_seqlens):
    """What the kernels of fla.ops promise of a packed batch: q [1, T, H, K] and so on, states [N, H, K, V]."""
    assert q.shape[0] == 1 and q.dtype == k.dtype == v.dtype and cu_seqlens.dtype == torch.int64
    assert all(x.is_contiguous() for x in (q, k, v, *gates)) and (torch.diff(cu_seqlens) > 0).all()
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == q.shape[1]
    if initial_state is not None:
        assert initial_state.shape == (len(bounds) - 1, *q.shape[2:], v.shape[-1])
    outs, states = [], []
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        xs = [x[:, begin:end] for x in (q, k, v, *gates)]
        state = None if initial_state is None else initial_state[n : n + 1]
        starts = torch.zeros(1, end - begin, dtype=torch.bool)
        out, state = ORACLES[rule](*xs, starts=starts, state=state, scale=scale)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 1), torch.cat(states) if output_final_state else None


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    assert g.dtype in (torch.float32, torch.float64) and g_gamma is None
    return packed("simple_gla", q, k, v, g, **passed(scale, initial_state, output_final_state, cu_seqlens))


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert g.shape == k.shape
    return packed("gla", q, k, v, g, **passed(scale, initial_state, output_final_state, cu_seqlens))


def chunk_delta_rule(
    q,
    k,
    v,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
):
    assert not use_qk_l2norm_in_kernel
    return packed("delta_rule", q, k, v, beta, **passed(scale, initial_state, output_final_state, cu_seqlens))


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
):
    assert not use_qk_l2norm_in_kernel and g.shape == beta.shape
    return packed("gated_delta_rule", q, k, v, g, beta, **passed(scale, initial_state, output_final_state, cu_seqlens))


def chunk_kda(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    cu_seqlens=None,
):
    assert not use_qk_l2norm_in_kernel and not use_gate_in_kernel and g.shape == k.shape
    return packed("kda", q, k, v, g, beta, **passed(scale, initial_state, output_final_state, cu_seqlens))


def chunk_gdn2(
    q,
    k,
    v,
    g,
    b,
    w,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
):
    assert not use_qk_l2norm_in_kernel and g.shape == b.shape == k.shape and w.shape == v.shape
    return packed("gdn2", q, k, v, g, b, w, **passed(scale, initial_state, output_final_state, cu_seqlens))


def passed(scale, initial_state, output_final_state, cu_seqlens):
    assert isinstance(scale, float)
    return {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }


@pytest.fixture
def absent(monkeypatch):
    """No flash-linear-attention, whatever is installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)
    registry._missing.cache_clear()
    yield monkeypatch
    registry._missing.cache_clear()


@pytest.fixture
def stand_in(absent):
    for name in ("fla", "fla.ops"):
        absent.setitem(sys.modules, name, ModuleType(name))
    for f in (chunk_simple_gla, chunk_gla, chunk_delta_rule, chunk_gated_delta_rule, chunk_kda, chunk_gdn2):
        module = ModuleType(f"fla.ops.{f.__name__.removeprefix('chunk_')}")
        setattr(module, f.__name__, f)
        absent.setitem(sys.modules, module.__name__, module)
    return absent


def outputs_state_and_gradients(run, rule, where, T=40):
    xs = [x.requires_grad_() for x in EXAMPLES[rule](T, decay=0.3)]
    state = entering(rule).requires_grad_()
    found = run(xs, starting(T, where), state)
    generator = torch.Generator().manual_seed(3)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in found)
    return [*found, *torch.autograd.grad(total, [*xs, state], materialize_grads=True)]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("where", ["none", "many"])
@pytest.mark.parametrize("rule", RULES)
def test_outputs_states_and_gradients_equal_the_token_loop(stand_in, rule, where, scale):
    def known(xs, starts, state):  # the state that enters is known before the span is run: no correction
        last = KINDS[rule].act(fla.FLASpan(rule, *xs, starts=starts, scale=scale).effect, state)
        return fla.FLASpan(rule, *xs, starts=starts, scale=scale).finish(state), last

    def waiting(xs, starts, state):
        begun = fla.FLASpan(rule, *xs, starts=starts, scale=scale)
        last = KINDS[rule].act(begun.effect, state)
        return begun.finish(state), last

    def loop(xs, starts, state):
        return ORACLES[rule](*xs, starts=starts, state=state, scale=scale)

    want = outputs_state_and_gradients(loop, rule, where)
    for way in (known, waiting):
        got = outputs_state_and_gradients(way, rule, where)
        size = max(b.norm() for b in want)
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 1e-10 * max(b.norm(), 1e-3 * size)


@pytest.mark.parametrize("rule", RULES)
def test_effects_compose_and_no_state_is_a_zero_state(stand_in, rule):
    recurrence, xs = KINDS[rule], EXAMPLES[rule](40, decay=0.05)
    for where in STARTS:
        starts = starting(40, where)
        first, then = (
            fla.FLASpan(rule, *(x[:, s] for x in xs), starts=starts[:, s]).effect for s in (slice(17), slice(17, None))
        )
        whole = fla.FLASpan(rule, *xs, starts=starts)
        joined, state = recurrence.compose(first, then), entering(rule)
        assert torch.equal(joined.alive, whole.effect.alive)
        close([recurrence.act(joined, state)], [recurrence.act(whole.effect, state)], 1e-10)
        zero = torch.zeros_like(state)
        close([whole.finish(None)], [fla.FLASpan(rule, *xs, starts=starts).finish(zero)], 1e-10)


@pytest.mark.parametrize(
    "name", ["deltanet", "gated_deltanet", "gated_deltanet2", "gla", "hgrn2", "kda", "linear", "mamba2", "retnet"]
)
def test_mixers_run_on_it_as_on_the_reference(stand_in, name):
    """Through the registry, in spans with documents, as any layer would."""
    stand_in.setattr(registry, "chosen", lambda *_: registry.KernelChoice("fla", "told so"))
    stand_in.setitem(REFERENCE, test_mixers.build((name, {})).recurrence.rule, None)  # nothing falls back to it
    test_mixers.test_outputs_and_gradients_equal_the_same_mixer_over_a_token_loop((name, {}))
    test_mixers.test_any_split_into_spans_equals_the_whole((name, {}))


def test_a_packing_is_made_once_and_again_when_starts_change():
    starts = starting(10, "many")
    made = fla.packing(starts)
    assert fla.packing(starts) is made
    assert made.bounds.tolist() == [0, 1, 2, 10, 15, 16, 17, 20] and made.last.tolist() == [2, 6]
    assert made.first.tolist() == [0, 3] and made.enters.tolist() == [False, True]
    starts[1, 9] = True
    assert fla.packing(starts).bounds.tolist() == [0, 1, 2, 10, 15, 16, 17, 19, 20]


def test_on_a_cpu_the_reference_is_chosen(stand_in):
    for rule in REFERENCE:
        assert chosen(rule, CPU) == ("PyTorch", "Triton has no kernels for cpu")
        assert registry.kernel(rule, torch.zeros(1, dtype=torch.bfloat16)) is REFERENCE[rule]


def test_on_cuda_the_kernel_is_chosen_where_it_exists(stand_in):
    for rule in REFERENCE:
        assert (chosen(rule, CUDA).name == "fla") == (rule in fla.CALLS)
    assert "packed documents" in chosen("mlstm", CUDA).reason
    assert chosen("gla", CUDA, torch.float32) == ("PyTorch", "torch.float32 is not to be rounded to TF32")
    assert chosen("kda", CUDA, torch.bfloat16, 512) == (
        "PyTorch",
        "flash-linear-attention's has keys of up to 256, these have 512",
    )
    assert chosen("gla", CUDA, torch.float16, 512).name == "fla"


def test_a_kernel_that_is_not_there_or_does_not_import_leaves_the_reference(absent):
    assert chosen("gla", CUDA) == ("PyTorch", "flash-linear-attention is not installed: pip install fla-core")
    for name in ("fla", "fla.ops", "fla.ops.gla"):
        absent.setitem(sys.modules, name, ModuleType(name))
    registry._missing.cache_clear()
    reason = "flash-linear-attention does not import: ImportError: fla.ops.gla has no chunk_gla"
    assert chosen("gla", CUDA) == ("PyTorch", reason)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["none", "many"])
@pytest.mark.parametrize("rule", RULES)
def test_the_kernels_themselves_equal_the_token_loop_in_bf16(rule, where):
    pytest.importorskip("fla")
    assert chosen(rule, CUDA).name == "fla", chosen(rule, CUDA).reason
    T, starts = 300, starting(300, where)
    xs = [x.bfloat16() for x in EXAMPLES[rule](T, decay=0.3)]
    xs[0], xs[1] = (torch.nn.functional.pad(x, (0, 24)) for x in xs[:2])  # Triton's products are 16 wide at least
    xs[2] = torch.nn.functional.pad(xs[2], (0, 26))
    if rule in ("gla", "kda", "gdn2"):
        xs[3] = torch.nn.functional.pad(xs[3], (0, 24))
    if rule == "gdn2":
        xs[4:] = torch.nn.functional.pad(xs[4], (0, 24)), torch.nn.functional.pad(xs[5], (0, 26))
    state = 0.3 * torch.randn(2, 2, 32, 32, generator=torch.Generator().manual_seed(1))

    def outputs_state_and_gradients(run, device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in xs]
        entered = state.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        out, last = run(leaves, starts.to(device), entered)
        return [x.double().cpu() for x in (out, last, *torch.autograd.grad(out.sum() + last.sum(), [*leaves, entered]))]

    def streamed(leaves, starts, entered):
        begun = KINDS[rule].begin(*leaves, starts=starts)
        assert isinstance(begun, fla.FLASpan)
        last = KINDS[rule].act(begun.effect, entered)
        return begun.finish(entered), last

    def loop(leaves, starts, entered):
        return ORACLES[rule](*leaves, starts=starts, state=entered)

    close(
        outputs_state_and_gradients(streamed, CUDA, torch.bfloat16),
        outputs_state_and_gradients(loop, CPU, torch.float64),
        2e-2,
    )
