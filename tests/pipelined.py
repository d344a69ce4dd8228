"""Cases that tests of pipelines share, and a rank's side of one, run by the executor."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from parallel.matrix_owners import wholes
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.runner import Pipeline
from parallel.schedule.mesh import Mesh
from parallel.schedule.stages import given
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from tests.parity import BALANCE, DTYPE, VOCABULARY, Sample, counted, small_model
from train.execute import Executor
from train.optim.clip import clip

BATCH = [
    Sample((40, 24, 1, 1, 2, 60)),
    Sample((130, 3), masked=(60, 133), padding=3),
    Sample((31, 1, 32, 7), seed=3),
    Sample((5,)),
]
LENGTHS = [len(s.tokens) for s in BATCH]


def coupled_model() -> LM:
    """Six layers that know of each other: an embedding that is the head, HGRN2's bounds, RWKV-7's values; experts."""
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12, shared_hidden=8)
    dense = partial(SwiGLU, hidden=24)
    blocks = {
        "rwkv7": partial(Block, mixer=partial(MIXERS["rwkv7"], heads=2), ffn=moe),
        "hgrn2": partial(Block, mixer=partial(MIXERS["hgrn2"], heads=2), ffn=dense),
        "gla": partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=dense),
    }
    pattern = ["hgrn2", "rwkv7", "gla", "rwkv7", "hgrn2", "rwkv7"]
    return LM(vocabulary=VOCABULARY, dim=32, layers=6, pattern=pattern, blocks=blocks, tied=True)


class Case(NamedTuple):
    """layers: of each stage. each: tokens a rank holds in a micro-step."""

    schedule: str = "1f1b"
    layers: tuple[int, ...] = (2, 2)
    mesh: Mesh = Mesh(pipeline=2)
    build: Callable[[], LM] = small_model
    each: int = 140
    remat: str = "none"
    reshard: bool = True


class Found(NamedTuple):
    """A rank's results: the loss, the gradients that it holds, their norm before clipping, and the held-out nats."""

    loss: float
    gradients: dict[str, np.ndarray]
    norm: float
    nats: float


def pipelined(case: Case) -> Found:
    """Two steps of the case and an evaluation between them, on this world, in fp64; of the second step."""
    mesh, device = case.mesh, torch.device("cpu")
    with torch.device("meta"):
        model = case.build()
    model.compute = DTYPE["fp64"]
    cut = PipelineCut.of(model, given(case.layers), mesh.pipeline)
    experts = {f"layers.{name}": 4 for name, layer in model.layers.items() if isinstance(layer.ffn, MoE)}
    meshes, groups = Meshes(mesh, device), Groups(mesh)
    options: dict[str, Any] = {"remat": case.remat, "reshard_after_forward": case.reshard}
    parallelise(model, meshes, seed=1, dtype=DTYPE["fp64"], cut=cut, **options)
    pipeline = Pipeline(model, cut, case.schedule, meshes, reshard_after_forward=case.reshard)
    executor = Executor(
        model, groups, device, GatherEffects(), GatherKeys(), BALANCE, pipeline=pipeline, experts=experts
    )
    data, sequence = mesh.split
    plan = Static(tokens_per_rank=case.each).plan(0, LENGTHS, data=data, sequence=sequence)
    executor.train(plan, BATCH)
    model.zero_grad()
    nats = executor.evaluate(plan, BATCH).cross_entropy.double()
    tally = executor.train(plan, BATCH)
    targets = sum(int((s.targets != -100).sum()) for s in BATCH)
    sums = groups.stages_comm.all_reduce(torch.stack((tally.cross_entropy, tally.balance, nats)).double(), purpose="")
    loss = sums[0].item() / targets + BALANCE * sums[1].item() / counted(BATCH)
    whole = wholes({parameter_name(n): p.grad for n, p in model.named_parameters()})
    gradients = {n: x.numpy().copy() for n, x in whole.items()}
    norm = clip(model, groups.world_comm, largest=1e9, each=None, value=None, pipeline=pipeline)
    return Found(loss, gradients, norm.item(), sums[2].item() / targets)


def several(cases: list[Case], broken: Callable[[], None] | None = None) -> list[Found]:
    """The cases one after another, in one world; `broken` breaks something first."""
    if broken is not None:
        broken()
    return [pipelined(case) for case in cases]


def worst(results: list[Found], want: tuple[float, dict[str, np.ndarray]]) -> dict[str, float]:
    """The relative error of the loss and of each gradient, the largest of all ranks that hold it, and that of the norm.

    A gradient that no rank has is missing, and counts as an error of 1.
    """
    found: dict[str, float] = {}
    size = sum(np.linalg.norm(g) ** 2 for g in want[1].values()) ** 0.5
    for rank in results:
        errors = {"loss": abs(rank.loss - want[0]) / want[0], "norm": abs(rank.norm - size) / size}
        for name, gradient in rank.gradients.items():
            exact = np.linalg.norm(want[1][name])
            errors[name] = float(np.linalg.norm(gradient - want[1][name]) / max(exact, 1e-6 * size))
        for name, error in errors.items():
            found[name] = max(found.get(name, 0.0), error)
    return dict.fromkeys(want[1], 1.0) | found
