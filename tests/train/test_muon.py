"""Muon against a plain loop over whole matrices, on one process and on several; what it takes, what it leaves."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.axes import Declared, declarations, initialise
from models.block import Block
from models.ffn import SwiGLU
from models.kernels.newton_schulz import newton_schulz
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from parallel import matrix_owners
from parallel.collectives import LEDGER, LedgerEntry
from parallel.matrix_owners import PURPOSE
from parallel.mesh import Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.mesh import Mesh
from tests import jobs
from train.build import build
from train.metrics.width_trace import divided
from train.optim import muon
from train.optim.build import build_optimizer
from train.optim.muon import Muon

STEPS, LR, DECAY, MOMENTUM = 5, 0.02, 0.1, 0.9
SETTINGS: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM}
KEYS, HIDDEN = 6, 7


def model() -> LM:
    """Fused projections of uneven widths, keys and values that take turns, experts, filters, and a dimension of 14,
    which no three ranks share evenly."""
    blocks = {
        "gdn": partial(
            Block,
            mixer=partial(MIXERS["gated_deltanet"], heads=2, expand_v=2.0),
            ffn=partial(SwiGLU, hidden=HIDDEN),
        ),
        "attn": partial(
            Block,
            mixer=partial(MIXERS["attention"], heads=2, kv_heads=2, head_dim=KEYS),
            ffn=partial(MoE, num_experts=4, top_k=2, hidden=6, shared_hidden=5, shared_gate=True),
        ),
        "rglru": partial(Block, mixer=partial(MIXERS["rglru"], heads=2), ffn=partial(SwiGLU, hidden=3)),
    }
    return LM(vocabulary=16, dim=14, layers=3, pattern=["gdn", "attn", "rglru"], blocks=blocks)


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def five_steps(built: nn.Module, declared: dict[str, Declared]) -> dict[str, np.ndarray]:
    """The parameters after steps along gradients that depend on step and name alone."""
    steps = build_optimizer(partial(Muon, **SETTINGS), built, declared)
    for step in range(STEPS):
        for name, p in built.named_parameters():
            whole = gradient(parameter_name(name), tuple(p.shape), step).to(p.dtype)
            if hasattr(p, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = whole
        steps.step()
    found = {parameter_name(n): p.detach() for n, p in built.named_parameters()}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).numpy() for n, p in found.items()}


def alone() -> dict[str, np.ndarray]:
    built = initialise(model().double(), seed=1)
    return five_steps(built, declarations(built))


def together(**sizes: int) -> dict[str, np.ndarray]:
    with torch.device("meta"):
        built = model()
    declared = declarations(built)
    mesh = Mesh(**sizes or {"sequence": dist.get_world_size()})
    parallelise(
        built, Meshes(mesh, torch.device("cpu")), seed=1, dtype=torch.float64, remat="none", reshard_after_forward=True
    )
    return five_steps(built, declared)


def counted(**sizes: int) -> tuple[int, int]:
    """(bytes, calls) that this rank has counted of its matrices over five steps."""
    LEDGER.take()
    together(**sizes)
    received, calls = LEDGER.take()
    entries = [LedgerEntry(axis, PURPOSE) for axis in ("world", "experts")]
    return sum(received[e] for e in entries), sum(calls[e] for e in entries)


# The oracle: which matrices a tensor holds is written out by hand, and every step is a loop over them.


def matrices(name: str, x: Tensor) -> list[Tensor]:
    """The matrices of a parameter of `model`, views; [] of one that is AdamW's."""
    if name.endswith("qkv.weight"):  # q, k and v one below the other
        return list(x.split([14, 14, 28]))
    if name.endswith("rates.weight"):  # of each head: decay, strength
        return [x[0::2], x[1::2]]
    if name.endswith("kv.weight"):  # of each head: keys, values
        return list(x.unflatten(0, (-1, 2, KEYS)).unbind(1))
    if name.endswith("experts.gate_up"):
        return [half for expert in x for half in (expert[:, :6], expert[:, 6:])]
    if name.endswith("experts.down"):
        return list(x)
    if name.endswith("mixer.gates"):
        return [half for head in x for half in (head[:, :7], head[:, 7:])]
    if name.endswith("gate_up.weight"):
        return list(x.split(x.shape[0] // 2))
    left = ("embedding", "head.weight", "conv.weight", "shared_gate.weight")
    return [] if x.ndim < 2 or name.endswith(left) or ("bias" in name) else [x]


def five_newton_schulz_steps(g: Tensor) -> Tensor:
    x = g / (g.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def by_hand(built: nn.Module) -> dict[str, np.ndarray]:
    """The matrices of Muon after the same steps."""
    found = {}
    for name, parameter in built.named_parameters():
        w = parameter.detach().clone()
        m = torch.zeros_like(w)
        for step in range(STEPS):
            g = gradient(name, tuple(w.shape), step)
            m = MOMENTUM * m + (1 - MOMENTUM) * g
            u = MOMENTUM * m + (1 - MOMENTUM) * g
            w = w * (1 - LR * DECAY)
            for each, direction in zip(matrices(name, w), matrices(name, u), strict=True):
                flat = direction.reshape(-1, direction.shape[-1])
                size = 0.2 * max(flat.shape) ** 0.5
                each -= LR * size * five_newton_schulz_steps(flat).view_as(each)
        if matrices(name, w):
            found[name] = w.numpy()
    return found


def test_every_matrix_steps_as_a_plain_loop_does():
    want, got = by_hand(initialise(model().double(), seed=1)), alone()
    assert len(want) > 15
    for name, b in want.items():
        assert np.linalg.norm(got[name] - b) <= 1e-12 * np.linalg.norm(b), name


def test_the_rest_steps_as_adamw_does():
    built = initialise(model().double(), seed=1)
    steps = build_optimizer(partial(Muon, **SETTINGS), built, declarations(built))
    taken = {id(p) for group in steps.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in built.named_parameters() if id(p) in taken}
    assert names == {name for name, p in built.named_parameters() if matrices(name, p.detach())}
    other = initialise(model().double(), seed=1)
    adamw = torch.optim.AdamW(other.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    decays = {name for name, each in declarations(other).items() if each.decay}
    for step in range(STEPS):
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.grad = gradient(name, tuple(p.shape), step)
                p.mul_(1 - LR * DECAY * (name in decays))
        adamw.step()
    got = alone()
    for name, p in other.named_parameters():
        if name not in names:
            assert np.allclose(got[name], p.detach().numpy(), rtol=1e-11, atol=1e-13), name


@pytest.mark.dist
def test_matrices_of_experts_are_foretold_on_every_rank(run):
    """Each of the two meshes that share experts, and the one of all."""
    sizes = {"expert": 2, "sequence": 2}
    foretold = build_optimizer(partial(Muon, **SETTINGS), built := model(), declarations(built))
    told = foretold.received(Mesh(**sizes), torch.float64, "cpu")
    assert run(4, counted, **sizes) == [(STEPS * e.bytes[PURPOSE], STEPS * e.calls[PURPOSE]) for e in told]


@pytest.mark.dist
def test_what_is_received_is_foretold_byte_for_byte_on_every_rank(run):
    foretold = build_optimizer(partial(Muon, **SETTINGS), built := model(), declarations(built))
    told = foretold.received(Mesh(sequence=3), torch.float64, "cpu")
    found = run(3, counted)
    assert found == [(STEPS * each.bytes[PURPOSE], STEPS * each.calls[PURPOSE]) for each in told]
    assert len({received for received, _ in found}) > 1 and all(received for received, _ in found)
    assert not any(each.calls for each in foretold.received(Mesh(sequence=1), torch.float64, "cpu"))
    (half,), (whole,) = (foretold.received(Mesh(sequence=2), torch.float32, device)[:1] for device in ("cuda", "cpu"))
    assert 2 * half.bytes[PURPOSE] == whole.bytes[PURPOSE]


def counted_in_a_run(job: dict) -> tuple[int, int]:
    """The same of a step of a whole run."""
    trainer, noted, honest = build(job), list[int](), LEDGER.add

    def add(group: str, purpose: str, received: int) -> None:
        noted.extend([received] * (purpose == PURPOSE))
        honest(group, purpose, received)

    LEDGER.add = add  # type: ignore[method-assign]
    trainer.step()
    return sum(noted), len(noted)


@pytest.mark.dist
def test_matrices_that_are_divided_over_tensor_ranks_are_foretold_on_every_rank(run, tmp_path):
    """Gathered beside each other along the tensor axis, and made whole along the other."""
    sizes = {"tensor": 2, "sequence": 2}
    layout = ["cluster.workers=4", *(f"parallel.{name}={size}" for name, size in sizes.items())]
    job = jobs.order(tmp_path, tmp_path / "run", *jobs.HYBRID, *layout, "optimizer=muon", "precision=fp32")
    with torch.device("meta"):
        shapes = job["config"].model.build()
    declared = declarations(shapes)
    divided(shapes, 2, 0)
    told = build_optimizer(job["config"].optimizer.build(), shapes, declared).received(
        Mesh(**sizes), torch.float32, "cpu"
    )
    assert run(4, counted_in_a_run, job) == [(e.bytes[PURPOSE], e.calls[PURPOSE]) for e in told]
    assert all(e.bytes[PURPOSE] for e in told)


HYBRID = pytest.param({"replicate": 2, "data": 2}, marks=pytest.mark.slow)
SEQUENCE = pytest.param({"sequence": 3}, marks=pytest.mark.slow)


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [{}, SEQUENCE, {"expert": 2, "data": 2}, HYBRID], ids=str)
def test_spread_over_ranks_every_parameter_is_that_of_one_process(run, sizes):
    want = alone()
    for got in run(Mesh(**sizes).world, together, **sizes):
        assert got.keys() == want.keys()
        for name, b in want.items():
            assert np.linalg.norm(got[name] - b) <= 1e-10 * np.linalg.norm(b), name


@pytest.mark.parametrize("shape", [(16, 16), (24, 7), (5, 40)])
def test_newton_schulz_keeps_singular_vectors_and_brings_values_near_one(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ newton_schulz(x) @ vt.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-10
    assert 0.3 < values.min() and values.max() < 1.25 and 0.7 < values.median()
    assert torch.equal(newton_schulz(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_torchs_own_muon_in_bf16_goes_the_same_way():
    w = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    ours.declared = Declared(("ffn", "embed"), torch.zeros, True)  # type: ignore[attr-defined, arg-type]
    settings = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM}
    pair = [Muon([ours], **settings), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)]
    for step in range(STEPS):
        for p, each in zip((ours, theirs), pair, strict=True):
            p.grad = gradient("w", (24, 16), step).float()
            each.step()
    change = (ours - theirs).norm() / (theirs - w).norm()
    assert change < 0.02


def rows_of_the_first_rank() -> None:
    matrix_owners._rows = lambda each, whole, rank: whole[: each.rows[rank]]


def each_ranks_rows_by_themselves() -> None:
    def apply(self, pieces, function, dtype):
        return [function(x.view(-1, *x.shape[-2:]).to(dtype)).view_as(x) if x.numel() else x for x in pieces]

    matrix_owners.MatrixOwners.apply = apply  # type: ignore[method-assign]


def parts_as_one_matrix() -> None:
    muon.cuts = lambda shape, parts, along: matrix_owners.cuts(shape)  # type: ignore[assignment]


def no_second_mixing_of_the_gradient() -> None:
    honest = Muon.__init__
    Muon.__init__ = lambda self, *args, **more: honest(self, *args, **more, nesterov=False)  # type: ignore[method-assign]


MUTATIONS = {
    f.__name__: f
    for f in (
        rows_of_the_first_rank,
        each_ranks_rows_by_themselves,
        parts_as_one_matrix,
        no_second_mixing_of_the_gradient,
    )
}


def broken(mutation: str) -> dict[str, np.ndarray]:
    MUTATIONS[mutation]()
    return together()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_mechanism_is_caught(run, mutation):
    want = alone()
    for got in run(2, broken, mutation):
        assert any(np.linalg.norm(got[name] - b) > 1e-6 * np.linalg.norm(b) for name, b in want.items())
