"""The sides of a proof, and the comparison: each alone, without a process."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from launch.config.compose import composed
from launch.verify.shrink import shrink
from models.axes import declarations, initialise
from train.optim.build import build_optimizer, set_rate
from train.verify import EdgeCases, alone
from train.verify.trace import FACTOR, GRADIENT, OUTPUT, SCALAR, WEIGHT, Part, Place, RankTrace, allowed, compare


def test_documents_have_every_edge_and_packing_keeps_each_token():
    """Documents on a border of spans, one before and one behind, of one token; padding; a sequence without targets on
    its first half; the sum of all is what is packed."""
    cases = EdgeCases(vocabulary=9, length=48, sequences=5, pieces=4)
    batches = cases.open(0, None)
    for step in (0, 1):
        packed, alone_ = batches.batch(3, step), batches.documents(3, step)
        assert [len(s.tokens) for s in packed] == batches.lengths(step)
        for s, documents in zip(packed, alone_, strict=True):
            real = np.concatenate([d.tokens for d in documents])
            assert (s.tokens[: s.num_tokens] == real).all() and len(real) == s.num_tokens
            assert (s.targets[: s.num_tokens] == np.concatenate([d.targets for d in documents])).all()
            assert (
                np.flatnonzero(s.starts)[: len(documents)]
                == np.cumsum([0, *map(len, (d.tokens for d in documents))])[:-1]
            ).all()
            assert all(d.targets[-1] == -100 for d in documents)
    first = batches.batch(3, 0)
    assert {0, 12, 13, 23, 37, 46} == set(np.flatnonzero(first[3].starts).tolist())
    assert first[0].padding == 3 and (first[1].targets[:24] == -100).all() and first[2].num_targets > 24
    for seed in range(3):  # the token before the border of two ranks that share all sequences predicts the one behind
        middle = np.concatenate([s.targets for s in batches.batch(seed, 0)])[5 * 48 // 2 - 1]
        assert middle >= 0
    assert len(set(batches.lengths(1))) > 2 and min(batches.lengths(1)) == 5
    equal = EdgeCases(vocabulary=9, length=48, sequences=2, pieces=4, equal=True).open(0, None)
    assert equal.lengths(1) == [48, 48]


def small(*overrides):
    return shrink(composed(["cluster=none", "cluster.workers=1", *overrides])).config


OPTIMIZERS = {
    "adamw": (),
    "adamw, rates": ("optimizer.rates={vocab: 0.5}", "optimizer.no_decay=[heads]", "optimizer.amsgrad=true"),
    "muon": ("optimizer=muon",),
    "adamw, width": ("optimizer.transfer=width", "optimizer.base_width=5", "optimizer.weight_decay=0.2"),
    "muon, width": ("optimizer=muon", "optimizer.transfer=width", "optimizer.base_width=5"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_of_one_process_are_those_of_a_run(name):
    """Written down twice, they move whole weights alike: three steps of random gradients."""
    config = small(*OPTIMIZERS[name], "optimizer.lr=0.02")
    models = [initialise(config.model.build().double(), 0) for _ in range(2)]
    named = [dict(model.named_parameters()) for model in models]
    stepper = alone._Stepper(config, models[0])
    theirs = build_optimizer(config.optimizer.build(), models[1], declarations(models[1]))
    set_rate(theirs, config.optimizer["lr"])
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for key in named[0]:
            gradient = torch.randn(named[0][key].shape, generator=generator, dtype=torch.float64)
            named[0][key].grad, named[1][key].grad = gradient.clone(), gradient.clone()
        stepper.step(named[0])
        theirs.step()
    start = dict(initialise(config.model.build().double(), 0).named_parameters())
    for key, mine in named[0].items():
        moved = (mine - start[key]).norm()
        assert moved > 0 and (mine - named[1][key]).norm() <= 1e-12 * moved, key


def test_clipping_of_one_process_is_that_of_torch():
    config = small()
    config = replace(config, train=replace(config.train, clip=0.7))
    model = initialise(config.model.build().double(), 0)
    named = dict(model.named_parameters())
    for p in named.values():
        p.grad = torch.ones_like(p)
    before = alone._Stepper(config, model).clip(named)
    size = math.sqrt(sum(p.numel() for p in named.values()))
    assert before == pytest.approx(size)
    want = 0.7 / (size + 1e-6)
    assert all(torch.allclose(p.grad, torch.full_like(p, want), rtol=1e-12) for p in named.values())
    nn.utils.clip_grad_norm_(list(named.values()), 0.7)  # nothing is left to clip
    assert all(torch.allclose(p.grad, torch.full_like(p, want), rtol=1e-12) for p in named.values())


WANT = {
    Place(0, OUTPUT, "layers.0"): torch.tensor([1.0, 2.0]),
    Place(0, SCALAR, "loss"): torch.tensor(3.0),
    Place(0, GRADIENT, "layers.0.a"): torch.tensor([1.0, 1.0]),
    Place(0, GRADIENT, "layers.0.zero"): torch.tensor([1e-17, 0.0]),
    Place(0, WEIGHT, "layers.0.b"): torch.tensor([4.0]),
}
WANT = {place: x.double() for place, x in WANT.items()}


def limits():
    moved = {place: x + 1e-12 for place, x in WANT.items()}
    return allowed(WANT, [(moved, WANT)])


def test_the_limit_of_a_tensor_is_what_a_perturbation_moves_it_by():
    found = limits()
    assert found[Place(0, SCALAR, "loss")] == pytest.approx(FACTOR * 1e-12, rel=0.01)
    still = allowed(WANT, [(WANT, WANT)])
    assert 0 < still[Place(0, GRADIENT, "layers.0.zero")] < 1e-20
    assert still[Place(0, WEIGHT, "layers.0.b")] == pytest.approx(4e-14)


def judged(traces):
    return compare(WANT, limits(), [RankTrace(trace, {}) for trace in traces])


@pytest.mark.parametrize("kind", [SCALAR, GRADIENT, WEIGHT])
def test_the_first_tensor_that_parts_is_named_with_the_rank(kind):
    wrong = {place: x + (1e-6 if place.kind == kind else 0) for place, x in WANT.items()}
    half = {place: x / 2 if place.kind == OUTPUT else x for place, x in WANT.items()}
    ranks = [half, {**wrong, Place(0, OUTPUT, "layers.0"): half[Place(0, OUTPUT, "layers.0")]}]
    verdict = judged(ranks)
    assert verdict.first is not None and verdict.first.place.kind == kind and verdict.first.rank == 1
    assert verdict.worst.excess >= verdict.first.excess > 1
    assert judged([half, half]).first is None


def test_outputs_of_layers_are_parts_of_a_sum_over_ranks():
    assert judged([WANT, WANT]).first.place.kind == OUTPUT
    assert judged([WANT]).first is None


def test_a_rank_may_have_a_part_of_a_weight():
    whole = Place(0, GRADIENT, "layers.0.a")
    part = Part(0, [(1, 2)])
    for value, right in ((1.0, True), (2.0, False)):
        got = {**WANT, whole: torch.tensor([value]).double()}
        assert (compare(WANT, limits(), [RankTrace(got, {"layers.0.a": part})]).first is None) == right
    with pytest.raises(ValueError, match="has shape"):
        compare(WANT, limits(), [RankTrace(WANT, {"layers.0.a": part})])


def test_what_is_no_number_or_not_there_is_wrong():
    place = Place(0, GRADIENT, "layers.0.a")
    verdict = judged([{**WANT, place: WANT[place] * math.nan}])
    assert verdict.first.place == place and verdict.first.excess == math.inf
    with pytest.raises(ValueError, match="no rank has the gradient of layers.0.a in step 1"):
        judged([{p: x for p, x in WANT.items() if p != place}])
    with pytest.raises(ValueError, match="one process has no weight of more in step 1"):
        judged([{**WANT, Place(0, WEIGHT, "more"): torch.ones(1)}])
