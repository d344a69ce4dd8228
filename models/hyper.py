"""Hyper-connections: several residual streams in the place of one (2409.19606), and their mixing held to a manifold
(mHC, 2512.24880).

The embedding is copied into n streams x_1 to x_n. Each part of a layer, its mixer and its feed-forward, has three
weights of its own a token: it reads h = Σ_i pre_i · x_i, makes y, and leaves x_i = Σ_j res_ij · x_j + post_i · y. The
model's norm reads the mean of the streams at the end, which for a norm is the paper's sum.

`static`: the three are learnt constants, pre a single stream, post ones and res the identity at first, so that a model
starts as one with a plain residual stream. `dynamic` adds to them a small learnt factor times tanh(W x_i / rms(x_i)), W
from zero. `manifold` computes them of all streams together: with z = s · W [x_1 … x_n] / rms + b it takes
pre = sigmoid(z), post = 2 sigmoid(z), and for res the matrix exp(z) with its rows and columns divided by their sums in
turn, 20 times (Sinkhorn-Knopp). Such a matrix is doubly stochastic: it enlarges nothing, however many layers follow
one another.

Every token does that by itself, along the depth: no token sees another, and no rank another rank.

Legend: S streams, B spans, T tokens, D model width, E weights a token.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from models.axes import Init, constant, declare, fan_in
from models.precision import wide

HyperMixing = Literal["manifold", "dynamic", "static"]
MOST_STREAMS = 16
ROUNDS = 20  # of Sinkhorn-Knopp, as in the paper
APART = -8.0  # where the logits of a matrix start beside its diagonal: streams hardly mix
SMALL = 0.01  # where the factors of what depends on the token start
EPS = 1e-6


class Hyper(NamedTuple):
    """The residual streams of a model: how many, and how they mix."""

    streams: int
    mixing: HyperMixing

    @classmethod
    def of(cls, streams: int | None, mixing: HyperMixing) -> "Hyper | None":
        """None for a single stream. Raises ValueError."""
        if streams is not None and not 2 <= streams <= MOST_STREAMS:
            raise ValueError(f"hyper_connections={streams}: must lie between 2 and {MOST_STREAMS}, or null for one")
        if mixing not in get_args(HyperMixing):
            raise ValueError(f"hyper_mixing={mixing}: must be one of {', '.join(get_args(HyperMixing))}")
        return None if streams is None else cls(streams, mixing)


class Mixing(NamedTuple):
    """The weights of one part on each token, fp32 or better: pre, post [..., S], res [..., S, S], whose rows are the
    streams that leave."""

    pre: Tensor
    post: Tensor
    res: Tensor


class HyperConnection(nn.Module):
    """The streams around one part of a layer. part: its number in the model, from 0.

    streams [S, B, T, D] -> what the part reads [B, T, D], and a function of the part's output [B, T, D] to the streams
    that leave, all in their dtype.
    """

    def __init__(self, dim: int, hyper: Hyper, part: int):
        super().__init__()
        n = self.streams = hyper.streams
        self.mixing = hyper.mixing
        plain = {"decay": False, "matrix": False}
        if self.mixing == "manifold":
            self.weight = declare(n * (n + 2), n * dim, axes=(None, "embed"), init=fan_in(n * dim), **plain)  # type: ignore[arg-type]
            self.scale = declare(3, axes=(None,), init=constant(SMALL), **plain)  # type: ignore[arg-type]
            self.bias = declare(n * (n + 2), axes=(None,), init=_apart(n), **plain)  # type: ignore[arg-type]
        else:
            # A row for each stream: its share in the streams that leave, in what is read, and of what was made.
            self.bias = declare(n, n + 2, axes=(None, None), init=_one_stream(part), **plain)  # type: ignore[arg-type]
        if self.mixing == "dynamic":
            self.weight = declare(n + 2, dim, axes=(None, "embed"), init=constant(0.0), **plain)  # type: ignore[arg-type]
            self.scale = declare(2, axes=(None,), init=constant(SMALL), **plain)  # type: ignore[arg-type]

    def forward(self, x_SBTD: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        pre, post, res = (each.to(x_SBTD.dtype) for each in self.weights(x_SBTD))

        def leave(y_BTD: Tensor) -> Tensor:
            mixed_SBTD = torch.einsum("...ij,j...d->i...d", res, x_SBTD)
            return mixed_SBTD + post.movedim(-1, 0).unsqueeze(-1) * y_BTD

        return torch.einsum("...s,s...d->...d", pre, x_SBTD), leave

    def weights(self, x_SBTD: Tensor) -> Mixing:
        """The three weights of each token."""
        n = self.streams
        if self.mixing == "manifold":
            pre, post, res = self._logits(x_SBTD).split((n, n, n * n), dim=-1)
            return Mixing(pre.sigmoid(), 2 * post.sigmoid(), doubly_stochastic(res.unflatten(-1, (n, n))))
        static = wide(self.bias)
        if self.mixing == "dynamic":
            scales = wide(self.scale)
            moved = torch.tanh(_over_rms(x_SBTD @ self.weight.to(x_SBTD.dtype).T, x_SBTD, (-1,)))
            static = static + torch.cat((scales[:1].expand(n + 1), scales[1:])) * moved.movedim(0, -2)
        else:
            static = static.expand(*x_SBTD.shape[1:-1], n, n + 2)
        return Mixing(static[..., n], static[..., n + 1], static[..., :n].transpose(-1, -2))

    def _logits(self, x_SBTD: Tensor) -> Tensor:
        n = self.streams
        parts = self.weight.to(x_SBTD.dtype).unflatten(-1, (n, -1))
        logits = _over_rms(torch.einsum("s...d,esd->...e", x_SBTD, parts), x_SBTD, (0, -1))
        scales = wide(self.scale).repeat_interleave(
            torch.tensor((n, n, n * n), device=x_SBTD.device), output_size=n * (n + 2)
        )
        return logits * scales + wide(self.bias)


def _over_rms(product: Tensor, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A linear function of x, divided by the root of the mean square of x over these dimensions, fp32 or better."""
    squares = torch.linalg.vector_norm(x, dim=dims, dtype=wide(x.new_empty(0)).dtype).square()
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return wide(product) * (squares / count + EPS).rsqrt().unsqueeze(-1)


def doubly_stochastic(logits: Tensor) -> Tensor:
    """exp of logits [..., n, n], its columns and then its rows divided by their sums, `ROUNDS` times."""
    log = logits
    for _ in range(ROUNDS):
        log = log - log.logsumexp(-2, keepdim=True)
        log = log - log.logsumexp(-1, keepdim=True)
    return log.exp()


def _apart(n: int) -> Init:
    """Logits by which a part reads the mean of the streams, writes to each, and hardly mixes them."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        pre = torch.full((n,), -torch.tensor(float(n - 1)).log().item())
        return torch.cat((pre, torch.zeros(n), (APART * (1 - torch.eye(n))).flatten()))

    return init


def _one_stream(part: int) -> Init:
    """The residual stream of a plain model: a part reads one stream, the parts in turn, and writes to each."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        n = shape[0]
        read = torch.eye(n)[part % n].unsqueeze(1)
        return torch.cat((torch.eye(n), read, torch.ones(n, 1)), dim=1)

    return init
