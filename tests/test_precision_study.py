"""The study of recipes (`tests.precision`) at a size that says nothing: it trains, remembers, writes what it found."""

import json
from unittest.mock import patch

import pytest

from tests import precision

RUNS = [("fp32", 0), ("fp32, seed 1", 1), ("int4_weights", 0), ("moments int4", 0), (precision.ROUNDED, 0)]


@pytest.mark.slow
def test_a_recipe_parts_from_fp32_by_rounding_alone_and_no_run_is_done_twice(tmp_path):
    record = tmp_path / "study.json"
    with patch.object(precision, "variants", lambda seeds: iter(RUNS)), patch.object(precision, "HELD_OUT", 1):
        found = precision.study(3, 32, 2, record)
        with patch.object(precision, "trained", side_effect=AssertionError("done already")):
            assert precision.study(3, 32, 2, record)["runs"] == json.loads(record.read_text())["runs"] == found["runs"]
    losses = {name: run["losses"] for name, run in found["runs"].items()}
    first = {name: each[0] for name, each in losses.items()}
    assert first["moments int4"] == first["fp32"] and losses["moments int4"][2] != losses["fp32"][2]
    assert 0 < abs(first["int4_weights"] - first["fp32"]) < 0.1 and abs(first["fp32, seed 1"] - first["fp32"]) > 1e-4
    assert 0 < abs(first[precision.ROUNDED] - first["fp32"]) < 0.01
    seeds = [found["runs"][name]["held_out"] for name in ("fp32", "fp32, seed 1")]
    mean, spread = precision.band(found["runs"])
    assert mean == pytest.approx(sum(seeds) / 2) and spread == pytest.approx(abs(seeds[0] - seeds[1]) / 2**0.5)
    apart = found["runs"]["int4_weights"]["held_out"] - seeds[0]
    assert f"| int4_weights | {apart + seeds[0]:.4f} | {apart:+.4f} | {apart / spread:+.1f} |" in precision.table(found)
    precision.draw(found, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 1000


def test_documents_of_the_corpus_end_where_files_do():
    (tokens, positions), *_ = precision.corpus(3, 40)
    assert tokens.shape == positions.shape == (1, 41)
    assert positions[0, 0] == 0 and ((positions[0].diff() == 1) | (positions[0, 1:] == 0)).all()
