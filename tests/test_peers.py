"""Both sides of `tests.benchmarks.peers` do the same work."""

import sys

import pytest
import torch

from tests.benchmarks import decoding_peers, peers, plain_torch

pytest.importorskip("transformers")


def test_dense_models_have_as_many_parameters():
    shape = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 48}
    models = (
        decoding_peers.llama(shape),
        decoding_peers.peer_llama(shape),
        plain_torch.PlainLlama(decoding_peers.VOCABULARY, **shape),
    )
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) == 1


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet"])
def test_scans_give_the_same_numbers_but_for_a_factor(mixer):
    """transformers divides the scores by the root of the key width."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    torch.manual_seed(0)
    run, inputs = peers.asked(mixer, 128)
    with torch.no_grad():
        ours = run(*inputs)
        peer = plain_torch.gla_by_chunks(*inputs) if mixer == "gla" else torch_chunk_gated_delta_rule(*inputs)[0]
    factor = (ours * peer).sum() / (peer * peer).sum()
    assert (ours - factor * peer).norm() < 1e-4 * ours.norm() and factor > 0


def test_a_process_that_outlives_its_parent_is_counted():
    work = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {work!r}])"
    assert peers.family_seconds([sys.executable, "-c", parent]) > 0.3


def test_a_ratio_is_the_peers_time_over_ours_round_by_round():
    times = {"ours": iter([9.0, 1.0, 2.0, 4.0]), "theirs": iter([9.0, 2.0, 3.0, 8.0])}
    found = peers.in_turn({name: lambda given=given: next(given) for name, given in times.items()}, 3)
    (row,) = peers.rows("work", found, {"theirs": 1.1})
    assert (row.ours_s, row.peer_s, row.ratio, row.low, row.high) == (2.0, 3.0, 2.0, 1.5, 2.0)
    assert peers.table([row]).splitlines()[-1] == "| work | theirs | 2,000.0 | 3,000.0 | 2.00 (1.50 to 2.00) | 1.1 |"
