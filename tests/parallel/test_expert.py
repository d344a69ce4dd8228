"""Experts over ranks: rows that travel, weights that are cut, and all else as one process has it."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from models.sequence import Whole
from parallel.collectives import Comm
from parallel.expert import spread_experts
from parallel.matrix_owners import local
from tests.models.test_moe import KINDS, dense, moe

pytestmark = pytest.mark.dist

TOKENS = (17, 1, 5)  # of each rank
WIDTH = 12


def tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's inputs, and the gradient of its outputs."""
    generator = torch.Generator().manual_seed(rank)
    x, out = torch.randn(2, 2, TOKENS[rank], WIDTH, generator=generator, dtype=torch.float64)
    if rank == 2:  # all its tokens want one expert first
        x = x[:1, :1].expand_as(x) + 1e-3 * x
    return x.clone(), out


def build(kind: str):
    return moe(num_experts=6, **{"top_k": 2, **KINDS[kind]})


def over_ranks() -> dict[str, tuple]:
    """By kind: this rank's outputs, the gradient of its inputs, and of the weights that it holds."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh, found = init_device_mesh("cpu", (ranks,), mesh_dim_names=("expert",)), {}
    for kind in KINDS:
        m = build(kind)
        spread_experts(m, Comm(tuple(range(ranks)), rank, dist.group.WORLD), mesh)
        x, out = tokens(rank)
        x.requires_grad_()
        y = m(x, Whole.of(torch.arange(x.shape[1]).expand(2, -1)))[0]
        y.backward(out)
        gradients = {n: local(p.grad).numpy() for n, p in m.named_parameters()}
        found[kind] = (y.detach().numpy(), x.grad.numpy(), gradients)
    return found


def alone(kind: str, ranks: int):
    m = build(kind)
    found = []
    for rank in range(ranks):
        x, out = tokens(rank)
        x.requires_grad_()
        y = dense(m, x, **KINDS[kind])
        y.backward(out)
        found.append((y.detach().numpy(), x.grad.numpy()))
    return found, {n: p.grad.numpy() for n, p in m.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_experts_on_other_ranks_equal_every_expert_on_every_token(run, ranks):
    for rank, by_kind in enumerate(got := run(ranks, over_ranks)):
        for kind, (y, dx, held) in by_kind.items():
            each, whole = alone(kind, ranks)
            np.testing.assert_allclose(y, each[rank][0], rtol=1e-10, atol=1e-12, err_msg=kind)
            np.testing.assert_allclose(dx, each[rank][1], rtol=1e-10, atol=1e-12, err_msg=kind)
            for name, gradient in whole.items():
                if name.startswith("experts."):
                    mine, want = held[name], np.split(gradient, ranks)[rank]
                else:
                    mine, want = sum(g[kind][2][name] for g in got), gradient
                np.testing.assert_allclose(mine, want, rtol=1e-10, atol=1e-12, err_msg=f"{kind}, {name}")
