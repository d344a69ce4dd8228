"""Attention to selected keys across ranks, and the loss by which its index learns: one process is the truth."""

from functools import partial

import pytest
import torch

from models.axes import initialise
from models.kernels import indexed_attention
from models.kernels.indexed_attention import select
from models.sequence import Whole
from parallel.mesh import Groups
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from tests import mutations
from tests.parallel.test_parity import BATCH, unequal_pair
from tests.parity import BALANCE, assert_close, counted, mixer_model, spread, truth
from train.execute import Executor
from train.loss import sums

OPTIONS = {"heads": 4, "kv_heads": 2, "head_dim": 4, "top_k": 6, "index_heads": 3, "index_dim": 8}
BUILDS = {stage: partial(mixer_model, "dsa", layers=2, stage=stage, **OPTIONS) for stage in ("sparse", "dense")}


def index_loss(model) -> float:
    """One process, a document at a time: Σ over tokens and layers."""
    total = 0.0
    for s in BATCH:
        real, positions = (torch.from_numpy(x[s.counted]) for x in (s.tokens, s.positions))
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(real)]
        for begin, end in zip(begins, begins[1:], strict=False):
            output = model(real[None, begin:end], Whole.of(torch.arange(end - begin)[None]))
            total += output.index_loss.item()
    return total


def several(plan):
    """Of each stage: loss and gradients, and the index's loss a token of all ranks."""
    found = {}
    for stage, build in BUILDS.items():
        groups, model = Groups(), initialise(build().double(), seed=1)
        model.compute = torch.float64
        tally = Executor(model, groups, torch.device("cpu"), GatherEffects(), GatherKeys(), BALANCE).train(plan, BATCH)
        loss = groups.world_comm.all_reduce(tally.index_loss.double().view(1), purpose="loss").item() / counted(BATCH)
        found[stage] = spread(BATCH, plan, "fp64", build=build), loss
    return found


def broken(plan):
    mutations.select_no_key_of_an_earlier_span()
    return spread(BATCH, plan, "fp64", build=BUILDS["sparse"])


@pytest.mark.dist
def test_losses_and_gradients_of_both_stages_are_those_of_one_process(run):
    plan = unequal_pair()
    want = {stage: truth(BATCH, "fp64", build=build) for stage, build in BUILDS.items()}
    alone = {}
    for stage, build in BUILDS.items():
        model = initialise(build().double(), seed=1)
        model.compute = torch.float64
        alone[stage] = index_loss(model) / counted(BATCH)
    assert all(any(g.any() for name, g in want[s][1].items() if "index" in name) for s in BUILDS)
    for found in run(2, several, plan):
        for stage in BUILDS:
            assert_close(found[stage][0], want[stage], "fp64")
            assert abs(found[stage][1] - alone[stage]) <= 1e-10 * alone[stage]


@pytest.mark.dist
def test_a_selection_from_the_own_span_alone_is_caught(run):
    want = truth(BATCH, "fp64", build=BUILDS["sparse"])
    for got in run(2, broken, unequal_pair()):
        with pytest.raises(AssertionError):
            assert_close(got, want, "fp64")


def by_sorting(scores, seen, count):
    rows = []
    for score, visible in zip(scores.flatten(0, 1).tolist(), seen.flatten(0, 1).tolist(), strict=True):
        best = sorted((s for s, there in enumerate(visible) if there), key=lambda s: (-score[s], -s))  # noqa: B023
        rows.append(set(best[:count]))
    return rows


def compared(choose):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (2, 30, 40), generator=generator).double()  # most of them equal others
    seen = torch.arange(40) <= torch.arange(5, 35)[:, None]
    seen = (seen & (torch.arange(40) >= torch.arange(30)[:, None] // 3)).expand(2, -1, -1)
    places = choose(scores, seen, 7)
    assert (places.diff(dim=-1) > 0).all(), "in order, each once"
    for row, visible, want in zip(places.flatten(0, 1), seen.flatten(0, 1), by_sorting(scores, seen, 7), strict=True):
        assert {int(s) for s in row if visible[s]} == want


def test_the_nearer_of_equal_keys_is_selected():
    compared(select)
    with pytest.raises(AssertionError):
        compared(lambda scores, seen, count: 39 - select(scores.flip(-1), seen.flip(-1), count).flip(-1))


def test_some_queries_at_a_time_are_all_of_them(monkeypatch):
    """Computed again for the backward pass, as long sequences are."""

    def results():
        model = initialise(BUILDS["sparse"]().double(), seed=1)
        model.compute = torch.float64
        s = BATCH[0]
        tokens, targets, positions = (torch.from_numpy(x)[None] for x in (s.tokens, s.targets, s.positions))
        part = sums(model(tokens, Whole.of(positions)), targets)
        part.cross_entropy.backward()
        return part.index_loss, *(p.grad for p in model.parameters())

    whole = results()
    monkeypatch.setattr(indexed_attention, "NUMBERS", 3000)
    for got, want in zip(results(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
