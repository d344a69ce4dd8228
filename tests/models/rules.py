"""What is known of every rule independently of its kernel: a token loop from the paper, hard inputs, its algebra.

A rule of `models.kernels.registry` is tested by `test_recurrence.py`, and the mixers that run it by `test_mixers.py`,
once it has a line in each of the three dicts at the end.

A loop is `loop(*xs, starts=, state=, scale=) -> (outputs, last state)`: xs are [B, T, ...] as the rule's kernel takes
them, starts [B, T] bool, state as the rule's kind keeps it (None: zero), scale what multiplies q (None: K^-½).
An example is `example(T, dtype, decay, seed) -> xs`, with log decays down to -`decay` a token.
"""

import torch
import torch.nn.functional as F

from models.recurrence import Dense, Diagonal, Identity, Scalar

B, H, K, V = 2, 2, 8, 6


def run(step, q, v, starts, state, scale):
    """The loop over tokens: S_t = step(t, S_{t-1}), o_t = S_tᵀ q_t · scale."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if state is None else state
    outs = []
    for t in range(q.shape[1]):
        state = step(t, torch.where(starts[:, t, None, None, None], 0.0, state))
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1) * (q.shape[-1] ** -0.5 if scale is None else scale), state


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


def linear_loop(q, k, v, *, starts, state=None, scale=None):
    """2006.16236, equations 18 to 20 without the denominator: S_t = S_{t-1} + k_t v_tᵀ."""
    return run(lambda t, S: S + outer(k[:, t], v[:, t]), q, v, starts, state, scale)


def simple_gla_loop(q, k, v, g, *, starts, state=None, scale=None):
    """2307.08621, section 2, and 2405.21060: S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, g_t one number a head."""
    return run(lambda t, S: g[:, t].exp()[..., None, None] * S + outer(k[:, t], v[:, t]), q, v, starts, state, scale)


def gla_loop(q, k, v, g, *, starts, state=None, scale=None):
    """2312.06635, section 4.1: S_t = diag(α_t) S_{t-1} + k_t v_tᵀ."""
    return run(lambda t, S: g[:, t].exp()[..., None] * S + outer(k[:, t], v[:, t]), q, v, starts, state, scale)


def erase(k, beta, S):
    """(I - β k kᵀ) S."""
    return S - beta[..., None, None] * outer(k, torch.einsum("bhkv,bhk->bhv", S, k))


def delta_loop(q, k, v, beta, *, starts, state=None, scale=None):
    """2406.06484, section 2.2: S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ."""

    def step(t, S):
        return erase(k[:, t], beta[:, t], S) + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])

    return run(step, q, v, starts, state, scale)


def gated_delta_loop(q, k, v, g, beta, *, starts, state=None, scale=None):
    """2412.06464, section 3.1: S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ."""

    def step(t, S):
        kept = g[:, t].exp()[..., None, None] * erase(k[:, t], beta[:, t], S)
        return kept + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])

    return run(step, q, v, starts, state, scale)


def kda_loop(q, k, v, g, beta, *, starts, state=None, scale=None):
    """2510.26692, section 3: S_t = (I - β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ: decay first, then erase."""

    def step(t, S):
        erased = erase(k[:, t], beta[:, t], g[:, t].exp()[..., None] * S)
        return erased + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])

    return run(step, q, v, starts, state, scale)


def draws(T, seed):
    """Normal and uniform numbers [B, T, H, ...] in fp64, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(B, T, H, *shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(B, T, H, *shape, generator=generator, dtype=torch.float64)

    return normal, uniform


def additive(*gate):
    """q, k, v and, where `gate` gives its trailing shape, a log decay."""

    def example(T, dtype=torch.float64, decay=1.0, seed=0):
        normal, uniform = draws(T, seed)
        xs = [normal(K), normal(K), normal(V), *(-decay * uniform(*shape) for shape in gate)]
        return [x.to(dtype) for x in xs]

    return example


def erasing(*gate):
    """The same with keys of norm 1, a quarter of them one and the same, and β up to 2, once exactly: where the inverse
    of the WY form is worst conditioned."""

    def example(T, dtype=torch.float64, decay=1.0, seed=0):
        normal, uniform = draws(T, seed)
        q, k, v, beta = normal(K), F.normalize(normal(K), dim=-1), normal(V), 2 * uniform()
        k[:, T // 4 : T // 2] = k[:, T // 4 : T // 4 + 1]
        beta[:, T // 3 : T // 2] = 2.0
        return [x.to(dtype) for x in (q, k, v, *(-decay * uniform(*shape) for shape in gate), beta)]

    return example


ORACLES = {
    "linear": linear_loop,
    "simple_gla": simple_gla_loop,
    "gla": gla_loop,
    "delta_rule": delta_loop,
    "gated_delta_rule": gated_delta_loop,
    "kda": kda_loop,
}

EXAMPLES = {
    "linear": additive(),
    "simple_gla": additive(()),
    "gla": additive((K,)),
    "delta_rule": erasing(),
    "gated_delta_rule": erasing(()),
    "kda": erasing((K,)),
}

KINDS = {
    "linear": Identity("linear"),
    "simple_gla": Scalar("simple_gla"),
    "gla": Diagonal("gla"),
    "delta_rule": Dense("delta_rule"),
    "gated_delta_rule": Dense("gated_delta_rule"),
    "kda": Dense("kda"),
}
