"""Attention of all documents of all rows in one call: torch's variable-length flash attention, on CUDA in 16 bits.

A document is a sequence of its own between bounds on the query axis and on the key axis. Where some of its tokens came
before the span, it has more keys than queries, and the last query stands at the last key. A window is the kernel's own,
so that neither documents nor blocks of queries cost launches.

Legend: B rows, T tokens, S keys on the key axis, H heads, G key/value heads, K width of a head, N runs of all rows.
"""

import inspect
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.pieces import Piece, upload

FLASH = ("cuda",)  # devices of the kernel
HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # channels of a head
AMPERE = (8, 0)  # the compute capability that it begins with

Rows = tuple[tuple[Piece, ...], ...]


class Bounds(NamedTuple):
    """The places of the runs of all rows, end to end."""

    queries: Tensor  # [N + 1] int32
    keys: Tensor  # [N + 1] int32
    most_queries: int
    most_keys: int
    rows: tuple[tuple[int, int], ...]  # of each row, the [begin, end) of its keys on the key axis


@lru_cache(maxsize=16)  # the layers of a micro-step share them
def bounds(rows: Rows, offsets: tuple[int, ...], window: int | None, device: torch.device) -> Bounds:
    """rows: the runs of each row, from its first token to its last; offsets: where on the key axis a row begins."""
    queries, keys, spans, most = [0], [0], [], [0, 0]
    for runs, offset in zip(rows, offsets, strict=True):
        first = None
        for begin, end, past in runs:
            seen = past if window is None else min(past, window - 1)
            counts = (end - begin, end - begin + seen)
            queries.append(queries[-1] + counts[0])
            keys.append(keys[-1] + counts[1])
            most = [max(m, n) for m, n in zip(most, counts, strict=True)]
            first = offset + begin - seen if first is None else first
        assert first is not None
        spans.append((first, offset + runs[-1].end))
    both = upload(torch.tensor([queries, keys], dtype=torch.int32), device)
    return Bounds(both[0], both[1], most[0], most[1], tuple(spans))


def runs_on(q: Tensor, width: int) -> bool:
    """Says whether the kernel takes queries like these, of heads so wide."""
    if q.device.type not in FLASH or q.dtype not in HALF or width > WIDEST:
        return False
    return _installed() and _capable(q.device)


@cache
def _installed() -> bool:
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _capable(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE


@cache
def _takes_groups() -> bool:
    """Says whether this torch's function wants to be told of fewer key/value heads than query heads."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    rows: Rows,
    offsets: tuple[int, ...],
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """[B, T, H, K] in q's dtype; see `packed_attention.attend_pieces`."""
    from torch.nn.attention.varlen import varlen_attn

    where = bounds(rows, offsets, window, q_BTHK.device)
    k, v = (_together(x, where.rows) for x in (k_BSGK, v_BSGK))
    groups: dict[str, Any] = {"enable_gqa": True} if _takes_groups() and k.shape[1] != q_BTHK.shape[2] else {}
    out: Any = varlen_attn(
        q_BTHK.flatten(0, 1),
        k,
        v,
        where.queries,
        where.keys,
        where.most_queries,
        where.most_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **groups,
    )
    spread: Tensor = out.unflatten(0, q_BTHK.shape[:2])
    return spread


def _together(x_BSGK: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """The keys that some query sees, row after row; without a copy where that is all of them, or one row."""
    if all(span == (0, x_BSGK.shape[1]) for span in spans):
        return x_BSGK.flatten(0, 1)
    parts = [x[begin:end] for x, (begin, end) in zip(x_BSGK, spans, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
