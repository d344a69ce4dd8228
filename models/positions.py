"""Rotary positions (2104.09864) and the rules that carry them past the length that the weights were trained on.

A rule says how fast each pair of channels turns, and by how much queries and keys are lengthened: `frequencies(head
dim)`. Pairs are (i, i + R/2) of the first R channels of a head, positions count within the document. Angles are fp64:
exact at any length.

Every rule is static: what a token gets depends on its place in its document alone, never on how long the document or
the batch turns out to be. So a run is the same at any layout, and keys that were rotated once stay valid. `Randomized`
draws places anew in every step of training, by what names the document at any layout: `seq.identities`.

Legend: B spans, T tokens, H heads, K head width, R rotated channels.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence as Listed
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoding import TextRows
from models.kernels.fla import WIDEST
from models.kernels.pieces import upload
from models.kernels.registry import fused
from models.precision import wide
from models.sequence import DocumentKey, Sequence


class Positions(ABC):
    """A rule by which a token's place in its document enters softmax attention."""

    @abstractmethod
    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        """Radians a token, fp64 [R/2] on the CPU, and the factor on rotated queries and on keys."""

    def reaches(self, trained: float) -> float:
        """The longest document, in tokens, that the rule is made for where plain positions were trained on `trained`;
        infinite where it names none."""
        return math.inf

    def places(self, seq: Sequence) -> Tensor:
        """The positions [B, T] that tokens are rotated by."""
        return seq.positions

    def rotation(self, seq: Sequence, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, R/2] of the angles, fp64, times the factor: what `turn` takes, once for q and k."""
        frequencies, scale = self.frequencies(head_dim)
        angle_BTR = self.places(seq).to(torch.float64).unsqueeze(-1) * upload(frequencies, seq.positions.device)
        cos_BTR, sin_BTR = angle_BTR.cos(), angle_BTR.sin()
        return (cos_BTR, sin_BTR) if scale == 1.0 else (cos_BTR * scale, sin_BTR * scale)

    def turned(self, q_BTHK: Tensor, k_BTGK: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated to their tokens' places."""
        if isinstance(seq, TextRows):
            q_BTHK, k_BTGK = self._turned_token(torch.cat((q_BTHK, k_BTGK), dim=2), seq).split(
                (q_BTHK.shape[2], k_BTGK.shape[2]), dim=2
            )
            return q_BTHK, k_BTGK
        if torch.compiler.is_compiling():  # once for all heads, and not in each of the kernels that turn them
            rotation = cast(Any, seq).rotation(self, q_BTHK.shape[-1])
        else:
            rotation = self.rotation(seq, q_BTHK.shape[-1])
        dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
        rotation = [x.to(dtype) for x in rotation]
        return turn(q_BTHK, *rotation), turn(k_BTGK, *rotation)

    def _turned_token(self, x_B1HK: Tensor, seq: TextRows) -> Tensor:
        """`turn` with as few operators as it takes; the factors are worked out once for all layers."""
        head_dim, wider = x_B1HK.shape[-1], wide(x_B1HK)

        def factors() -> tuple[Tensor, Tensor, Tensor]:
            """cos, and sin with the sign of its half, of every channel, and the channel that each is turned with."""
            cos, sin = (x.unsqueeze(2) for x in self.rotation(seq, head_dim))
            half = cos.shape[-1]
            rest = (0, head_dim - 2 * half)
            at = torch.arange(head_dim, device=wider.device)
            partner = torch.cat((at[half : 2 * half], at[:half], at[2 * half :]))
            cos = F.pad(torch.cat((cos, cos), -1), rest, value=1.0).to(wider.dtype)
            return cos, F.pad(torch.cat((-sin, sin), -1), rest).to(wider.dtype), partner

        cos, sin, partner = seq.once((type(self), *vars(self).values(), head_dim, wider.dtype), factors)
        return torch.addcmul(wider * cos, wider.index_select(-1, partner), sin).to(x_B1HK.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


class NoPE(Positions):
    """No positions: a causal mask alone tells the order (2305.19466)."""

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        return torch.empty(0, dtype=torch.float64, device="cpu"), 1.0

    def turned(self, q_BTHK: Tensor, k_BTGK: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        return q_BTHK, k_BTGK


class RoPE(Positions):
    """Rotary positions. A larger base for longer documents is adjusted base frequency (ABF, 2309.16039).

    base: the slowest pair turns by about 1 / base radians a token. fraction: share of each head's channels that are
    rotated, above 0 and up to 1; the others carry no position.
    """

    def __init__(self, *, base: float = 10_000.0, fraction: float = 1.0):
        if base <= 1:
            raise ValueError(f"base={base}: must be above 1")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: must be above 0 and at most 1")
        self.base, self.fraction = base, fraction

    def rotated(self, head_dim: int) -> int:
        """The number of a head's channels that rotate. Raises ValueError for an odd number."""
        channels = int(head_dim * self.fraction)
        if channels < 2 or channels % 2:
            raise ValueError(f"head_dim={head_dim}: must have pairs to rotate, fraction={self.fraction} is {channels}")
        return channels

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        return _frequencies(self.base, self.rotated(head_dim)), 1.0


class Interpolated(RoPE):
    """Linear interpolation: positions divided by a factor (2306.15595).

    factor: length of the documents over that of those trained on. base, fraction: as in RoPE.
    """

    def __init__(self, *, factor: float, base: float = 10_000.0, fraction: float = 1.0):
        super().__init__(base=base, fraction=fraction)
        self.factor = _factor(factor)

    def reaches(self, trained: float) -> float:
        return self.factor * trained

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        return _frequencies(self.base, self.rotated(head_dim)) / self.factor, 1.0


class NTKAware(RoPE):
    """The base raised so that the slowest pair is interpolated by the factor and the fastest not at all.

    NTK-aware interpolation, as 2309.00071 states it in its section 3.1.

    factor: length of the documents over that of those trained on. base, fraction: as in RoPE.
    """

    def __init__(self, *, factor: float, base: float = 10_000.0, fraction: float = 1.0):
        super().__init__(base=base, fraction=fraction)
        self.factor = _factor(factor)

    def reaches(self, trained: float) -> float:
        return self.factor * trained

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        channels = self.rotated(head_dim)
        if channels == 2:
            raise ValueError(f"head_dim={head_dim}: must rotate more than one pair for a base to tell them apart")
        return _frequencies(self.base * self.factor ** (channels / (channels - 2)), channels), 1.0


class YaRN(RoPE):
    """Fast pairs as trained, slow ones interpolated, a ramp between; scores sharpened (YaRN, 2309.00071).

    factor: length of the documents over that of those trained on. trained_length: the longest document that the
    weights were trained on, in tokens. beta_fast: pairs that turn at least this often in trained_length keep their
    speed. beta_slow: pairs that turn at most this often are interpolated. attention_factor: factor of queries and
    keys; null for 0.1 ln(factor) + 1. truncate: false begins and ends the ramp between pairs, as in gpt-oss. base,
    fraction: as in RoPE.

    The ramp is linear in the index of the pair, between whole numbers unless told otherwise, as in the authors' code;
    the paper writes it linear in the number of turns.
    """

    def __init__(
        self,
        *,
        factor: float,
        trained_length: int | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        truncate: bool = True,
        base: float = 10_000.0,
        fraction: float = 1.0,
    ):
        super().__init__(base=base, fraction=fraction)
        self.factor, self.trained_length = _factor(factor), _trained(trained_length)
        self.truncate = truncate
        if not beta_fast > beta_slow > 0:
            raise ValueError(f"beta_fast={beta_fast}: must be above beta_slow={beta_slow}, and that above 0")
        if attention_factor is not None and attention_factor <= 0:
            raise ValueError(f"attention_factor={attention_factor}: must be above 0")
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.attention_factor = 0.1 * math.log(factor) + 1.0 if attention_factor is None else attention_factor

    def reaches(self, trained: float) -> float:
        return self.factor * self.trained_length

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        channels = self.rotated(head_dim)

        def pair(turns: float) -> float:
            """The place on the axis of pairs of one that turns this often in trained_length."""
            return channels * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        index = torch.arange(channels // 2, dtype=torch.float64, device="cpu")
        slow = ((index - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
        trained = _frequencies(self.base, channels)
        return trained * (1 - slow) + trained / self.factor * slow, self.attention_factor


class Llama3(RoPE):
    """Llama 3.1's rule (2407.21783): as YaRN without the sharpening, the ramp in turns.

    factor: divisor of slow pairs. trained_length: the longest document that the weights were trained on, in
    tokens. low: pairs that turn fewer times than this in trained_length are interpolated. high: pairs that turn more
    often than this keep their speed. base, fraction: as in RoPE.
    """

    def __init__(
        self,
        *,
        factor: float = 8.0,
        trained_length: int | None = None,
        low: float = 1.0,
        high: float = 4.0,
        base: float = 500_000.0,
        fraction: float = 1.0,
    ):
        super().__init__(base=base, fraction=fraction)
        self.factor, self.trained_length = _factor(factor), _trained(trained_length)
        if not high > low > 0:
            raise ValueError(f"high={high}: must be above low={low}, and that above 0")
        self.low, self.high = low, high

    def reaches(self, trained: float) -> float:
        return self.factor * self.trained_length

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        trained = _frequencies(self.base, self.rotated(head_dim))
        turns = self.trained_length * trained / (2 * math.pi)
        smooth = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return trained * (smooth + (1 - smooth) / self.factor), 1.0


class LongRoPE(RoPE):
    """A divisor for every pair, found by search (LongRoPE, 2402.13753).

    trained_length: the longest document that the weights were trained on, in tokens. length: the longest document now;
    above trained_length the long divisors hold, for every document of the run, else the short ones. short_factor,
    long_factor: divisors of the pairs' speeds, one a pair, the fastest pair first. base, fraction: as in RoPE.

    Queries and keys are multiplied by √(1 + ln(length / trained_length) / ln trained_length). The paper's threshold,
    below which the first tokens of a document are not interpolated, is not here: no released model has one.
    """

    def __init__(
        self,
        *,
        length: int,
        short_factor: Listed[float],
        long_factor: Listed[float],
        trained_length: int | None = None,
        base: float = 10_000.0,
        fraction: float = 1.0,
    ):
        super().__init__(base=base, fraction=fraction)
        self.length, self.trained_length = length, _trained(trained_length)
        for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
            if not factors or min(factors) <= 0:
                raise ValueError(f"{name}={list(factors)}: must be numbers above 0, one a pair of channels")
        self.divisors = tuple(long_factor if length > self.trained_length else short_factor)
        longer = max(length / self.trained_length, 1.0)
        self.scale = math.sqrt(1 + math.log(longer) / math.log(self.trained_length))

    def reaches(self, trained: float) -> float:
        return max(self.length, self.trained_length)

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        trained = _frequencies(self.base, self.rotated(head_dim))
        if len(self.divisors) != len(trained):
            raise ValueError(f"long_factor, short_factor: must have {len(trained)} numbers, not {len(self.divisors)}")
        return trained / torch.tensor(self.divisors, dtype=torch.float64, device="cpu"), self.scale


class Truncated(RoPE):
    """Giraffe's truncated basis (2308.10882): fast pairs as trained, slow ones stopped, those between at one speed.

    high: pairs at least this fast, in radians a token, keep their speed. low: pairs at most this fast do not turn.
    middle: the speed of the pairs between. base, fraction: as in RoPE.
    """

    def __init__(self, *, high: float, low: float, middle: float, base: float = 10_000.0, fraction: float = 1.0):
        super().__init__(base=base, fraction=fraction)
        if not high > low >= 0:
            raise ValueError(f"high={high}: must be above low={low}, and that at least 0")
        if middle <= 0:
            raise ValueError(f"middle={middle}: must be above 0")
        self.high, self.low, self.middle = high, low, middle

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        trained = _frequencies(self.base, self.rotated(head_dim))
        slowed = torch.full_like(trained, self.middle).masked_fill(trained <= self.low, 0.0)
        return torch.where(trained >= self.high, trained, slowed), 1.0


class Randomized(RoPE):
    """In training, a document's positions are a sorted sample of those of a longer one (2305.16843).

    So a model meets positions far beyond the documents that it is trained on. The sample is drawn anew in every step,
    for each document; where nothing is trained, positions are as they are.

    longest: number of positions to draw from; at least the tokens of the longest document. seed: seed of the draws.
    base, fraction: as in RoPE.
    """

    def __init__(self, *, longest: int, seed: int = 0, base: float = 10_000.0, fraction: float = 1.0):
        super().__init__(base=base, fraction=fraction)
        if longest < 1:
            raise ValueError(f"longest={longest}: must be at least 1")
        self.longest, self.seed = longest, seed

    def reaches(self, trained: float) -> float:
        return self.longest

    def places(self, seq: Sequence) -> Tensor:
        if seq.identities is None:
            return seq.positions
        firsts = seq.documents[:, 0].tolist() if seq.firsts is None else seq.firsts
        rows = []
        for first, runs in zip(firsts, seq.pieces, strict=True):
            own = zip(runs, seq.identities[first : first + len(runs)], strict=True)
            rows.append([_sample(self.seed, self.longest, name)[p.past : p.past + p.end - p.begin] for p, name in own])
        return upload(torch.stack([torch.cat(row) for row in rows]), seq.positions.device)


def turn(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotates the first channels of every head, computed in at least fp32, in x's dtype. cos, sin: [B, T, R/2]."""
    half = cos_BTR.shape[-1]
    if not half:
        return x_BTHK
    wider = wide(x_BTHK)
    if x_BTHK.shape[-1] <= WIDEST and (kernel := fused("rotary", x_BTHK)) is not None:  # a row of angles a token
        rows = (x.to(wider.dtype).flatten(0, 1) for x in (cos_BTR, sin_BTR))
        return kernel(wider.flatten(0, 1).unsqueeze(0), *rows).view_as(x_BTHK).to(x_BTHK.dtype)
    cos, sin = (c.to(wider.dtype).unsqueeze(2) for c in (cos_BTR, sin_BTR))
    left, right, rest = wider.split((half, half, x_BTHK.shape[-1] - 2 * half), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1).to(x_BTHK.dtype)


def rotate(x_BTHK: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Rotates whole heads by plain rotary positions."""
    frequencies, _ = RoPE(base=base).frequencies(x_BTHK.shape[-1])
    angle_BTR = positions_BT.to(torch.float64).unsqueeze(-1) * frequencies.to(x_BTHK.device)
    return turn(x_BTHK, angle_BTR.cos(), angle_BTR.sin())


def _frequencies(base: float, channels: int) -> Tensor:
    """base^(-2i/R), fp64 [R/2], fastest first; on the CPU even where a model is built without storage."""
    half = channels // 2
    return base ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)


def _factor(factor: float) -> float:
    if factor < 1:
        raise ValueError(f"factor={factor}: must be at least 1")
    return factor


def _trained(trained_length: int | None) -> int:
    if trained_length is None or trained_length < 2:
        raise ValueError(f"trained_length={trained_length}: must be the tokens of the longest document trained on")
    return trained_length


@lru_cache(maxsize=32)  # the layers of a model ask for the same ones
def _sample(seed: int, longest: int, identity: DocumentKey) -> Tensor:
    """Draws from range(longest) as many numbers as the document has tokens, ascending: int64 [length] on the CPU."""
    if identity.length > longest:
        raise ValueError(f"longest={longest}: must be at least the {identity.length} tokens of a document")
    digest = hashlib.sha256(f"{seed}/{identity.step}/{identity.sequence}/{identity.document}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(longest, generator=generator, device="cpu")[: identity.length].sort().values
