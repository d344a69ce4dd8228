"""Every rule's kernel against a token loop written from the papers' equations, and the algebra against itself."""

from dataclasses import replace

import pytest
import torch

from models.kernels.recurrent import STEPS
from models.kernels.registry import REFERENCE
from models.recurrence import Complex
from tests.models.rules import EXAMPLES, KINDS, ORACLES, B

RULES = sorted(REFERENCE)
STARTS = {"none": [], "many": [0, 1, 2, 37, 63, 64, 65, 100], "edges": [64, 128]}


def starting(T, name):
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, [s for s in STARTS[name] if s < T]] = True
    starts[1, [s + 5 for s in STARTS[name] if s + 5 < T]] = True
    return starts


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


def entering(rule, seed=7):
    """A state that a span of other tokens leaves."""
    xs = EXAMPLES[rule](20, seed=seed)
    return ORACLES[rule](*xs, starts=starting(20, "none"))[1].detach()


def test_every_rule_has_an_oracle_an_example_and_an_algebra():
    assert sorted(ORACLES) == sorted(EXAMPLES) == sorted(KINDS) == RULES
    assert all(KINDS[rule].rule == rule for rule in RULES)


# Tokens, where documents start, decay.
LOOPED = [(T, where, decay) for T in (1, 63, 150) for where in STARTS for decay in (0.0, 0.3, 9.0)]
QUICK = {(1, "none", 0.3), (1, "many", 9.0), *((150, where, 0.3) for where in STARTS), (150, "many", 9.0)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("T", "where", "decay"), [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in LOOPED]
)
def test_outputs_state_and_gradients_equal_the_token_loop(rule, T, where, decay):
    recurrence, starts = KINDS[rule], starting(T, where)
    xs = [x.requires_grad_() for x in EXAMPLES[rule](T, decay=decay)]
    state = entering(rule).requires_grad_()
    want, want_state = ORACLES[rule](*xs, starts=starts, state=state)
    begun = recurrence.begin(*xs, starts=starts)
    got_state, got = recurrence.act(begun.effect, state), begun.finish(state)
    close((got, got_state), (want, want_state), 1e-10)
    weights, state_weights = torch.randn_like(want), torch.randn_like(want_state)

    def gradients(out, last):
        total = (out * weights).sum() + (last * state_weights).sum()
        return torch.autograd.grad(total, [*xs, state], materialize_grads=True)

    want_gradients = gradients(want, want_state)
    scale = max(g.norm() for g in want_gradients)
    for a, b in zip(gradients(got, got_state), want_gradients, strict=True):
        assert (a - b).norm() <= 1e-10 * max(b.norm(), 1e-3 * scale)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_token_at_a_time_equals_the_token_loop(rule, scale):
    """The first token, before which there is nothing, goes as a span; others by the rule's own step, in one state."""
    recurrence, xs, starts = replace(KINDS[rule], scale=scale), EXAMPLES[rule](9, decay=9.0), starting(9, "none")
    want, want_state = ORACLES[rule](*xs, starts=starts, scale=scale)
    assert rule in STEPS
    state, outs = None, []
    with torch.no_grad():
        for t in range(9):
            out, state = recurrence.step(*(x[:, t : t + 1] for x in xs), state=state)
            outs.append(out.clone())
    close([torch.cat(outs, 1), state], [want, want_state], 1e-10)


def test_a_rule_without_a_step_of_its_own_is_run_as_a_span(monkeypatch):
    honest = dict(STEPS)
    for rule in RULES:
        xs, state = EXAMPLES[rule](1), entering(rule)
        want = KINDS[rule].step(*xs, state=state.clone())
        monkeypatch.delitem(STEPS, rule)
        close(KINDS[rule].step(*xs, state=state), want, 1e-10)
        monkeypatch.setitem(STEPS, rule, honest[rule])


@pytest.mark.parametrize("rule", RULES)
def test_the_scale_is_the_rules_own_and_can_be_another(rule):
    xs, starts = EXAMPLES[rule](70), starting(70, "many")
    got = replace(KINDS[rule], scale=0.7).begin(*xs, starts=starts).finish(None)
    close([got], [ORACLES[rule](*xs, starts=starts, scale=0.7)[0]], 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_no_state_is_a_zero_state(rule):
    recurrence, xs, starts = KINDS[rule], EXAMPLES[rule](100), starting(100, "many")
    begun = recurrence.begin(*xs, starts=starts)
    close([begun.finish(torch.zeros_like(begun.effect.U))], [begun.finish(None)], 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_effects_of_three_spans_compose_to_the_effect_of_the_whole(rule):
    recurrence, xs = KINDS[rule], EXAMPLES[rule](150, decay=0.02)  # else nothing is left of A
    for where in STARTS:
        starts, cuts = starting(150, where), [0, 20, 101, 150]
        parts = [
            recurrence.begin(*(x[:, a:b] for x in xs), starts=starts[:, a:b]).effect
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        whole = recurrence.begin(*xs, starts=starts).effect
        left = recurrence.compose(recurrence.compose(parts[0], parts[1]), parts[2])
        right = recurrence.compose(parts[0], recurrence.compose(parts[1], parts[2]))
        state = entering(rule)
        for other in (left, right):
            assert torch.equal(other.alive, whole.alive)
            close([recurrence.act(other, state)], [recurrence.act(whole, state)], 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.slow), 9.3])
def test_long_fp32_spans_stay_finite_and_accurate(rule, decay):
    """No decay, and α down to 1e-4, where exp of a plain cumulated decay overflows after ten tokens."""
    T = 4096
    starts = starting(T, "none")

    def outputs_and_gradients(dtype):
        xs = [x.requires_grad_() for x in EXAMPLES[rule](T, dtype=dtype, decay=decay)]
        out = KINDS[rule].begin(*xs, starts=starts).finish(None)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return [x.double() for x in (out, *torch.autograd.grad((out * weights.to(dtype)).sum(), xs))]

    close(outputs_and_gradients(torch.float32), outputs_and_gradients(torch.float64), 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_bf16_inputs_give_what_their_values_give_in_fp32(rule):
    xs, starts = EXAMPLES[rule](200, dtype=torch.bfloat16, decay=0.3), starting(200, "many")
    got = KINDS[rule].begin(*xs, starts=starts).finish(None)
    assert got.dtype == torch.bfloat16
    close([got.float()], [KINDS[rule].begin(*(x.float() for x in xs), starts=starts).finish(None)], 2e-2)


def test_a_complex_state_may_be_a_view_into_a_message():
    """That of the first span, where an odd rank holds it, begins at an odd number of what is gathered."""
    A, state = torch.randn(1, 3, 2, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    view = torch.cat((torch.zeros(1, dtype=torch.float64), state.flatten()))[1:].view(1, 3, 2)
    assert torch.equal(Complex("complex").apply(A, view), Complex("complex").apply(A, state))


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_before_a_span_is_gone_once_a_document_starts_in_it(rule):
    """A product by zero would keep it: in the state that leaves, in effects that compose, and, where outputs of a
    state that comes later are added to those from zero, in the outputs behind the start."""
    recurrence, starts = KINDS[rule], torch.zeros(B, 100, dtype=torch.bool)
    starts[:, 30] = True
    begun = recurrence.begin(*EXAMPLES[rule](100), starts=starts)
    effect, state = begun.effect, torch.full_like(begun.effect.U, torch.nan)
    assert torch.equal(recurrence.act(effect, state), effect.U)
    broken = effect._replace(U=state, alive=torch.ones_like(effect.alive))
    assert torch.equal(recurrence.compose(broken, effect).U, effect.U)
    if rule in ADDED:
        begun.ahead()  # while the state is on its way
        assert torch.isfinite(begun.finish(state)[:, 30:]).all()


ADDED = ("linear", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "gated_delta_product", "kda", "gdn2")
