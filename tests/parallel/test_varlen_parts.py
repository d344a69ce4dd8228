"""All documents that meet a block of keys in one call, merged by logsumexps. No CPU has the kernel: its promise is kept
by a stand-in, a sequence at a time and in fp64, whose shapes are held to torch's own. All ranks of a group are in this
process: what travels between them is the matrix's (tests/parallel/test_matrix.py)."""

from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import pytest
import torch

from models.kernels import varlen, varlen_parts
from models.kernels.attention_tiles import Plain, capped, tile_for
from models.kernels.varlen_parts import TokenStretch, parts_call
from parallel.collectives import Comm
from parallel.sequence.attention import visibility
from parallel.sequence.attention.all_gather import _encounters
from parallel.sequence.attention.ring_ulysses import RowsAndColumns
from parallel.sequence.attention.visibility import Softmax, Transpose
from parallel.sequence.span_layout import SpanLayout

CALLS: list[int] = []  # sequences of each call


def _sequences(cum_q, cum_k, most_q, most_k):
    assert cum_q.dtype == cum_k.dtype == torch.int32
    a, b = cum_q.tolist(), cum_k.tolist()
    queries, keys = ([slice(*ends) for ends in zip(x, x[1:], strict=False)] for x in (a, b))
    assert most_q == max(s.stop - s.start for s in queries) and most_k == max(s.stop - s.start for s in keys)
    return zip(queries, keys, strict=True)


def _scores(q, k, causal, scale):
    """[H, n, m]; the last query stands at the last key."""
    n, m = len(q), len(k)
    scores = scale * torch.einsum("nhk,mhk->hnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    behind = torch.arange(m - n, m)[:, None] - torch.arange(m)
    return scores.masked_fill(behind < 0, -torch.inf) if causal else scores


def flash(q, k, v, cum_q, cum_k, most_q, most_k, dropout, causal, debug, *, scale):
    """As torch's operator: out [N, H, K] and logsumexp [H, N], in fp32 for 16 bits."""
    assert dropout == 0.0 and not debug
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    count = 0
    for a, b in _sequences(cum_q, cum_k, most_q, most_k):
        scores = _scores(q[a], k[b], causal, scale)
        lse[:, a] = scores.logsumexp(-1)
        values = v[b].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[a], count = torch.einsum("hnm,mhk->nhk", (scores - lse[:, a, None]).exp(), values), count + 1
    CALLS.append(count)
    return out, lse, torch.zeros(2, dtype=torch.uint64), q.new_empty(0), q.new_empty(0)


def flash_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, most_q, most_k, dropout, causal, seed, unused, *, scale
):  # fmt: skip
    """Of P = e^(s - lse), whatever softmax lse is of: dv = Pᵀ grad, ds = P (grad vᵀ - Σ grad out)."""
    assert dropout == 0.0 and lse.shape == (q.shape[1], len(q)) and seed.dtype == torch.uint64
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    for a, b in _sequences(cum_q, cum_k, most_q, most_k):
        p = (_scores(q[a], k[b], causal, scale) - lse[:, a, None]).exp()
        keys, values = (x[b].repeat_interleave(shared, dim=1) for x in (k, v))
        delta = (grad[a] * out[a]).sum(-1).T
        ds = scale * p * (torch.einsum("nhk,mhk->hnm", grad[a], values) - delta[..., None])
        dq[a] = torch.einsum("hnm,mhk->nhk", ds, keys)
        dk[b] = torch.einsum("hnm,nhk->mhk", ds, q[a]).unflatten(1, (-1, shared)).sum(2)
        dv[b] = torch.einsum("hnm,nhk->mhk", p, grad[a]).unflatten(1, (-1, shared)).sum(2)
    return dq, dk, dv


def standing_in():
    stack = ExitStack()
    for owner, name, value in (
        (varlen, "FLASH", ("cpu",)),
        (varlen, "HALF", (torch.float64,)),
        (varlen_parts, "flash", flash),
        (varlen_parts, "flash_backward", flash_backward),
    ):
        stack.enter_context(patch.object(owner, name, value))
    CALLS.clear()
    return stack


def test_the_stand_in_has_the_shapes_of_torchs_operators():
    sizes = {"q": (7, 4, 16), "k": (9, 2, 16), "v": (9, 2, 16)}
    ends = (torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32), 4, 5)
    found = {}
    for device in ("cpu", "meta"):
        q, k, v = (torch.zeros(s, device=device, dtype=torch.bfloat16) for s in sizes.values())
        where = (*(x.to(device) for x in ends[:2]), *ends[2:])
        if device == "meta":
            forward, backward = varlen_parts.flash, varlen_parts.flash_backward
        else:
            q, k, v, forward, backward = q.float(), k.float(), v.float(), flash, flash_backward
        out, lse, *_ = forward(q, k, v, *where, 0.0, True, False, scale=0.25)
        seed = torch.zeros(2, dtype=torch.uint64, device=device)
        parts = backward(out, q, k, v, out, lse, *where, 0.0, True, seed, q.new_empty(0), scale=0.25)
        assert lse.dtype == torch.float32
        found[device] = [x.shape for x in (out, lse, *parts)]
    assert found["cpu"] == found["meta"]


def test_a_call_has_stretches_without_seams():
    row, far, own = (0,), (2, 0), (1, 0)
    call = parts_call(
        [
            (TokenStretch(row, 0, 3), [TokenStretch(far, 4, 9), TokenStretch(own, 0, 3)]),
            (TokenStretch(row, 3, 5), [TokenStretch(own, 3, 5)]),
            (TokenStretch((1,), 0, 4), [TokenStretch(own, 5, 9)]),
        ],
        True,
    )
    assert call.queries == (TokenStretch(row, 0, 5), TokenStretch((1,), 0, 4))
    assert call.keys == (TokenStretch(far, 4, 9), TokenStretch(own, 0, 9)) and call.counts == ((3, 8), (2, 2), (4, 4))


WIDTH = 8
STARTS = (0, 5, 6, 30, 31, 33, 70)
SPANS = {  # of each rank
    "zigzag": (((0, 20), (60, 80)), ((20, 40), (40, 60))),
    "unequal": (((0, 3),), ((3, 64),), ((64, 65),), ((65, 80),)),
    "idle rank": (((0, 31), (34, 65)), (), ((31, 34),), ((65, 80),)),
}


@cache
def drawn(latents):
    """q, [k | v] or latents that are both, and the gradient of the outputs, of the whole sequence."""
    draw = torch.Generator().manual_seed(3)
    sizes = ((4, WIDTH), (2, WIDTH if latents else 2 * WIDTH), (4, WIDTH))
    return [torch.randn(80, *size, dtype=torch.float64, generator=draw) for size in sizes]


@cache
def whole(latents):
    """out, dq and dkv of one softmax, its mask written out."""
    q, kv, grad = drawn(latents)
    q, kv = q.clone().requires_grad_(), kv.clone().requires_grad_()
    t = torch.arange(80)
    document = torch.bucketize(t, torch.tensor(STARTS), right=True)
    seen = (document[:, None] == document) & (t[:, None] >= t)
    k, v = (x.repeat_interleave(2, dim=1) for x in ((kv, kv) if latents else kv.chunk(2, dim=-1)))
    scores = torch.einsum("nhk,mhk->hnm", q, k) * WIDTH**-0.5
    out = torch.einsum("hnm,mhk->nhk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, (q, kv), grad)]


def rows_of(x, held, longest, count):
    """A rank's spans [rows, longest, ...], padded."""
    rows = x.new_zeros((count, longest, *x.shape[1:]))
    for row, (begin, end) in zip(rows, held, strict=False):
        row[: end - begin] = x[begin:end]
    return rows


def each_rank(spans, way, latents):
    """out, dq and dkv, put together from what each rank of a group computes, and the calls of each rank."""
    q, kv, grad = drawn(latents)
    ranks, called = len(spans), []
    layouts = [SpanLayout(Comm(tuple(range(ranks)), rank), spans, STARTS) for rank in range(ranks)]
    longest, count = layouts[0].longest, layouts[0].rows
    blocks = torch.stack([rows_of(kv, held, longest, count) for held in spans])
    out, dq, dblocks = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(blocks)
    for rank, chain in enumerate(layouts):
        CALLS.clear()
        if way == "gather":
            met = [(blocks, dblocks, _encounters(chain))]
        else:
            mesh = RowsAndColumns(chain, 1)
            met = [(blocks[rank - h], dblocks[rank - h], mesh.encounters[h]) for h in range(ranks)]
        rows = [rows_of(x, spans[rank], longest, count) for x in (q, grad)]
        softmax = Softmax(rows[0], tile_for(q.device), WIDTH**-0.5)
        for block, _, encounters in met:
            softmax.meet(block, encounters)
        called.append(list(CALLS))
        transpose = Transpose(rows[0], softmax.out, softmax.lse, rows[1], tile_for(q.device), WIDTH**-0.5)
        for block, gradient, encounters in met:
            transpose.meet(block, gradient, encounters)
        for row, (begin, end) in enumerate(spans[rank]):
            out[begin:end], dq[begin:end] = softmax.out[row, : end - begin], transpose.dq[row, : end - begin]
    dkv = torch.zeros_like(kv)
    for rank, held in enumerate(spans):
        for row, (begin, end) in enumerate(held):
            dkv[begin:end] = dblocks[rank, row, : end - begin]
    return [out, dq, dkv], called


def worst(got, latents):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, whole(latents), strict=True))


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("layout", SPANS)
def test_every_rank_sees_what_one_softmax_sees(layout, way, latents):
    """By the loop over documents, and by one call: of a block that all have gathered, or of each hop's."""
    spans = SPANS[layout]
    loop, called = each_rank(spans, way, latents)
    assert worst(loop, latents) < 1e-10 and not any(called)
    with standing_in():
        got, called = each_rank(spans, way, latents)
    assert worst(got, latents) < 1e-10
    for held, calls in zip(spans, called, strict=True):
        hops = len(spans) if way == "ring" else 1
        assert len(calls) <= (hops + 1 if way == "ring" else 1), calls  # of its own block a rank may see two sorts
        assert bool(calls) == bool(held)
    assert max(max(calls, default=0) for calls in called) >= 5, "documents go together"


def keep_the_last_part():
    def merge(whole, total, part, lse):
        whole.copy_(part)
        total.copy_(lse)

    return patch.object(Softmax, "_merge", staticmethod(merge))


def let_queries_see_what_comes_after_them():
    honest = varlen_parts.forward
    return patch.object(varlen_parts, "forward", lambda call, *rest: honest(call._replace(causal=False), *rest))


def put_own_keys_first():
    honest = visibility.parts_call

    def reverse(sequences, causal):
        return honest([(asking, seen[::-1]) for asking, seen in sequences], causal)

    return patch.object(visibility, "parts_call", reverse)


@pytest.mark.parametrize(
    "way, broken",
    [
        ("ring", keep_the_last_part),
        ("gather", let_queries_see_what_comes_after_them),
        ("gather", put_own_keys_first),
    ],
)
def test_what_is_broken_is_seen(way, broken):
    with standing_in(), broken():
        assert worst(each_rank(SPANS["unequal"], way, False)[0], False) > 1e-3


def test_only_what_the_kernel_takes_goes_together():
    q = torch.zeros(1, 2, 1, WIDTH, dtype=torch.float64)
    with standing_in():
        assert visibility._together_on(q, Plain) and not visibility._together_on(q, capped(5.0))
        assert not visibility._together_on(q[..., :4], Plain) and not visibility._together_on(q.float(), Plain)
    assert not visibility._together_on(q, Plain)
