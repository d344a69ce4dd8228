"""The products of a step, made again from their shapes alone (`tests.benchmarks.matmuls`)."""

import torch

from tests.benchmarks.matmuls import Products, seconds


def test_a_product_of_an_expanded_operand_is_timed_like_any_other() -> None:
    with Products() as products:
        torch.bmm(torch.ones(1, 4, 5).expand(3, 4, 5), torch.ones(3, 5, 6))
        torch.mm(torch.ones(4, 3).t(), torch.ones(4, 2))
    found = seconds(products.counts, rounds=1)
    assert found.keys() == {"recurrence", "weights"} and min(found.values()) > 0
