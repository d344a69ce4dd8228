"""Attention residuals have the loss and the gradients of the paper's formulas, along the depth and on any ranks."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models.lm as lm_module
from models.accounting import account
from models.attnres import DepthAttention
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.footprint import footprints
from models.hub import of_model
from models.lm import LM
from models.mixers import MIXERS
from models.sequence import Whole
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.runner import Pipeline
from parallel.schedule.mesh import Mesh
from parallel.schedule.stages import given
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from tests.parity import VOCABULARY, Sample, assert_close, logical
from train.distill import refuse
from train.distill_settings import DistillSettings
from train.execute import Executor
from train.loss import sums
from train.time_spans import Spans

FP64, LAYERS = torch.float64, 5
Found = tuple[float, dict[str, np.ndarray]]
BATCH = [Sample((31, 33, 1, 2, 29)), Sample((40, 5, 3), seed=1, masked=(17, 29), padding=3)]
LENGTHS = [len(s.tokens) for s in BATCH]
TARGETS = sum(int((s.targets != -100).sum()) for s in BATCH)


def options(block: int | None = 2, **more: Any) -> dict[str, Any]:
    dense = partial(SwiGLU, hidden=24)
    blocks = {
        "gla": partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=dense, **more),
        "alone": partial(Block, mixer=None, ffn=dense),
        "attention": partial(Block, mixer=partial(MIXERS["attention"], heads=4), ffn=None, norms="both"),
    }
    pattern = ["gla", "attention", "alone"]
    sizes = {"vocabulary": VOCABULARY, "dim": 32, "layers": LAYERS, "pattern": pattern, "blocks": blocks}
    return {**sizes, "attnres_block": block}


def model(block: int | None = 2) -> LM:
    """Layers with two parts, and with either alone, in blocks of which the last is shorter."""
    return LM(**options(block))


def started(lm: LM) -> LM:
    """Filled, with queries that are not zero."""
    lm = initialise(lm.to(FP64), seed=1)
    lm.compute = FP64
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if name.endswith("query"):
                p.copy_(torch.linspace(-0.5, 0.7, p.numel(), dtype=FP64).roll(len(name)))
    return lm


def alone(block: int = 2) -> Found:
    """By the paper's equations for blocks of layers, a part at a time, from a list of what there is to read."""
    lm, total = started(model(block)), torch.zeros((), dtype=FP64)

    def mean(query: Tensor, read: list[Tensor]) -> Tensor:
        scores = [(query * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).sum(-1) for x in read]
        shares = [s.exp() for s in scores]
        return sum((share / sum(shares)).unsqueeze(-1) * x for share, x in zip(shares, read, strict=True))

    for s in BATCH:
        tokens, targets, positions = (torch.from_numpy(x[s.counted]) for x in (s.tokens, s.targets, s.positions))
        seq = Whole.of(positions[None])
        finished: list[Tensor] = []
        running = lm.embedding[tokens][None]
        for i in range(LAYERS):
            layer: Any = lm.layers[str(i)]
            if i % block == 0:
                finished, running = [*finished, running], None
            for part in ("mixer", "ffn"):
                if getattr(layer, part) is None:
                    continue
                read = mean(getattr(layer, f"{part}_read").query, [*finished, *([] if running is None else [running])])
                normed = getattr(layer, f"{part}_norm")(read)
                y = layer.mixer(normed, seq, slot=f"layers.{i}") if part == "mixer" else layer.ffn(normed, seq)[0]
                y = getattr(layer, f"{part}_post_norm")(y)
                running = y if running is None else running + y
        out = lm.norm(mean(lm.depth_read.query, [*finished, running]))
        total = total + F.cross_entropy((out @ lm.head.weight.T)[0], targets, ignore_index=-100, reduction="sum")
    loss = total / TARGETS
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in lm.named_parameters()}


def one_process(block: int = 2) -> Found:
    lm, total = started(model(block)), 0.0
    for s in BATCH:
        tokens, targets, positions = (torch.from_numpy(x[s.counted])[None] for x in (s.tokens, s.targets, s.positions))
        loss = sums(lm(tokens, Whole.of(positions), targets)).cross_entropy / TARGETS
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.numpy() for name, p in lm.named_parameters()}


@pytest.mark.parametrize("block", [1, 2, 3, 9])
def test_a_model_is_the_formulas_of_the_paper(block):
    assert_close(one_process(block), alone(block), "fp64")


def begin_every_block_with_the_sum_before(monkeypatch):
    monkeypatch.setattr("models.cross_layer.Depth.opens", property(lambda self: self.layer == 0))


def read_no_further_than_the_last_block(monkeypatch):
    honest = lm_module._stacked
    monkeypatch.setattr(lm_module, "_stacked", lambda handed, count: count and honest(handed, count)[-1:])


def weigh_by_length(monkeypatch):
    monkeypatch.setattr(DepthAttention, "_logits", lambda self, x: x @ self.query)


@pytest.mark.parametrize(
    "mutation", [begin_every_block_with_the_sum_before, read_no_further_than_the_last_block, weigh_by_length]
)
def test_a_mutation_is_seen(monkeypatch, mutation):
    want = alone()
    mutation(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        assert_close(one_process(), want, "fp64")


class Case(NamedTuple):
    mesh: Mesh
    remat: str = "none"
    each: int | None = None  # tokens that a rank holds in a micro-step
    spans: Spans | None = None


CASES = {
    "sequence, recomputed": Case(Mesh(sequence=2), remat="full"),
    "data": Case(Mesh(data=2), each=100),
    "tensor": Case(Mesh(tensor=2)),
    "pipeline": Case(Mesh(pipeline=2), each=100),
    "spans in time": Case(Mesh(sequence=2), spans=Spans(13)),
}


def trained(case: Case) -> Found:
    mesh, device = case.mesh, torch.device("cpu")
    groups, meshes = Groups(mesh), Meshes(mesh, device)
    with torch.device("meta"):
        lm = model()
    lm.compute = FP64
    cut = PipelineCut.of(lm, given((3, 2)), 2) if mesh.pipeline > 1 else None
    parallelise(lm, meshes, seed=1, dtype=FP64, remat=case.remat, reshard_after_forward=True, cut=cut)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if name.endswith("query"):
                full = torch.linspace(-0.5, 0.7, 32, dtype=FP64).roll(len(parameter_name(name)))
                local = p.to_local()
                ranks = mesh.data * mesh.sequence
                rank = p.device_mesh.get_local_rank() if ranks > 1 else 0
                local.copy_(full.chunk(ranks)[rank])
    pipeline = Pipeline(lm, cut, "1f1b", meshes) if cut else None
    executor = Executor(lm, groups, device, GatherEffects(), GatherKeys(), 0.0, spans=case.spans, pipeline=pipeline)
    data, sequence = mesh.split
    plan = Static(tokens_per_rank=case.each).plan(0, LENGTHS, data=data, sequence=sequence)
    tally = executor.train(plan, BATCH)
    nats = groups.all_comm.all_reduce(tally.cross_entropy.double().view(1) * groups.counts, purpose="loss").item()
    gradients = {parameter_name(n): p.grad for n, p in lm.named_parameters() if p.grad is not None}
    return nats / TARGETS, {name: x.numpy() for name, x in logical(lm, gradients).items()}


def every() -> dict[str, Found]:
    return {name: trained(case) for name, case in CASES.items()}


@pytest.mark.dist
def test_ranks_have_the_loss_and_the_gradients_of_the_paper(run):
    loss, gradients = alone()
    found = run(2, every)
    for name in CASES:
        held = set()
        for rank in found:
            held |= set(rank[name][1])
            assert_close(rank[name], (loss, {n: gradients[n] for n in rank[name][1]}), "fp64")
        assert held == set(gradients), name


def test_it_starts_as_a_plain_mean_of_the_depth():
    lm = initialise(model(1).to(FP64), seed=1)
    past, x = torch.randn(3, 1, 7, 32, dtype=FP64), torch.randn(1, 7, 32, dtype=FP64)
    assert torch.allclose(lm.depth_read(past, x), torch.cat((past, x[None])).mean(0), atol=1e-14)
    assert torch.allclose(lm.depth_read(past, None), past.mean(0), atol=1e-14)


def test_sums_of_blocks_are_accounted_for():
    """One copy of the sums for the layers of a block, the embedding's among them, and the products with them."""
    with torch.device("meta"):
        plain, blocks = model(None), model(2)
    few, many = (account(lm) for lm in (plain, blocks))
    assert few.per_token.forward < many.per_token.forward < 1.1 * few.per_token.forward
    assert few.state(50) == many.state(50)
    (without, _), (layers, _) = (footprints(lm, 128) for lm in (plain, blocks))
    more = [layer.saved - one.saved for layer, one in zip(layers, without, strict=True)]
    stream = 128 * 32 * 4
    assert more[2] > 2 * stream and more[4] > 3 * stream  # these begin blocks
    assert more[4] > more[2] and more[3] < more[2] + 2 * stream
    again = [layer.under("full")[0] for layer in layers]
    assert again == [2 * stream, stream, 3 * stream, stream, 4 * stream]


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="attnres_block=0: must be at least 1, or null for none"):
        model(0)
    with pytest.raises(ValueError, match="mixer_residual_scale=0.5: must be its default with attnres_block=2"):
        LM(**options(mixer_residual_scale=0.5))
    with pytest.raises(ValueError, match="residual=normed: must be its default with attnres_block=2"):
        LM(**options(residual="normed"))
    with torch.device("meta"), pytest.raises(ValueError, match="target=hidden: must be logits: layers hand more"):
        student = LM(**{**options(), "pattern": ["attention"]})
        refuse(DistillSettings(teacher="x", target="hidden"), model(), student)
    with pytest.raises(ValueError, match="model.attnres_block=2: must be null, as in"):
        of_model(_section() | {"attnres_block": 2})


def _section() -> dict[str, Any]:
    from launch.config.compose import composed

    return composed(["model=llama_tiny"]).to_dict()["model"]
