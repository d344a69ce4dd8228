"""What is known of every rule independently of its kernel: a token loop from the paper, hard inputs, its algebra.

A rule of `models.kernels.registry` is tested by `test_recurrence.py`, and the mixers that run it by `test_mixers.py`,
once it has a line in each of the three dicts at the end.

A loop is `loop(*xs, starts=, state=, scale=) -> (outputs, last state)`: xs are [B, T, ...] as the rule's kernel takes
them, starts [B, T] bool, state as the rule's kind keeps it (None: zero), scale what multiplies q (None: K^-½).
An example is `example(T, dtype, decay, seed) -> xs`, with log decays down to -`decay` a token.
"""

import itertools

import torch
import torch.nn.functional as F

from models.recurrence import Complex, Dense, Diagonal, Elementwise, Identity, Normalised, Scalar, Stabilised

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
    """2006.16236, without the denominator: S_t = S_{t-1} + k_t v_tᵀ."""
    return run(lambda t, S: S + outer(k[:, t], v[:, t]), q, v, starts, state, scale)


def simple_gla_loop(q, k, v, g, *, starts, state=None, scale=None):
    """2307.08621 and 2405.21060: S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, g_t one number a head."""
    return run(lambda t, S: g[:, t].exp()[..., None, None] * S + outer(k[:, t], v[:, t]), q, v, starts, state, scale)


def gla_loop(q, k, v, g, *, starts, state=None, scale=None):
    """2312.06635, section 4.1: S_t = diag(α_t) S_{t-1} + k_t v_tᵀ."""
    return run(lambda t, S: g[:, t].exp()[..., None] * S + outer(k[:, t], v[:, t]), q, v, starts, state, scale)


def erase(k, beta, S):
    """(I - β k kᵀ) S."""
    return S - beta[..., None, None] * outer(k, torch.einsum("bhkv,bhk->bhv", S, k))


def delta_loop(q, k, v, beta, *, starts, state=None, scale=None):
    """2406.06484: S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ."""

    def step(t, S):
        return erase(k[:, t], beta[:, t], S) + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])

    return run(step, q, v, starts, state, scale)


def gated_delta_loop(q, k, v, g, beta, *, starts, state=None, scale=None):
    """2412.06464, section 3.1: S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ."""

    def step(t, S):
        kept = g[:, t].exp()[..., None, None] * erase(k[:, t], beta[:, t], S)
        return kept + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])

    return run(step, q, v, starts, state, scale)


def gated_delta_product_loop(q, k, v, g, beta, *, starts, state=None, scale=None):
    """2502.10297: H_t = e^g Π_j (I - β_tj k_tj k_tjᵀ) H_{t-1}, with the write β_tj k_tj v_tjᵀ after each factor."""

    def step(t, S):
        S = g[:, t].exp()[..., None, None] * S
        for j in range(k.shape[2]):
            wrote = beta[:, t, j, :, None, None] * outer(k[:, t, j], v[:, t, j])
            S = erase(k[:, t, j], beta[:, t, j], S) + wrote
        return S

    return run(step, q, v, starts, state, scale)


def kda_loop(q, k, v, g, beta, *, starts, state=None, scale=None):
    """2510.26692: S_t = (I - β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ: decay first, then erase."""

    def step(t, S):
        erased = erase(k[:, t], beta[:, t], g[:, t].exp()[..., None] * S)
        return erased + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])

    return run(step, q, v, starts, state, scale)


def gdn2_loop(q, k, v, g, b, w, *, starts, state=None, scale=None):
    """2605.22791: S_t = (I - k_t (b_t ⊙ k_t)ᵀ) diag(α_t) S_{t-1} + k_t (w_t ⊙ v_t)ᵀ."""

    def step(t, S):
        S = g[:, t].exp()[..., None] * S
        found = torch.einsum("bhkv,bhk->bhv", S, b[:, t] * k[:, t])
        return S - outer(k[:, t], found) + outer(k[:, t], w[:, t] * v[:, t])

    return run(step, q, v, starts, state, scale)


def dplr_loop(q, k, v, g, a, b, *, starts, state=None, scale=None):
    """2503.14456: S_t = (diag(w_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ, in its transpose; a reads what has not decayed."""

    def step(t, S):
        read = torch.einsum("bhkv,bhk->bhv", S, a[:, t])
        return g[:, t].exp()[..., None] * S + outer(b[:, t], read) + outer(k[:, t], v[:, t])

    return run(step, q, v, starts, state, scale)


def titans_loop(q, k, v, g, mu, beta, *, starts, state=None, scale=None):
    """2501.00663, equations 10, 12 and 13: S_t = η_t S_{t-1} - θ_t ∇ℓ(M_{t-1}; x_t), ℓ = ‖M k - v‖², M_t = (1 - α_t)
    M_{t-1} + S_t, with β = 2θ, e^g = 1 - α and e^mu = η; o_t = M_tᵀ q_t. The state is M above S."""
    state = q.new_zeros(*q.shape[:1], q.shape[2], 2 * k.shape[-1], v.shape[-1]) if state is None else state
    outs = []
    for t in range(q.shape[1]):
        M, S = torch.where(starts[:, t, None, None, None], 0.0, state).chunk(2, -2)
        error = torch.einsum("bhkv,bhk->bhv", M, k[:, t]) - v[:, t]
        S = mu[:, t].exp()[..., None, None] * S - beta[:, t, :, None, None] * outer(k[:, t], error)
        M = g[:, t].exp()[..., None, None] * M + S
        state = torch.cat((M, S), -2)
        outs.append(torch.einsum("bhkv,bhk->bhv", M, q[:, t]))
    return torch.stack(outs, 1) * (q.shape[-1] ** -0.5 if scale is None else scale), state


def elementwise_loop(u, g, *, starts, state=None, scale=None):
    """2402.19427, equation 4, with u for its input: h_t = a_t ⊙ h_{t-1} + u_t, a = e^g. Nothing is read by a query."""
    h, outs = torch.zeros_like(u[:, 0]) if state is None else state, []
    for t in range(u.shape[1]):
        h = g[:, t].exp() * torch.where(starts[:, t, None], 0.0, h) + u[:, t]
        outs.append(h)
    return torch.stack(outs, 1), h


def longhorn_loop(q, k, v, delta, *, starts, state=None, scale=None):
    """2407.14207, algorithm 1: S_t = (1 - Δ_t ⊗ k_t²) ⊙ S_{t-1} + (Δ_t ⊙ x_t) ⊗ k_t, y_t = S_t q_t · scale."""
    S, outs = torch.zeros_like(outer(v[:, 0], k[:, 0])) if state is None else state, []
    for t in range(v.shape[1]):
        S = (1 - outer(delta[:, t], k[:, t] ** 2)) * torch.where(starts[:, t, None, None], 0.0, S)
        S = S + outer(delta[:, t] * v[:, t], k[:, t])
        outs.append(torch.einsum("bdn,bn->bd", S, q[:, t]) * (q.shape[-1] ** -0.5 if scale is None else scale))
    return torch.stack(outs, 1), S


RATES = -torch.linspace(0.2, 1, H * V, dtype=torch.float64)[:, None] * torch.linspace(0.3, 1, K, dtype=torch.float64)


def mamba_loop(q, k, v, delta, A=RATES, *, starts, state=None, scale=None):
    """2312.00752, algorithm 2, with the code's B̄ = Δ B: S_t = e^{Δ_t A} ⊙ S_{t-1} + (Δ_t ⊙ x_t) ⊗ B_t, y = S_t C_t."""
    S, outs = torch.zeros_like(outer(v[:, 0], k[:, 0])) if state is None else state, []
    for t in range(v.shape[1]):
        S = torch.exp(delta[:, t, :, None] * A) * torch.where(starts[:, t, None, None], 0.0, S)
        S = S + outer(delta[:, t] * v[:, t], k[:, t])
        outs.append(torch.einsum("bdn,bn->bd", S, q[:, t]) * (q.shape[-1] ** -0.5 if scale is None else scale))
    return torch.stack(outs, 1), S


def complex_loop(u, g, turns, *, starts, state=None, scale=None):
    """2303.06349, section 3: x_t = e^{g + iθ} ⊙ x_{t-1} + u_t, in real and imaginary parts, the angle θ = 2π·turns."""
    re, im = (torch.zeros_like(u[:, 0]) if state is None else state).unbind(-1)
    outs = []
    for t in range(u.shape[1]):
        re, im = (torch.where(starts[:, t].view(-1, *(1,) * (x.dim() - 1)), 0.0, x) for x in (re, im))
        angle, size = 2 * torch.pi * turns[:, t], g[:, t].exp()
        re, im = (
            size * (angle.cos() * re - angle.sin() * im) + u[:, t, ..., 0],
            size * (angle.sin() * re + angle.cos() * im) + u[:, t, ..., 1],
        )
        outs.append(torch.stack((re, im), -1))
    return torch.stack(outs, 1), outs[-1]


def mlstm_loop(q, k, v, i, f, *, starts, state=None, scale=None):
    """2405.04517, equations 15 and 19 to 27, f a log; m is a constant to the gradient, and absent before a document.

    The state is [B, H, K·(V+1) + 2]: C with n as its last column, row by row, then m, then 1 where m is present.
    """
    K, columns = k.shape[-1], v.shape[-1] + 1
    state = q.new_zeros(*q[:, 0, :, 0].shape, K * columns + 2) if state is None else state
    C, m, present = state[..., :-2].unflatten(-1, (K, columns)), state[..., -2].detach(), state[..., -1] != 0
    outs = []
    for t in range(q.shape[1]):
        present = present & ~starts[:, t, None]
        before = torch.where(present, m, -torch.inf)
        m = torch.maximum(f[:, t] + before, i[:, t]).detach()
        row = torch.cat((v[:, t], torch.ones_like(v[:, t, :, :1])), -1)
        kept = (f[:, t] + before - m).exp()[..., None, None] * torch.where(present[..., None, None], C, 0.0)
        C, present = kept + (i[:, t] - m).exp()[..., None, None] * outer(k[:, t], row), torch.ones_like(present)
        read = torch.einsum("bhkv,bhk->bhv", C, q[:, t]) * (K**-0.5 if scale is None else scale)
        outs.append(read[..., :-1] / (torch.maximum(read[..., -1].abs(), (-m).exp()) + 1e-6)[..., None])
    return torch.stack(outs, 1), torch.cat((C.flatten(2), m[..., None], torch.ones_like(m)[..., None]), -1)


def lightnet_loop(q, k, v, *, starts, state=None, scale=None):
    """2405.21022: o_t = q_t · Σ_s softmax_s(k) v_s in every key channel, numerator and denominator summed as they are.

    The state is [B, H, K, V+2]: the quotient, the denominator's log, then 1 where a token has been seen.
    """
    state = q.new_zeros(*q[:, 0].shape, v.shape[-1] + 2) if state is None else state
    weight = torch.where(state[..., -1:] != 0, state[..., -2:-1].exp(), 0.0)
    sums, outs = torch.cat((state[..., :-2] * weight, weight), -1), []
    for t in range(q.shape[1]):
        row = torch.cat((v[:, t], torch.ones_like(v[:, t, :, :1])), -1)
        sums = torch.where(starts[:, t, None, None, None], 0.0, sums) + outer(k[:, t].exp(), row)
        S = sums[..., :-1] / sums[..., -1:]
        outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * (q.shape[-1] ** -0.5 if scale is None else scale))
    return torch.stack(outs, 1), torch.cat((S, sums[..., -1:].log(), torch.ones_like(S[..., :1])), -1)


def slstm_loop(x, R, *, positions):
    """2405.04517, equations 8 to 14, with no stabiliser: x [B, T, H, 4K] is W x + b of the gates i, f, z, o of a head,
    R [H, K, 4K] multiplies the head's last output."""
    c = n = h = x.new_zeros(*x[:, 0].shape[:-1], R.shape[1])
    outs = []
    for t in range(x.shape[1]):
        c, n, h = (torch.where(positions[:, t, None, None] == 0, 0.0, state) for state in (c, n, h))
        i, f, z, o = (x[:, t] + torch.einsum("bhk,hkj->bhj", h, R)).chunk(4, -1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outs.append(h)
    return torch.stack(outs, 1)


MUON = (4.0848, -6.8946, 2.9270, 3.9505, -6.3029, 2.6377, 3.7418, -5.5913, 2.3037, 2.8769, -3.1427, 1.2046, 2.8366,
        -3.0525, 1.2012)  # fmt: skip


def lact_loop(q, k, v, rates, mu, *first, positions, chunk):
    """2505.23884, section 3: SwiGLU weights [H, ...], read by a chunk's tokens and then updated by Muon with
    the gradient of Σ -v·f(k), token by token, and their rows' norms restored. rates [B, T, H, 3], mu [B, T, H]."""

    def apply(W, x):
        return W[1] @ (F.silu(W[0] @ x) * (W[2] @ x))

    def orthogonal(x):
        y = (x if len(x) <= len(x.T) else x.T) / (x.square().sum().sqrt() + 1e-7)
        for a, b, c in zip(MUON[::3], MUON[1::3], MUON[2::3], strict=True):
            y = a * y + b * y @ y.T @ y + c * y @ y.T @ y @ y.T @ y
        return y if len(x) <= len(x.T) else y.T

    outs = torch.zeros_like(v)
    for b, h in itertools.product(range(len(q)), range(q.shape[2])):
        for t in range(q.shape[1]):
            place = int(positions[b, t])
            if place == 0:
                W, M = [w[h] for w in first], [torch.zeros_like(w[h]) for w in first]
            if place % chunk == 0:
                G, momentum = [torch.zeros_like(w[h]) for w in first], 0.0
            at = b, t, h
            outs[at] = apply(W, q[at])
            _, pull = torch.func.vjp(lambda *W: apply(W, k[at]), *W)  # noqa: B023
            G = [g + rate * d for g, rate, d in zip(G, rates[at], pull(v[at]), strict=True)]
            momentum = momentum + mu[at]
            if place % chunk == chunk - 1:
                M = [momentum / chunk * m + g for m, g in zip(M, G, strict=True)]
                W = [w + orthogonal(m) for w, m in zip(W, M, strict=True)]
                sizes = [w[h].norm(dim=1, keepdim=True) for w in first]
                W = [w / (w.norm(dim=1, keepdim=True) + 1e-5) * size for w, size in zip(W, sizes, strict=True)]
    return outs


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


def gating(T, dtype=torch.float64, decay=1.0, seed=0):
    """Gated DeltaNet-2's: the delta rule's hard inputs, with gates of every channel; for some tokens, those of what is
    erased are 2 exactly, all together."""
    normal, uniform = draws(T, seed)
    k, erased = F.normalize(normal(K), dim=-1), 2 * uniform(K)
    k[:, T // 4 : T // 2] = k[:, T // 4 : T // 4 + 1]
    erased[:, T // 3 : T // 2] = 2.0
    xs = normal(K), k, normal(V), -decay * uniform(K), erased, uniform(V)
    return [x.to(dtype) for x in xs]


def stepping(T, dtype=torch.float64, decay=1.0, seed=0):
    """Gated DeltaProduct's, two steps a token: the delta rule's hard inputs, a token's keys nearly alike; hard for as
    many steps as there, which is half the tokens, since what β = 2 rounds is never forgotten."""
    normal, uniform = draws(T, seed)
    k = F.normalize(normal(1, K) + 0.3 * normal(2, K), dim=-1)
    k[:, T // 4 : 3 * T // 8] = k[:, T // 4 : T // 4 + 1]
    beta = 2 * uniform(2)
    beta[:, T // 3 : 5 * T // 12] = 2.0
    k, v, beta = (x.transpose(2, 3) for x in (k, normal(2, V), beta))
    return [x.to(dtype) for x in (normal(K), k, v, -decay * uniform(), beta)]


def descending(T, dtype=torch.float64, decay=1.0, seed=0):
    """Titans': keys of norm 1, a quarter of them one and the same, steps β = 2θ up to 1, once exactly. Momentum is
    halved by each token at least: undamped, random steps make it grow without end in exact arithmetic too."""
    normal, uniform = draws(T, seed)
    k, beta = F.normalize(normal(K), dim=-1), uniform()
    k[:, T // 4 : T // 2] = k[:, T // 4 : T // 4 + 1]
    beta[:, T // 3 : T // 2] = 1.0
    xs = normal(K), k, normal(V), -decay * uniform(), -0.7 - decay * uniform(), beta
    return [x.to(dtype) for x in xs]


def removing(T, dtype=torch.float64, decay=1.0, seed=0):
    """RWKV-7's: what is read along a key of norm 1, a quarter of them one and the same, is taken away by shares."""
    normal, uniform = draws(T, seed)
    away, shares = F.normalize(normal(K), dim=-1), uniform(K)
    away[:, T // 4 : T // 2] = away[:, T // 4 : T // 4 + 1]
    shares[:, T // 3 : T // 2] = 1.0
    return [x.to(dtype) for x in (normal(K), normal(K), normal(V), -decay * uniform(K), -away, away * shares)]


def flat(*shape):
    """One row of a draw per span and token, without heads."""

    def example(T, dtype=torch.float64, decay=1.0, seed=0):
        normal, uniform = draws(T, seed)
        xs = [normal(K, *shape).flatten(2, 3), -decay * uniform(K).flatten(2)]
        return [x.to(dtype) for x in (*xs, *(uniform(K).flatten(2) - 0.5 for _ in shape))]

    return example


def forgetting(T, dtype=torch.float64, decay=1.0, seed=0):
    """Longhorn's: 1 - Δ‖k‖² = e^{-decay·uniform}, a quarter of the keys along one axis, where Δk² is Δ‖k‖²."""
    normal, uniform = draws(T, seed)
    q, k, v = normal(K)[:, :, 0], normal(K)[:, :, 0], normal(V).flatten(2)
    k[:, T // 4 : T // 2] = 1.3 * F.one_hot(torch.arange(K), K)[3]
    delta = -torch.expm1(-decay * uniform(V).flatten(2)) / k.square().sum(-1, keepdim=True)
    return [x.to(dtype) for x in (q, k, v, delta)]


def selecting(T, dtype=torch.float64, decay=1.0, seed=0):
    """Mamba's: step sizes up to `decay`, by which rates of up to 1 a token are multiplied."""
    normal, uniform = draws(T, seed)
    xs = normal(K)[:, :, 0], normal(K)[:, :, 0], normal(V).flatten(2), decay * uniform(V).flatten(2)
    return [x.to(dtype) for x in xs]


def exponential(T, dtype=torch.float64, decay=1.0, seed=0):
    """mLSTM's, with input gates e^ĩ over eight orders of magnitude and, for a quarter of the tokens, below e^-90.

    Keys are positive and queries of one sign a head: near a zero of q·n, which divides, rounding the inputs to fp32
    alone moves the outputs of 8192 random tokens by 6e-4 in exact arithmetic, and no kernel could be held to 1e-4.
    """
    normal, uniform = draws(T, seed)
    q, k, i = normal(K).abs(), normal(K).abs(), 20 * uniform() - 10
    q[:, :, 1] *= -1
    i[:, T // 4 : T // 2] -= 100
    return [x.to(dtype) for x in (q, k, normal(V), i, -decay * uniform())]


def weighing(T, dtype=torch.float64, decay=1.0, seed=0):
    """LightNet's, with weights e^k of up to forty orders of magnitude, and for a quarter of the tokens of far fewer."""
    normal, _ = draws(T, seed)
    k = (1 + decay) * normal(K)
    k[:, T // 4 : T // 2] -= 30
    return [x.to(dtype) for x in (normal(K), k, normal(V))]


ORACLES = {
    "linear": linear_loop,
    "simple_gla": simple_gla_loop,
    "gla": gla_loop,
    "delta_rule": delta_loop,
    "gated_delta_rule": gated_delta_loop,
    "gated_delta_product": gated_delta_product_loop,
    "kda": kda_loop,
    "gdn2": gdn2_loop,
    "dplr": dplr_loop,
    "titans": titans_loop,
    "elementwise": elementwise_loop,
    "longhorn": longhorn_loop,
    "mamba": mamba_loop,
    "complex": complex_loop,
    "mlstm": mlstm_loop,
    "lightnet": lightnet_loop,
}

EXAMPLES = {
    "linear": additive(),
    "simple_gla": additive(()),
    "gla": additive((K,)),
    "delta_rule": erasing(),
    "gated_delta_rule": erasing(()),
    "gated_delta_product": stepping,
    "kda": erasing((K,)),
    "gdn2": gating,
    "dplr": removing,
    "titans": descending,
    "elementwise": flat(),
    "longhorn": forgetting,
    "mamba": selecting,
    "complex": flat(2),
    "mlstm": exponential,
    "lightnet": weighing,
}

KINDS = {
    "linear": Identity("linear"),
    "simple_gla": Scalar("simple_gla"),
    "gla": Diagonal("gla"),
    "delta_rule": Dense("delta_rule"),
    "gated_delta_rule": Dense("gated_delta_rule"),
    "gated_delta_product": Dense("gated_delta_product"),
    "kda": Dense("kda"),
    "gdn2": Dense("gdn2"),
    "dplr": Dense("dplr"),
    "titans": Dense("titans"),
    "elementwise": Elementwise("elementwise"),
    "longhorn": Elementwise("longhorn"),
    "mamba": Elementwise("mamba", shared=(RATES,)),
    "complex": Complex("complex"),
    "mlstm": Stabilised("mlstm"),
    "lightnet": Normalised("lightnet"),
}

# Rules that are run: `loop(*xs, *shared, positions=, ...) -> outputs`, with what else the rule's kind has.
SERIAL = {"lact": lact_loop, "slstm": slstm_loop}
