"""Spans of several tiles, as all long ones are: against the token loops, in the precisions that train, and broken.

At their own size a tile is 2,048 tokens, so the short spans of the other tests are one: here a tile is 64.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from models.axes import initialise
from models.kernels import complex_decay, delta, delta_gates, dplr, elementwise, gated_linear, tiled_scan, titans
from models.kernels.registry import REFERENCE
from models.mixers import MIXERS
from models.sequence import Whole
from tests.models.rules import EXAMPLES, KINDS, ORACLES
from tests.models.test_mixers import NEEDED
from tests.models.test_recurrence import STARTS, close, entering, starting

SPANS = (
    *(gated_linear.GatedLinearSpan, delta.DeltaSpan, delta_gates.EraseWriteSpan, dplr.DPLRSpan),
    titans.TitansSpan,
)
STREAMED = sorted(rule for rule, kernel in REFERENCE.items() if kernel in SPANS)
T = 150  # three tiles, the last of them with a chunk that is partly empty


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Of 64 tokens in each of two spans; how many there were, a stream."""
    honest, streamed = tiled_scan.Stream.forward, []

    def counted(ctx, step, tile, starts, *rest):
        streamed.append(-(-starts.shape[1] // tile))
        return honest(ctx, step, tile, starts, *rest)

    monkeypatch.setattr(tiled_scan, "TILE", 128)
    monkeypatch.setattr(tiled_scan.Stream, "forward", staticmethod(counted))
    return streamed


def outputs_state_and_gradients(rule, run, where):
    """run(xs, starts, state) -> (outputs, last state), both and the gradients of a weighted sum of them."""
    xs = [x.requires_grad_() for x in EXAMPLES[rule](T, decay=0.1)]
    state, starts = entering(rule).requires_grad_(), starting(T, where)
    found = run(xs, starts, state)
    generator = torch.Generator().manual_seed(3)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in found)
    return [*found, *torch.autograd.grad(total, [*xs, state])]


def effect_first(rule, **options):
    """The state that enters becomes known when the span has been streamed."""
    recurrence = replace(KINDS[rule], **options)

    def run(xs, starts, state):
        begun = recurrence.begin(*xs, starts=starts)
        last = recurrence.act(begun.effect, state)
        begun.ahead()
        return last, begun.finish(state)

    return run


def state_first(rule):
    """It is known before: the outputs are streamed from it, and the effect of another pass over the span is not."""

    def run(xs, starts, state):
        last = KINDS[rule].act(KINDS[rule].begin(*xs, starts=starts).effect, state)
        return last, KINDS[rule].begin(*xs, starts=starts).finish(state)

    return run


def loop(rule):
    return lambda xs, starts, state: ORACLES[rule](*xs, starts=starts, state=state)[::-1]


def check(rule, ways=(effect_first, state_first), packings=tuple(STARTS)):
    for where in packings:
        want = outputs_state_and_gradients(rule, loop(rule), where)
        for way in ways:
            close(outputs_state_and_gradients(rule, way(rule), where), want, 1e-10)


def test_the_rules_of_matrices_are_streamed():
    erasing = ["delta_rule", "dplr", "gated_delta_rule", "gdn2"]
    assert STREAMED == [*erasing, "gla", "kda", "linear", "simple_gla", "titans"]


@pytest.mark.parametrize("rule", STREAMED)
def test_several_tiles_equal_the_token_loop(rule, tiles):
    check(rule)
    by_decays = REFERENCE[rule] is gated_linear.GatedLinearSpan  # their effect is no stream
    assert len(tiles) == (2 if by_decays else 3) * len(STARTS) and set(tiles) == {3}


@pytest.mark.parametrize("rule", sorted(REFERENCE))
def test_several_slices_equal_the_token_loop(rule):
    """Every rule has them; `engine.tile` cuts spans so, see `models.kernels.token_tiles`."""
    check(rule, ways=(partial(effect_first, tile=60),), packings=("many",))


def forget_the_gradient_of_the_state_that_enters_a_tile(honest: tiled_scan.Step) -> tiled_scan.Step:
    return lambda xs, starts, state, memo, **sizes: honest(xs, starts, state.detach() + 0 * state, memo, **sizes)


def enter_every_tile_with_nothing(honest: tiled_scan.Step) -> tiled_scan.Step:
    return lambda xs, starts, state, memo, **sizes: honest(xs, starts, 0 * state, memo, **sizes)


def let_documents_of_a_later_tile_run_on(honest: tiled_scan.Step) -> tiled_scan.Step:
    calls: list[bool] = []

    def step(xs, starts, state, memo, **sizes):
        calls.append(True)
        return honest(xs, starts if len(calls) % 3 == 1 else torch.zeros_like(starts), state, memo, **sizes)

    return step


def keep_the_scores_of_the_first_tile_for_all(honest: tiled_scan.Step) -> tiled_scan.Step:
    shared: list[torch.Tensor] = []

    def step(xs, starts, state, memo, **sizes):
        memo[:] = shared
        out = honest(xs, starts, state, memo, **sizes)
        shared[:] = memo
        return out

    return step


STREAMING: dict[Callable, tuple[str, ...]] = {
    forget_the_gradient_of_the_state_that_enters_a_tile: ("linear", "gla", "kda"),
    enter_every_tile_with_nothing: ("linear", "gla", "kda"),
    let_documents_of_a_later_tile_run_on: ("linear", "gla", "kda"),
    keep_the_scores_of_the_first_tile_for_all: ("gla", "kda"),
}


@pytest.mark.parametrize("mutation", STREAMING, ids=lambda f: f.__name__)
def test_broken_streaming_is_caught(mutation, monkeypatch):
    for rule in STREAMING[mutation]:
        module = gated_linear if REFERENCE[rule] is gated_linear.GatedLinearSpan else delta
        with monkeypatch.context() as patch, pytest.raises((AssertionError, RuntimeError, IndexError)):
            patch.setattr(module, "step", mutation(module.step))
            check(rule, ways=(state_first,), packings=("many",))


GATED = {
    name: ("A_log", "dt_bias")
    for name in ("gated_deltanet", "gated_deltanet2", "gated_deltaproduct", "kda", "mamba", "mamba2")
} | {"mamba3": ("dt_bias",)}


@pytest.mark.parametrize("name", GATED)
def test_gradients_of_gates_are_as_good_as_fp32_can_be(name, monkeypatch):
    """All tokens of a head add to them, so what each loses to rounding would show."""
    monkeypatch.setattr(tiled_scan, "TILE", 512)
    documents = (1700, 1, 63, 1500, 832)
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(1, sum(documents), 32, generator=generator) for _ in range(2))
    mixer = initialise(MIXERS[name](dim=32, heads=NEEDED["heads"]), 0)

    def gradients(dtype):
        out = mixer.to(dtype)(x.to(dtype), Whole.of(positions), slot="mixer")
        wanted = [mixer.get_parameter(gate) for gate in GATED[name]]
        return [g.double() for g in torch.autograd.grad((out * weights).sum(), wanted)]

    close(gradients(torch.float32), gradients(torch.float64), 1e-5)


def test_every_mixer_with_such_gates_is_measured():
    with torch.device("meta"):
        built = {n: MIXERS[n](dim=32, heads=2, **({"kv_heads": 1} if n == "attention" else {})) for n in MIXERS}
    assert {n for n, mixer in built.items() if hasattr(mixer, "A_log") or hasattr(mixer, "dt_bias")} == set(GATED)


@pytest.mark.parametrize("rule", STREAMED)
def test_bf16_inputs_keep_their_gradients(rule):
    xs, starts = EXAMPLES[rule](200, dtype=torch.bfloat16, decay=0.3), starting(200, "many")
    weights = torch.randn(xs[2].shape, generator=torch.Generator().manual_seed(3))

    def outputs_and_gradients(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in xs]
        out = KINDS[rule].begin(*leaves, starts=starts).finish(None)
        return [x.float() for x in (out, *torch.autograd.grad((out.float() * weights).sum(), leaves))]

    close(outputs_and_gradients(torch.bfloat16), outputs_and_gradients(torch.float32), 2e-2)


@pytest.mark.parametrize("rule", [name for name, kernel in REFERENCE.items() if kernel is gated_linear.GatedLinearSpan])
def test_an_effect_by_decays_waits_for_no_output(rule, monkeypatch):
    """So that it is on its way while outputs are computed; and those are not computed twice when the state is there."""
    steps, honest = [], gated_linear.step
    monkeypatch.setattr(gated_linear, "step", lambda *xs, **options: steps.append(1) or honest(*xs, **options))
    begun = KINDS[rule].begin(*EXAMPLES[rule](T, decay=0.1), starts=starting(T, "none"))
    effect = begun.effect
    assert not steps
    begun.ahead()
    tiles = len(steps)
    begun.finish(torch.ones_like(effect.U))
    assert len(steps) == tiles > 0


@pytest.mark.parametrize("where", STARTS)
def test_stretches_of_mlstm_equal_the_whole(where, monkeypatch):
    want = outputs_state_and_gradients("mlstm", loop("mlstm"), where)
    monkeypatch.setattr(type(KINDS["mlstm"]), "stretch", 64)
    close(outputs_state_and_gradients("mlstm", effect_first("mlstm"), where), want, 1e-10)
    close(outputs_state_and_gradients("mlstm", state_first("mlstm"), where), want, 1e-10)


@pytest.mark.parametrize("rule", ["elementwise", "complex"])
@pytest.mark.parametrize("where", STARTS)
def test_tiles_of_a_scan_equal_the_whole(rule, where, monkeypatch):
    """Of 64 tokens here; the gradient of what one leaves to the next goes through their last states."""
    T, state = 200, entering(rule)

    def found():
        xs = [x.requires_grad_() for x in EXAMPLES[rule](T, decay=0.1)]
        begun = KINDS[rule].begin(*xs, starts=starting(T, where))
        out, last = begun.finish(state), KINDS[rule].act(begun.effect, state)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out, last, *torch.autograd.grad((out * weights).sum() + last.sum(), xs)]

    want = found()
    counted, honest = [], elementwise.tiles
    monkeypatch.setattr(elementwise, "NUMBERS", 1)
    for module in (elementwise, complex_decay):
        monkeypatch.setattr(module, "tiles", lambda *xs, size: counted.append(1) or honest(*xs, size=size))
    close(found(), want, 1e-12)
    assert counted
