"""Experts over ranks: rows that travel, weights that are cut, and all else as one process has it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import parallel.expert
from models.block import Block
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Whole
from parallel.collectives import LEDGER
from parallel.expert import Exchange, Trip, pad, spread_experts
from parallel.mesh import Meshes
from parallel.schedule.expert_volume import OUTPUTS
from parallel.schedule.mesh import Mesh
from parallel.shards import local
from tests.models.test_moe import KINDS, dense, moe
from tests.parallel.test_parity import BATCH, adaptive, static, unequal
from tests.parity import VOCABULARY, assert_close, differences, spread, truth

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


def over_ranks() -> dict[tuple[str, bool], tuple]:
    """By kind, counted and padded: this rank's outputs, the gradient of its inputs, and of the weights that it holds;
    the bytes that it received."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    meshes, found = Meshes(Mesh(expert=ranks), torch.device("cpu")), {}
    for kind, padded in [*((kind, False) for kind in KINDS), *((kind, True) for kind in KINDS if "capacity" in kind)]:
        m = build(kind)
        spread_experts(m, meshes)
        if padded:
            pad(m)
        x, out = tokens(rank)
        x.requires_grad_()
        seq = Whole.of(torch.arange(x.shape[1]).expand(2, -1))
        seq.shapes = tuple((2, count) for count in TOKENS[:ranks])
        LEDGER.take()
        y = m(x, seq)[0]
        y.backward(out)
        gradients = {n: local(p.grad).numpy() for n, p in m.named_parameters()}
        found[kind, padded] = (y.detach().numpy(), x.grad.numpy(), gradients, dict(LEDGER.take()[0]))
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


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_experts_on_other_ranks_equal_every_expert_on_every_token(run, ranks):
    for rank, by_kind in enumerate(got := run(ranks, over_ranks)):
        for (kind, padded), (y, dx, held, _) in by_kind.items():
            each, whole = alone(kind, ranks)
            np.testing.assert_allclose(y, each[rank][0], rtol=1e-10, atol=1e-12, err_msg=kind)
            np.testing.assert_allclose(dx, each[rank][1], rtol=1e-10, atol=1e-12, err_msg=kind)
            for name, gradient in whole.items():
                if name.startswith("experts."):
                    mine, want = held[name], np.split(gradient, ranks)[rank]
                else:
                    mine, want = sum(g[kind, padded][2][name] for g in got), gradient
                np.testing.assert_allclose(mine, want, rtol=1e-10, atol=1e-12, err_msg=f"{kind}, {name}")


# Groups that change, an idle rank, a rank without a span: expert groups lie across them.
LAYOUTS = {
    "expert 2": (Mesh(expert=2), static(2, 1, 140), "none"),
    "expert 2 sequence 2": (Mesh(expert=2, sequence=2), static(2, 2, 80), "full"),
    "expert 4": (Mesh(expert=4), unequal(), "selective"),
    "expert 2, groups that change": (Mesh(expert=2, sequence=2), adaptive(), "selective"),
}


TOGETHER = [  # in one world; the first two in `make slow`
    ("expert 2",),
    ("expert 2 sequence 2",),
    ("expert 4", "expert 2, groups that change"),
]


def several_layouts(names: tuple[str, ...]) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    chosen = {name: LAYOUTS[name] for name in names}
    found = {name: spread(BATCH, plan, "fp64", remat, mesh=mesh) for name, (mesh, plan, remat) in chosen.items()}
    return found | ({"fp32": spread(BATCH, static(2, 1), "fp32", mesh=Mesh(expert=2))} if "expert 2" in names else {})


@pytest.mark.parametrize(
    "names", [pytest.param(names, marks=[pytest.mark.slow] * (names != TOGETHER[-1])) for names in TOGETHER]
)
def test_loss_and_every_gradient_equal_one_process(run, names):
    want = {precision: truth(BATCH, precision) for precision in ("fp64", "fp32")[: 1 + (names == TOGETHER[0])]}
    for found in run(LAYOUTS[names[0]][0].world, several_layouts, names):
        for name, got in found.items():
            precision = name if name in want else "fp64"
            assert_close(got, want[precision], precision)


class Loop:
    """A rank of two whose messages come back to it."""

    size, rank, waiting = 2, 0, nullcontext

    def all_to_all(self, x: torch.Tensor, *, purpose: str) -> torch.Tensor:
        return x.clone()

    def start_all_to_all(self, x: torch.Tensor, there: list[int], here: list[int], *, purpose: str):
        return None, x.new_empty(sum(here), x.shape[1])


def test_a_fixed_number_of_places_is_no_question_to_the_device():
    """On tensors without values, which nobody can ask for one."""

    def there_and_back(padded: bool) -> tuple[torch.Tensor, ...]:
        dispatch = Exchange(Loop(), padded=padded)  # type: ignore[arg-type]
        x, weights = torch.randn(7, 4, requires_grad=True), torch.rand(7, 2)
        choices = torch.randint(0, 7, (7, 2))
        sent = dispatch.receive(dispatch.send(x, choices, 6, 3))
        y = dispatch.collect(sent.rows, sent, weights)
        y.sum().backward()
        assert x.grad is not None and y.shape == x.grad.shape
        return sent.rows, sent.offsets

    with FakeTensorMode():
        rows, offsets = there_and_back(padded=True)
        assert rows.shape == (2 * 3 * 3, 4) and offsets.shape == (3,)
        with pytest.raises(DataDependentOutputException):
            there_and_back(padded=False)


class Swapped:
    """Replaces attributes for a while."""

    def __init__(self, *several: tuple[Any, str, Any]):
        self.several = several

    def __enter__(self) -> None:
        self.honest = [(where, name, vars(where)[name]) for where, name, _ in self.several]
        for where, name, value in self.several:
            setattr(where, name, value)

    def __exit__(self, *_: Any) -> None:
        for where, name, value in self.honest:
            setattr(where, name, value)


def others_gone(self: Trip, rows, there, here, purpose) -> torch.Tensor:
    """As `start`, but of the outputs' gradients a rank takes only those of its own tokens."""
    received = honest_start(self, rows, there, here, purpose)
    if purpose == f"{OUTPUTS} gradient":
        self.finish()
        begin = sum(here[: self.comm.rank])
        mine = torch.zeros(len(received), dtype=torch.bool)
        mine[begin : begin + here[self.comm.rank]] = True
        received = received * mine.unsqueeze(-1)
    return received


def unsorted(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (rows.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


def doubled(self: Exchange, weight: torch.Tensor) -> torch.Tensor:
    part = weight.to_local()
    part.register_hook(lambda gradient: 2 * gradient)
    return part


honest_start, honest_held, honest_shared = Trip.start, Exchange.held, MoE.shared_output
honest_back = parallel.expert._Depart.backward

# Kinds of faults that other systems had; docs/experts.md says where.
BROKEN: dict[str, Callable[[], Swapped]] = {
    "gradients come home in another order": lambda: Swapped(
        (parallel.expert._Depart, "backward", staticmethod(lambda ctx, grad: (None, honest_back(ctx, grad)[1].flip(0))))
    ),
    "rows stay in the order of senders": lambda: Swapped(
        (parallel.expert, "_by_expert", lambda taken, device: torch.arange(sum(map(sum, taken)))),
    ),
    "a rank takes another expert's weights": lambda: Swapped(
        (Exchange, "held", lambda self, weight: honest_held(self, weight).roll(1, 0))
    ),
    "experts' gradients are summed over the expert group too": lambda: Swapped((Exchange, "held", doubled)),
    "experts learn from their own rank's tokens alone": lambda: Swapped((Trip, "start", others_gone)),
    "the shared expert counts twice": lambda: Swapped(
        (MoE, "shared_output", lambda self, x: 2 * honest_shared(self, x))
    ),
    "outputs go to the tokens in the order of experts": lambda: Swapped((parallel.expert, "combined", unsorted)),
}


def one_layer() -> LM:
    """With experts over ranks and a shared one: nothing that is broken needs more."""
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12, shared_hidden=8)
    block = partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=moe)
    return LM(vocabulary=VOCABULARY, dim=32, layers=1, pattern=["gla"], blocks={"gla": block})


def every_fault() -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    mesh, plan = Mesh(expert=2), static(2, 1)
    found = {"": spread(BATCH, plan, "fp64", mesh=mesh, build=one_layer)}
    for name, fault in BROKEN.items():
        with fault():
            found[name] = spread(BATCH, plan, "fp64", mesh=mesh, build=one_layer)
    return found


def test_every_fault_on_the_way_to_experts_is_seen(run):
    want = truth(BATCH, "fp64", build=one_layer)
    first, second = run(2, every_fault)
    for name in first:
        for got in (first[name], second[name]):
            worst = max(differences(got, want).values())
            assert (worst > 1e-6) == bool(name), f"{name or 'nothing broken'}: {worst:.1e}"
