"""A sequence in spans in time has the loss and the gradients of the whole, on one rank and on several."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from models.block import Block
from models.ffn import SwiGLU
from models.kv_cache import KVCache
from models.lm import LM
from models.mixers import MIXERS
from models.sequence import DocumentSums
from parallel.schedule import time_spans
from parallel.schedule.plan import Group, MicroStep
from parallel.schedule.static import Static
from parallel.sequence import TRANSPORTS
from tests import parity
from tests.parity import Sample, assert_close, spread, truth
from train import time_spans as spans_of
from train.time_spans import Borders, Spans, SpansTold

pytestmark = pytest.mark.dist

BATCH = [Sample((40, 24, 1, 1, 2, 60)), Sample((150, 3), seed=1, masked=(60, 133))]
ATTENTION = {
    "all": {},
    "window": {"window": 9},
    "window over spans": {"window": 50},
    "window and sinks": {"window": 9, "sinks": 3},
    "window over spans and sinks": {"window": 50, "sinks": 3},
}
ACROSS = ("window over spans and sinks",)  # that every run of the tests takes over ranks


def in_spans(spans, batch, *, sequence=1, data=1, per_rank=None, **options):
    """Loss and gradients of an executor that takes spans in time, `batch` in one micro-step where the ranks hold it."""
    lengths = [len(s.tokens) for s in batch]
    plan = Static(tokens_per_rank=per_rank).plan(0, lengths, data=data, sequence=sequence)
    return spread(batch, plan, "fp64", spans=spans, **options)


def each(several, batch, **options):
    """Of one world: for each of `several`, its own options on top of those for all."""
    found = []
    for one in several:
        chosen = {**options, **one}
        if name := chosen.pop("transport", None):
            chosen["recurrence"] = TRANSPORTS["recurrence"][name]()
        found.append(in_spans(chosen.pop("spans"), batch, **chosen))
    return found


@pytest.mark.parametrize(
    "attention",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "window")) for n in ATTENTION],
)
def test_exact_spans_on_one_rank_are_the_whole(run, attention):
    options = ATTENTION[attention]
    want = truth(BATCH, "fp64", options)
    several = [{"spans": Spans(17)}, {"spans": Spans(64), "remat": "full"}, {"spans": Spans(150)}]
    for got in run(1, each, several, BATCH, attention=options)[0]:
        assert_close(got, want, "fp64")


def test_a_span_may_be_shorter_than_the_convolution(run):
    batch = [Sample((6, 1, 1, 7))]
    (got,) = run(1, each, [{"spans": Spans(2)}, {"spans": Spans(1)}], batch, attention={"window": 5})
    for each_of in got:
        assert_close(each_of, truth(batch, "fp64", {"window": 5}), "fp64")


@pytest.mark.parametrize(
    "attention", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ACROSS)) for n in ATTENTION]
)
def test_exact_spans_over_several_ranks_are_the_whole(run, attention):
    options = ATTENTION[attention]
    want = truth(BATCH, "fp64", options)
    several = [{"spans": Spans(40)}, {"spans": Spans(13), "transport": "relay", "remat": "full"}]
    for rank in run(2, each, several, BATCH, attention=options, sequence=2):
        for got in rank:
            assert_close(got, want, "fp64")


def test_groups_of_unequal_work_wait_for_each_other(run):
    """One group has a sequence of fewer tokens than the other takes spans, and then none at all."""
    batch = [Sample((30, 20)), Sample((1, 1)), Sample((40,))]
    want = truth(batch, "fp64")
    for got in run(2, in_spans, Spans(13), batch, data=2, per_rank=50):
        assert_close(got, want, "fp64")


MIXERS_TRIED = {
    **dict.fromkeys(("gated_deltaproduct", "kda", "lightnet", "mamba2", "mamba3", "mlstm"), {"heads": 2}),
    **dict.fromkeys(("rglru", "rwkv6", "rwkv7", "slstm", "titans"), {"heads": 2}),
    "dsa": {"heads": 2, "top_k": 6, "index_dim": 8},
    "lact": {"heads": 2, "chunk": 16},
    "lru": {},
    "mamba": {},
    "mom": {"heads": 2, "memories": 2, "top_k": 1},
}


MODELS = 3
PACKED = [Sample((30, 11, 2, 1, 37))]


def several_mixers(number):
    """A layer for each; the mixers are dealt out to the models."""
    dealt = [name for i, name in enumerate(MIXERS_TRIED) if i % MODELS == number]
    blocks = {
        name: partial(Block, mixer=partial(MIXERS[name], **MIXERS_TRIED[name]), ffn=partial(SwiGLU, hidden=24))
        for name in dealt
    }
    return LM(vocabulary=parity.VOCABULARY, dim=16, layers=len(dealt), pattern=dealt, blocks=blocks)


def every_model(sequence):
    return [
        in_spans(Spans(12), PACKED, sequence=sequence, build=partial(several_mixers, number))
        for number in range(MODELS)
    ]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_kind_of_state_passes_from_span_to_span(run, ranks):
    wanted = [truth(PACKED, "fp64", build=partial(several_mixers, number)) for number in range(MODELS)]
    for found in run(ranks, every_model, ranks):
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want, "fp64")


def test_truncated_spans_have_the_loss_and_at_documents_borders_the_gradients(run):
    batch = [Sample((32, 32, 32, 32)), Sample((100, 28))]
    for sample, exact in ((batch[0], True), (batch[1], False)):
        want = truth([sample], "fp64", build=dense)
        (got,) = run(1, in_spans, Spans(32, "truncated"), [sample], build=dense)
        found = parity.differences(got, want)
        assert found.pop("loss") < 1e-10
        assert (max(found.values()) < 1e-10) == exact, "a gradient that crosses a border is cut off"


def dense():
    """No mixture of experts: its sums over documents are of what has been read when they are cut off."""
    mixers = {"gdn": partial(MIXERS["gated_deltanet"], heads=2), "attn": partial(MIXERS["attention"], heads=2)}
    blocks = {n: partial(Block, mixer=m, ffn=partial(SwiGLU, hidden=24)) for n, m in mixers.items()}
    return LM(vocabulary=parity.VOCABULARY, dim=16, layers=2, pattern=["gdn", "attn"], blocks=blocks)


def test_what_a_span_leaves_needs_its_gradient(run):
    """The mechanism, broken on purpose."""
    (got,) = run(1, forgetting, Spans(64), BATCH)
    assert max(parity.differences(got, truth(BATCH, "fp64")).values()) > 1e-6


def forgetting(*args):
    honest = spans_of._gradient
    spans_of._gradient = lambda x: torch.zeros_like(x) if isinstance(x, torch.Tensor) else honest(x)
    return in_spans(*args)


def test_borders_hold_keys_once():
    T, spans = 8, 6
    borders, past = Borders(on_host=False), KVCache(torch.zeros(1, 0, 1, 3), torch.zeros(1, 0, 1, 3))
    whole = torch.randn(1, T * spans, 1, 3)
    for i in range(spans):
        past = past.joined(whole[:, i * T : (i + 1) * T], 2 * whole[:, i * T : (i + 1) * T])
        if i == 3:  # a document began in here: of what came before, nothing is needed
            past = KVCache(past.k[:, -3:], past.v[:, -3:])
        borders.add({"layer": past}, T)
        got = borders.entering(i)["layer"]
        assert torch.equal(got.k, past.k) and torch.equal(got.v, past.v) and got.k.requires_grad
    held = [x.value.numel() for kept in borders.kept for x in tree_leaves(kept) if hasattr(x, "value")]
    assert sum(held) == 2 * 3 * (5 * T + 3)


def test_spans_cut_groups_into_as_many_parts_and_repeat_no_token():
    micro = MicroStep((Group((0, 1), (0, 1), (((0, 11),), ((11, 22),))), Group((2, 3), (2,), (((0, 2),), ((2, 3),)))))
    lengths = (12, 10, 3)
    assert time_spans.count(micro, lengths, 4) == 3
    for group in micro.groups:
        held = [span for part in time_spans.in_time(group, lengths, 3) for rank in part.spans for span in rank]
        assert held[0][0] == 0 and held[-1][1] == sum(lengths[s] for s in group.sequences)
        assert all(a[1] == b[0] for a, b in zip(held, held[1:], strict=False))
    first, *rest = time_spans.in_time(micro.groups[1], lengths, 3)
    assert not any(first.spans) and all(rest[-1].spans), "who has less to do begins later"


def test_a_sum_with_a_gradient_is_refused():
    with pytest.raises(NotImplementedError, match="per-document sum with a gradient"):
        DocumentSums()(lambda: torch.ones(2, requires_grad=True))


def test_a_long_step_says_how_far_it_is(monkeypatch):
    said, clock = [], iter([100.0, 110.0, 140.0, 150.0, 175.0])
    monkeypatch.setattr("train.time_spans.time.monotonic", lambda: next(clock))
    told = SpansTold(said.append)
    for done in range(1, 6):
        told(done, 9)
    assert said == [
        "33% of a step of many spans, 40 s; some 120 s to go",
        "56% of a step of many spans, 75 s; some 75 s to go",
    ]
