"""All documents in one call of torch's variable-length attention, which no CPU has: its promise is kept by a stand-in
that takes what it takes, one sequence after another, and by masks written out."""

import pytest
import torch
from torch.nn.attention import varlen as of_torch

from models.kernels import varlen
from models.kernels.packed_attention import attend_pieces
from models.kernels.pieces import pieces_of
from tests.models.test_attention import K, V, assert_same, draw, oracle, packed

calls = []


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """As torch's page has it: the last query of a sequence stands at its last key, and sees `window_size[0]` before."""
    calls.append(len(cu_seq_q) - 1)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa == (query.shape[1] != key.shape[1])
    assert query.shape[2] == key.shape[2] == value.shape[2] and window_size[1] == 0
    ends, last = zip(cu_seq_q.tolist(), cu_seq_k.tolist(), strict=True), (0, 0)
    assert next(ends) == last
    outs, longest = [], (0, 0)
    for end in ends:
        (a, c), (b, d) = last, end
        longest, last = (max(longest[0], b - a), max(longest[1], d - c)), end
        q, k, v = query[a:b], key[c:d], value[c:d]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        behind = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (behind >= 0) & (behind <= (window_size[0] if window_size[0] >= 0 else len(k)))
        scores = torch.einsum("thk,shk->hts", q, k) * scale
        outs.append(torch.einsum("hts,shv->thv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    assert last == (len(query), len(key)) and longest == (max_q, max_k)
    return torch.cat(outs)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(of_torch, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "FLASH", ("cpu",))
    monkeypatch.setattr(varlen, "HALF", (torch.float64,))
    varlen.bounds.cache_clear()
    varlen._takes_groups.cache_clear()
    calls.clear()
    yield
    varlen.bounds.cache_clear()
    varlen._takes_groups.cache_clear()


@pytest.mark.parametrize("width", [K, V])
@pytest.mark.parametrize("window", [None, 1, 7, 130, 1000])
def test_one_call_equals_one_masked_softmax(stand_in, window, width):
    positions = packed()
    q, k, v = draw(positions.shape[1], width=width)
    got = attend_pieces(q, k, v, pieces_of(positions), [0, 0], window=window)
    assert calls == [8]
    assert_same(got, oracle(q, k, v, positions, window, 0), (q, k, v), 1e-10)


@pytest.mark.parametrize("cut", [1, 301, 303, 420])
@pytest.mark.parametrize("window", [None, 7, 130])
def test_a_span_that_begins_inside_a_document_sees_its_past(stand_in, window, cut):
    positions = packed()
    q, k, v = draw(positions.shape[1])
    got = attend_pieces(q[:, cut:], k, v, pieces_of(positions[:, cut:]), [cut, cut], window=window)
    assert len(calls) == 1
    assert_same(got, oracle(q, k, v, positions, window, 0)[:, cut:], (q, k, v), 1e-10)


def test_sinks_wide_heads_and_other_dtypes_go_another_way(stand_in):
    positions = packed()
    xs = draw(positions.shape[1])
    attend_pieces(*xs, pieces_of(positions), [0, 0], window=7, sinks=2)
    attend_pieces(*(x.float() for x in xs), pieces_of(positions), [0, 0])
    assert not calls and not varlen.runs_on(xs[0], varlen.WIDEST + 1)
