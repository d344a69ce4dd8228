"""Costs from shapes against the bytes that `comm_volume` counts for a plan, at lengths that were not looked at."""

import pytest

from parallel.schedule import comm_volume
from parallel.schedule.adaptive.cost import Cluster, Costs, Wire
from parallel.schedule.adaptive.packing import Packing, Share
from parallel.schedule.adaptive.shapes import Pairs, Shapes, fitting, model_of
from parallel.schedule.comm_volume import AttendCall, Halo, How, ScanCall

ASKS = [
    *[ScanCall("linear", decay=4, state=4 * 32 * 32, extent=32, itemsize=4)] * 3,
    *[Halo(3, 128, 2)] * 3,
    AttendCall(8, 4, 32, 32, 2),
    AttendCall(8, 4, 32, 32, 2, window=512),
]
SHAPES = Shapes("m", 6e6, (Pairs(1, 512.0), Pairs(1, 512.0, 512)), 1e6, 1000.0, again=2e6, kept_again=250.0)


@pytest.mark.parametrize("recurrence", ["gather", "relay", "allscan"])
@pytest.mark.parametrize("attention", ["gather", "ring", "ulysses"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("spans", "layout"), [(1, "contiguous"), (2, "zigzag")])
def test_traffic_is_what_a_plan_sends(recurrence, attention, size, spans, layout):
    how, tokens = How(recurrence, attention), 3 * 4096 * size
    model = model_of(SHAPES, ASKS, how, [1, 2, 4], rate=1e9, launch=0.0, spans=spans)
    plan = Packing(((Share(0, size, (0,)),),)).plan(0, [tokens], size, layout=layout)
    received = comm_volume.of_plan(plan, [[0]], ASKS, how)[size // 2]
    expected = model.layers[-1].messages(size)
    assert expected.fixed + tokens * expected.token == pytest.approx(sum(received.bytes.values()), rel=1e-9)
    assert expected.calls == sum(received.calls.values())


def test_seconds_and_recomputation_from_flops():
    model = model_of(SHAPES, ASKS, How(), [1, 2], rate=1e9, launch=0.5)
    costs = Costs(model, Cluster("c", 2, 1e9, {1: Wire(1e9, 1e-5)}))
    full, window = 1000 * 1000 / 2, 512 * 512 / 2 + 488 * 512
    assert costs.group([1000], 0, 1).sum() == pytest.approx((6e6 * 1000 + 3 * 512 * (full + window)) / 1e9)
    again = (8e6 * 1000 + 4 * 512 * (full + window)) / 1e9
    assert costs.group([1000], 0, 1, costs.names.index("full")).sum() == pytest.approx(again)
    assert costs.rank_tokens[1, 0] == pytest.approx(4 * costs.rank_tokens[0, 0])
    # states do not grow with the length, gathered keys do
    assert costs.sending(2).sum() > 0 and costs.fixed(2).sum() > 0


def test_heads_limit_ulysses_and_nothing_else():
    assert fitting(ASKS, How(attention="ulysses"), [1, 2, 4, 8, 16]) == [1, 2, 4, 8]
    assert fitting(ASKS, How(attention="ring"), [1, 2, 4, 8, 16]) == [1, 2, 4, 8, 16]
