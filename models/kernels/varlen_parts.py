"""Parts of a softmax by variable-length flash attention: all documents that meet a block of keys, in one call.

A part has queries end to end and, for each stretch of them that no document's start cuts, the keys that they see. Its
logsumexps come with it, so that parts of the same queries can be merged. Its backward is given out and lse of the whole
softmax, as that of `models.kernels.attention_tiles`, and the gradients of the parts then add up. They come in 16 bits.

These are torch's operators for CUDA (FlashAttention-2, 2307.08691). No GPU has run them from here: what they promise is
held by a stand-in (tests/parallel/test_varlen_parts.py) and by torch's own shapes of them.

Legend: R rows, T tokens, N queries and M keys of a call, H heads, G key/value heads, K width of a head.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels import varlen
from models.kernels.pieces import upload

MULTIPLE = 8  # of which the kernel wants the width of a head to be

flash = torch.ops.aten._flash_attention_forward
flash_backward = torch.ops.aten._flash_attention_backward


class TokenStretch(NamedTuple):
    """Tokens [begin, end) of what `at` indexes: of a row of queries, or of a span of keys."""

    at: tuple[int, ...]
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


class PartsCall(NamedTuple):
    """Queries and keys of one call, end to end, and how many of both each of its sequences has. No query is in two.

    causal: the last query of a sequence stands at its last key, and each sees the keys up to itself.
    """

    queries: tuple[TokenStretch, ...]
    keys: tuple[TokenStretch, ...]
    counts: tuple[tuple[int, int], ...]
    causal: bool


class Ends(NamedTuple):
    """The ends of the sequences of a call."""

    queries: Tensor  # [sequences + 1] int32
    keys: Tensor
    most_queries: int
    most_keys: int


def parts_call(sequences: Iterable[tuple[TokenStretch, list[TokenStretch]]], causal: bool) -> PartsCall:
    """The call of these sequences: queries, and the stretches of keys that they see, in order."""
    queries, keys, counts = [], [], []
    for asking, seen in sequences:
        queries.append(asking)
        keys += seen
        counts.append((asking.length, sum(stretch.length for stretch in seen)))
    return PartsCall(_joined(queries), _joined(keys), tuple(counts), causal)


def _joined(stretches: list[TokenStretch]) -> tuple[TokenStretch, ...]:
    """The same tokens in the same order, without a seam where one stretch begins as the one before it ends."""
    found: list[TokenStretch] = []
    for stretch in stretches:
        if found and found[-1].at == stretch.at and found[-1].end == stretch.begin:
            found[-1] = found[-1]._replace(end=stretch.end)
        else:
            found.append(stretch)
    return tuple(found)


@lru_cache(maxsize=64)  # the layers of a micro-step share them
def _ends(counts: tuple[tuple[int, int], ...], device: torch.device) -> Ends:
    sums: list[list[int]] = [[0], [0]]
    for count in counts:
        for ends, n in zip(sums, count, strict=True):
            ends.append(ends[-1] + n)
    both = upload(torch.tensor(sums, dtype=torch.int32), device)
    return Ends(both[0], both[1], max(n for n, _ in counts), max(m for _, m in counts))


def runs_on(q: Tensor) -> bool:
    """Says whether the kernel takes queries like these, [..., K]."""
    return q.shape[-1] % MULTIPLE == 0 and varlen.runs_on(q, q.shape[-1])


def cut(x: Tensor, stretches: tuple[TokenStretch, ...]) -> Tensor:
    """The tokens of stretches of x [..., T, H, K], end to end [N, H, K]; a view where it is one stretch."""
    parts = [x[stretch.at][stretch.begin : stretch.end] for stretch in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def forward(call: PartsCall, q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [N, H, K] in q's dtype, and the logsumexps [H, N] in fp32."""
    ends = _ends(call.counts, q_NHK.device)
    out, lse, *_ = flash(q_NHK, k_MGK, v_MGK, *ends, 0.0, call.causal, False, scale=scale)
    return out, lse


def backward(
    call: PartsCall,
    grad_NHK: Tensor,
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    out_NHK: Tensor,
    lse_HN: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's gradients of q, k and v in their dtypes, from out, its gradient and lse of the whole softmax."""
    seed, unused = (q_NHK.new_zeros(n, dtype=dtype) for n, dtype in ((2, torch.uint64), (0, q_NHK.dtype)))
    ends = _ends(call.counts, q_NHK.device)
    dq, dk, dv = flash_backward(
        grad_NHK, q_NHK, k_MGK, v_MGK, out_NHK, lse_HN, *ends, 0.0, call.causal, seed, unused, scale=scale
    )
    return dq, dk, dv
