"""Hyper-connections have the loss and the gradients of the papers' formulas, along the depth and on any ranks."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models.hyper as hyper_module
from launch.cli import main
from models.accounting import account
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.footprint import footprints
from models.hub import of_model
from models.hyper import HyperConnection, doubly_stochastic
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
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

FP64, LAYERS, STREAMS, DIM = torch.float64, 4, 3, 32
Found = tuple[float, dict[str, np.ndarray]]
BATCH = [Sample((31, 33, 1, 2, 29)), Sample((40, 5, 3), seed=1, masked=(17, 29), padding=3)]
LENGTHS = [len(s.tokens) for s in BATCH]
TARGETS = sum(int((s.targets != -100).sum()) for s in BATCH)
PARTS = [(0, "mixer"), (0, "ffn"), (1, "mixer"), (2, "ffn"), (3, "mixer"), (3, "ffn")]


def options(mixing: str = "manifold", streams: int | None = STREAMS, **more: Any) -> dict[str, Any]:
    dense = partial(SwiGLU, hidden=24)
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12, balance="none")
    blocks = {
        "gla": partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=moe, **more),
        "alone": partial(Block, mixer=None, ffn=dense),
        "attention": partial(Block, mixer=partial(MIXERS["attention"], heads=4), ffn=None, norms="both"),
    }
    pattern = ["gla", "attention", "alone"]
    sizes = {"vocabulary": VOCABULARY, "dim": DIM, "layers": LAYERS, "pattern": pattern, "blocks": blocks}
    return {**sizes, "hyper_connections": streams, "hyper_mixing": mixing}


def model(mixing: str = "manifold", streams: int | None = STREAMS) -> LM:
    """Layers with two parts, and with either alone."""
    return LM(**options(mixing, streams))


def moved(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that are added to a parameter of a connection, so that no weight is where it starts."""
    count = int(np.prod(shape))
    large = 2.0 if name.endswith("scale") else 0.5
    return large * torch.sin(torch.arange(count, dtype=FP64) * 1.7 + len(name)).view(shape)


def is_connection(name: str) -> bool:
    return "_streams." in name


def started(lm: LM) -> LM:
    lm = initialise(lm.to(FP64), seed=1)
    lm.compute = FP64
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if is_connection(name):
                p += moved(name, tuple(p.shape))
    return lm


def sinkhorn(logits: Tensor) -> Tensor:
    """mHC, equation 9: rows behind columns, from exp of the logits."""
    m = logits.exp()
    for _ in range(20):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def mapped(p: Any, streams: list[Tensor], mixing: str) -> tuple[Tensor, Tensor, Tensor]:
    """pre [..., S], post [..., S] and res [..., S, S] by the papers' equations."""
    n = len(streams)
    if mixing == "manifold":  # mHC, equations 7 and 8
        flat = torch.cat(streams, -1)
        z = (flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ p.weight.T
        b, (pre, post, res) = p.bias, p.scale
        pre = torch.sigmoid(pre * z[..., :n] + b[:n])
        post = 2 * torch.sigmoid(post * z[..., n : 2 * n] + b[n : 2 * n])
        return pre, post, sinkhorn((res * z[..., 2 * n :] + b[2 * n :]).unflatten(-1, (n, n)))
    rows = []  # hyper-connections, equations 10 to 13: of each stream its row of [A_r | A_m | B]
    for i, x in enumerate(streams):
        row = p.bias[i].expand(*x.shape[:-1], n + 2)
        if mixing == "dynamic":
            bent = torch.tanh((x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ p.weight.T)
            row = row + torch.cat((bent[..., : n + 1] * p.scale[0], bent[..., n + 1 :] * p.scale[1]), -1)
        rows.append(row)
    all_rows = torch.stack(rows, -2)
    return all_rows[..., n], all_rows[..., n + 1], all_rows[..., :n].mT


def alone(mixing: str = "manifold") -> Found:
    """By the papers' equations, a part at a time, from a list of streams."""
    lm, total = started(model(mixing)), torch.zeros((), dtype=FP64)
    for s in BATCH:
        tokens, targets, positions = (torch.from_numpy(x[s.counted]) for x in (s.tokens, s.targets, s.positions))
        seq = Whole.of(positions[None])
        streams = [lm.embedding[tokens][None]] * STREAMS
        for i, part in PARTS:
            layer: Any = lm.layers[str(i)]
            pre, post, res = mapped(getattr(layer, f"{part}_streams"), streams, mixing)
            read = sum(pre[..., j, None] * x for j, x in enumerate(streams))
            normed = getattr(layer, f"{part}_norm")(read)
            y = layer.mixer(normed, seq, slot=f"layers.{i}") if part == "mixer" else layer.ffn(normed, seq)[0]
            y = getattr(layer, f"{part}_post_norm")(y)
            streams = [
                sum(res[..., k, j, None] * x for j, x in enumerate(streams)) + post[..., k, None] * y
                for k in range(STREAMS)
            ]
        out = lm.norm(sum(streams) / STREAMS)
        total = total + F.cross_entropy((out @ lm.head.weight.T)[0], targets, ignore_index=-100, reduction="sum")
    loss = total / TARGETS
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in lm.named_parameters()}


def one_process(mixing: str = "manifold") -> Found:
    lm, total = started(model(mixing)), 0.0
    for s in BATCH:
        tokens, targets, positions = (torch.from_numpy(x[s.counted])[None] for x in (s.tokens, s.targets, s.positions))
        loss = sums(lm(tokens, Whole.of(positions), targets)).cross_entropy / TARGETS
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.numpy() for name, p in lm.named_parameters()}


@pytest.mark.parametrize("mixing", ["manifold", "dynamic", "static"])
def test_a_model_is_the_formulas_of_the_papers(mixing):
    assert_close(one_process(mixing), alone(mixing), "fp64")


def test_the_streams_of_a_manifold_mix_by_a_doubly_stochastic_matrix():
    matrix = doubly_stochastic(torch.randn(5, 4, 4, dtype=FP64, generator=torch.Generator().manual_seed(0)))
    ones = torch.ones(5, 4, dtype=FP64)
    assert torch.allclose(matrix.sum(-1), ones, atol=1e-14) and torch.allclose(matrix.sum(-2), ones, atol=1e-3)
    assert torch.linalg.matrix_norm(matrix, 2).max() < 1 + 1e-3


def leave_out_the_constraint(monkeypatch):
    monkeypatch.setattr(hyper_module, "doubly_stochastic", torch.exp)


def divide_rows_first(monkeypatch):
    honest = doubly_stochastic
    monkeypatch.setattr(hyper_module, "doubly_stochastic", lambda logits: honest(logits.mT).mT)


def mix_by_the_transpose(monkeypatch):
    honest = HyperConnection.weights
    monkeypatch.setattr(HyperConnection, "weights", lambda self, x: (w := honest(self, x))._replace(res=w.res.mT))


@pytest.mark.parametrize("mutation", [leave_out_the_constraint, divide_rows_first, mix_by_the_transpose])
def test_a_mutation_is_seen(monkeypatch, mutation):
    want = alone()
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        assert_close(one_process(), want, "fp64")


class Case(NamedTuple):
    mesh: Mesh
    mixing: str = "manifold"
    remat: str = "none"
    each: int | None = None  # tokens that a rank holds in a micro-step
    spans: Spans | None = None


CASES = {
    "sequence, recomputed": Case(Mesh(sequence=2), remat="full"),
    "data": Case(Mesh(data=2), "dynamic", each=100),
    "tensor": Case(Mesh(tensor=2)),
    "pipeline": Case(Mesh(pipeline=2), each=100),
}
MORE = {
    "tensor, dynamic": Case(Mesh(tensor=2), "dynamic"),
    "experts": Case(Mesh(expert=2), remat="selective"),
    "pipeline, static": Case(Mesh(pipeline=2), "static", each=100),
    "spans in time": Case(Mesh(sequence=2), spans=Spans(13)),
}


def trained(case: Case) -> Found:
    mesh, device = case.mesh, torch.device("cpu")
    groups, meshes = Groups(mesh), Meshes(mesh, device)
    with torch.device("meta"):
        lm = model(case.mixing)
    lm.compute = FP64
    cut = PipelineCut.of(lm, given((2, 2)), 2) if mesh.pipeline > 1 else None
    parallelise(lm, meshes, seed=1, dtype=FP64, remat=case.remat, reshard_after_forward=True, cut=cut)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if is_connection(name):
                local, full = p.to_local(), moved(parameter_name(name), tuple(p.shape))
                ranks = p.device_mesh.size() if p.placements[0].is_shard() else 1
                parts = full.chunk(ranks)
                rank = p.device_mesh.get_local_rank() if ranks > 1 else 0
                if local.numel():
                    local += parts[rank]
    pipeline = Pipeline(lm, cut, "1f1b", meshes) if cut else None
    executor = Executor(lm, groups, device, GatherEffects(), GatherKeys(), 0.0, spans=case.spans, pipeline=pipeline)
    data, sequence = mesh.split
    plan = Static(tokens_per_rank=case.each).plan(0, LENGTHS, data=data, sequence=sequence)
    tally = executor.train(plan, BATCH)
    nats = groups.all_comm.all_reduce(tally.cross_entropy.double().view(1) * groups.counts, purpose="loss").item()
    gradients = {parameter_name(n): p.grad for n, p in lm.named_parameters() if p.grad is not None}
    return nats / TARGETS, {name: x.numpy() for name, x in logical(lm, gradients).items()}


def every(cases: dict[str, Case]) -> dict[str, Found]:
    return {name: trained(case) for name, case in cases.items()}


@pytest.mark.dist
@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["each axis", "more"])
def test_ranks_have_the_loss_and_the_gradients_of_the_papers(run, cases):
    want = {mixing: alone(mixing) for mixing in {case.mixing for case in cases.values()}}
    found = run(2, every, cases)
    for name, case in cases.items():
        (loss, gradients), held = want[case.mixing], set()
        for rank in found:
            held |= set(rank[name][1])
            assert_close(rank[name], (loss, {n: gradients[n] for n in rank[name][1]}), "fp64")
        assert held == set(gradients), name


@pytest.mark.parametrize("mixing", ["dynamic", "static"])
@torch.no_grad()
def test_it_starts_as_a_plain_residual_stream(mixing):
    several, plain = (initialise(model(mixing, streams).to(FP64), seed=1) for streams in (STREAMS, None))
    several.compute = plain.compute = FP64
    tokens, seq = torch.from_numpy(BATCH[0].tokens)[None], Whole.of(torch.from_numpy(BATCH[0].positions)[None])
    assert torch.allclose(several(tokens, seq).logits, plain(tokens, seq).logits, atol=1e-12)


def test_streams_are_accounted_for():
    """A layer hands on all streams; weights and products are few."""
    with torch.device("meta"):
        plain, several = (LM(**{**options(streams=n), "pattern": ["attention", "alone"]}) for n in (None, STREAMS))
    few, many = (account(lm) for lm in (plain, several))
    assert few.per_token.forward < many.per_token.forward < 2 * few.per_token.forward
    n, parts = STREAMS, LAYERS
    products = 2 * parts * (n * DIM * n * (n + 2) + n * DIM + n * n * DIM)  # weights, reading, mixing
    assert many.per_token.forward - few.per_token.forward == pytest.approx(products, rel=0.01)
    assert few.state(50) == many.state(50)
    (without, _), (layers, _) = (footprints(lm, 128) for lm in (plain, several))
    stream = 128 * DIM * 4
    assert [layer.output for layer in layers] == [n * stream] * LAYERS
    assert [layer.under("full")[0] - one.under("full")[0] for layer, one in zip(layers, without, strict=True)] == [
        (n - 1) * stream
    ] * LAYERS


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="hyper_connections=1: must lie between 2 and 16, or null for one"):
        model(streams=1)
    with pytest.raises(ValueError, match="hyper_mixing=x: must be one of manifold, dynamic, static"):
        model("x")
    with pytest.raises(ValueError, match="hyper_connections=3: must be null with attnres_block=2"):
        LM(**options(), attnres_block=2)
    with pytest.raises(ValueError, match="residual=normed: must be its default with hyper_connections=3"):
        LM(**options(residual="normed"))
    with torch.device("meta"), pytest.raises(ValueError, match="target=hidden: must be logits: layers hand more"):
        student = LM(**{**options(), "pattern": ["attention"]})
        refuse(DistillSettings(teacher="x", target="hidden"), model(), student)
    with pytest.raises(ValueError, match="model.hyper_connections=4: must be null, as in"):
        of_model(_section() | {"hyper_connections": 4})


def _section() -> dict[str, Any]:
    from launch.config.compose import composed

    return composed(["model=llama_tiny"]).to_dict()["model"]


@pytest.mark.parametrize("more", [pytest.param([], marks=pytest.mark.slow), ["model.hyper_mixing=free"]])
def test_a_user_plans_it(capsys, more):
    """A configuration with streams has a plan, and a kind of mixing that is none is refused in one line."""
    refused = main(["plan", "experiment=smoke", "cluster=none", "model.hyper_connections=2", *more])
    said = capsys.readouterr()
    assert refused == (2 if more else 0) and ("parameters" in said.out) == (not more)
    if more:
        (line,) = said.err.splitlines()
        assert "hyper_mixing=free: must be one of manifold, dynamic, static" in line
