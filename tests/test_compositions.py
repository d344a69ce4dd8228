"""Compositions: some of many ways each, run; the documentation has what the command runs, and nothing failed."""

from dataclasses import replace
from itertools import combinations
from math import prod
from types import SimpleNamespace

import pytest
import torch

from launch.commands.verify import checked, configured
from launch.errors import UserError
from tests import compositions
from tests.compositions import PAGE, TRIPLES, WAYS, Result, named, pairs, prepared, recorded, run, sizes, tables
from train.verify import world
from train.verify.trace import GRADIENT, LOAD, Place, RankTrace

COVERING = (
    ("FSDP", "SP relay, ring", "recompute full", "accumulation", "chunked loss"),
    ("TP", "SP allscan, ulysses", "recompute selective", "chunked loss", "spans in time"),
    ("HSDP", "EP padded", "recompute full", "accumulation", "chunked loss", "spans in time"),
    ("PP 1f1b", "SP gather", "recompute selective", "accumulation", "chunked loss"),
    ("PP zero bubble", "EP", "recompute full", "accumulation", "chunked loss"),
    ("TP", "PP interleaved", "recompute full", "accumulation", "chunked loss"),
    ("SP usp", "recompute selective", "accumulation", "chunked loss", "spans in time"),
)
OWED = (  # kinds that may not be refused together
    {"FSDP", "EP", "SP"},
    {"TP", "SP"},
    {"TP", "EP"},
    {"FSDP", "TP", "SP"},
    {"HSDP", "recomputation", "accumulation"},
)


def test_the_covering_part_has_every_way_and_many_pairs_of_four_processes():
    assert {way for several in COVERING for way in several} == set(WAYS)
    small = {pair for pair in pairs() if prod(sizes(pair).values()) <= 4}
    covered = {pair for several in COVERING for pair in combinations(several, 2)}
    assert all(prod(sizes(several).values()) == 4 for several in COVERING)
    assert len(small & covered) >= 45


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_a_covering_part_equals_one_process():
    """In one world of four ranks: loss, every gradient, weights after a step; `make compositions` takes three."""
    chosen = {several: prepared(several) for several in COVERING}
    results = dict(run(chosen, steps=1))
    assert results.keys() == chosen.keys()
    wrong = [f"{named(several)}: {r.said} {r.worst}" for several, r in results.items() if r.state != "passed"]
    assert not wrong, "\n".join(wrong)


def test_the_page_has_what_the_command_runs_and_nothing_failed():
    """A measured result for each composition."""
    results, page = recorded(), PAGE.read_text()
    assert set(results) == set(compositions.compositions())
    assert tables(results) in page
    assert all(f"| {way} |" in page for way in WAYS) and all(f"| {named(triple)} |" in page for triple in TRIPLES)
    assert not [named(several) for several, result in results.items() if result.state == "failed"]
    owed = [c for c in compositions.compositions() if {WAYS[way].kind for way in c} in OWED]
    for several in [*owed, ("FSDP", "PP 1f1b", "SP gather")]:
        assert results[several].state == "passed", named(several)
    assert len(owed) >= 12


@pytest.mark.composes
def test_what_the_page_calls_refused_is_refused_in_these_words():
    refused = {result.said: several for several, result in recorded().items() if result.state == "refused"}
    assert refused
    for line, several in refused.items():
        with pytest.raises(UserError) as error:
            prepared(several)
        assert str(error.value) == line


PLACES = (Place(0, LOAD, "layers.0"), Place(0, GRADIENT, "layers.0.a"), Place(0, GRADIENT, "layers.0.zero"))


@pytest.mark.parametrize(("by", "state"), [(1e-11, "passed"), (1e-9, "failed")])
@pytest.mark.parametrize("wrong", PLACES[1:])
def test_a_tensor_may_differ_by_a_ten_billionth(tmp_path, monkeypatch, wrong, by, state):
    """One that is zero in theory by as much of its layer's gradient."""
    want = dict(zip(PLACES, torch.tensor([[1.0, 2.0], [3.0, 0.0], [1e-17, 0.0]]).double(), strict=True))
    got = {place: x + torch.tensor([0.0, 3 * by]) * (place == wrong) for place, x in want.items()}
    torch.save(RankTrace(got, {}), world.file_of(tmp_path, 0))
    monkeypatch.setattr(compositions, "reference", lambda shrunk, steps: want)
    one = SimpleNamespace(config=SimpleNamespace(cluster=SimpleNamespace(workers=1)))
    results = compositions.judged(one, tmp_path, 1)
    assert results.state == state and results.worst == pytest.approx(by, rel=1e-3) and results.said == str(wrong)


@pytest.mark.slow
@pytest.mark.dist
def test_what_does_not_run_has_failed_and_the_next_one_runs():
    right = checked(configured(["cluster.workers=1"]))
    two = replace(right.config.parallel, pipeline=2)
    wrong = replace(right, config=replace(right.config, parallel=two))
    results = dict(run({("wrong",): wrong, ("right",): right}, steps=1))
    assert results["wrong",].state == "failed" and "parallel.pipeline=2: must divide" in results["wrong",].said
    assert results["right",].state == "passed"


def test_the_page_says_where_a_composition_failed():
    results = {pair: Result("passed", "", 1e-15) for pair in pairs()}
    results[pairs()[0]] = Result("failed", "the loss in step 1", 1e-3)
    told = tables(results)
    assert "✗ 1e-03" in told and "- FSDP × HSDP: the loss in step 1" in told and "1 failed" in told
