"""The chunked kernels against token loops written from the papers' equations, and the algebra against itself."""

import pytest
import torch
import torch.nn.functional as F

from models.recurrence import Dense, Diagonal

B, H, K, V = 2, 2, 8, 6


def gla_loop(q, k, v, g, *, starts, state):
    """2312.06635, section 4.1: S_t = diag(α_t) S_{t-1} + k_tᵀ v_t, o_t = q_t S_t / √K."""
    outs = []
    for t in range(q.shape[1]):
        state = torch.where(starts[:, t, None, None, None], 0.0, state)
        state = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / K**0.5)
    return torch.stack(outs, 1), state


def delta_loop(q, k, v, g, beta, *, starts, state):
    """2412.06464, section 3.1: S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / √K."""
    outs, eye = [], torch.eye(K, dtype=q.dtype)
    for t in range(q.shape[1]):
        state = torch.where(starts[:, t, None, None, None], 0.0, state)
        kt, bt = k[:, t], beta[:, t, :, None, None]
        keep = g[:, t].exp()[..., None, None] * (eye - bt * kt[..., :, None] * kt[..., None, :])
        state = keep @ state + bt * kt[..., :, None] * v[:, t, :, None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / K**0.5)
    return torch.stack(outs, 1), state


def inputs(kind, T, dtype=torch.float64, decay=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(B, T, H, *shape, generator=generator, dtype=dtype)

    def uniform(*shape):
        return torch.rand(B, T, H, *shape, generator=generator, dtype=dtype)

    q, k, v = draw(K), draw(K), draw(V)
    if kind == "diagonal":
        return [q, k, v, -decay * uniform(K)]
    k = F.normalize(k, dim=-1)
    k[:, T // 4 : T // 2] = k[:, T // 4 : T // 4 + 1]  # repeated keys and β near 2: the hard case of the WY inverse
    return [q, k, v, -decay * uniform(), 2 * uniform()]


KINDS = {"diagonal": (Diagonal("gla"), gla_loop), "dense": (Dense("gated_delta_rule"), delta_loop)}
STARTS = {"none": [], "many": [0, 1, 2, 37, 63, 64, 65, 100], "edges": [64, 128]}


def starting(T, name):
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, [s for s in STARTS[name] if s < T]] = True
    starts[1, [s + 5 for s in STARTS[name] if s + 5 < T]] = True
    return starts


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 63, 150])
@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("decay", [0.0, 0.3, 9.0])
def test_outputs_state_and_gradients_equal_the_token_loop(kind, T, where, decay):
    recurrence, loop = KINDS[kind]
    starts = starting(T, where)
    xs = [x.requires_grad_() for x in inputs(kind, T, decay=decay)]
    state = torch.randn(B, H, K, V, dtype=torch.float64).requires_grad_()
    want, want_state = loop(*xs, starts=starts, state=state)
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


@pytest.mark.parametrize("kind", KINDS)
def test_no_state_is_a_zero_state(kind):
    recurrence, _ = KINDS[kind]
    xs, starts = inputs(kind, 100), starting(100, "many")
    zero = torch.zeros(B, H, K, V, dtype=torch.float64)
    close(
        [recurrence.begin(*xs, starts=starts).finish(None)], [recurrence.begin(*xs, starts=starts).finish(zero)], 1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_effects_of_three_spans_compose_to_the_effect_of_the_whole(kind):
    recurrence, _ = KINDS[kind]
    xs, starts = inputs(kind, 150), starting(150, "many")
    cuts = [0, 20, 101, 150]
    parts = [
        recurrence.begin(*(x[:, a:b] for x in xs), starts=starts[:, a:b]).effect
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    whole = recurrence.begin(*xs, starts=starts).effect
    left = recurrence.compose(recurrence.compose(parts[0], parts[1]), parts[2])
    right = recurrence.compose(parts[0], recurrence.compose(parts[1], parts[2]))
    state = torch.randn(B, H, K, V, dtype=torch.float64)
    for other in (left, right):
        assert torch.equal(other.alive, whole.alive)
        close([recurrence.act(other, state)], [recurrence.act(whole, state)], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 9.3])
def test_long_fp32_spans_stay_finite_and_accurate(kind, decay):
    """No decay and α ≈ 1e-4, where exp of a plain cumulated decay overflows after ten tokens."""
    recurrence, _ = KINDS[kind]
    wide = inputs(kind, 5000, decay=decay)
    starts = starting(5000, "none")
    narrow = [x.float().requires_grad_() for x in wide]
    got = recurrence.begin(*narrow, starts=starts).finish(None)
    close([got.double()], [recurrence.begin(*wide, starts=starts).finish(None)], 1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.sum(), narrow))
