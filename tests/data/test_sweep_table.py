import numpy as np

from tests.benchmarks.decomposition import Run, needed, table


def run(arm: str, *losses: float) -> Run:
    steps = np.arange(1, len(losses) + 1)
    return Run(arm, 10.0 * steps, 1e9 * steps, np.array(losses))


def test_what_a_loss_took_is_read_between_evaluations() -> None:
    found = run("a", 4.0, 3.0, 2.0)
    assert needed(found, found.cpu, 2.5) == 25 and needed(found, found.cpu, 4.5) == 10
    assert np.isnan(needed(found, found.cpu, 1.0))


def test_arms_are_in_the_order_of_their_losses_with_spreads() -> None:
    lines = table([run("a", 4, 3), run("a", 4, 3.5), run("b", 3.75, 2)])
    assert lines[2].startswith("| b | 1 | 2.0000 (0.0000) | 20 (0) | 2e+09 (0) | 11 (0) |")
    assert lines[3].startswith("| a | 2 | 3.2500 (0.5000) | 20 (0) |")
