"""Multi-token prediction has the loss and the gradients of a loop over documents, on any ranks."""

import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import models.lm as lm_module
import parallel.sequence.place as placing
from launch.config.compose import composed
from launch.run.export import written
from models.accounting import account
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.mtp import Ahead, MTPModule
from models.sequence import Whole
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.runner import Pipeline
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.stages import given
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from tests.jobs import overrides
from tests.parity import BALANCE, VOCABULARY, Sample, assert_close, counted, logical
from train.build import build
from train.checkpoints import checkpoint
from train.checkpoints.hf_reader import Published
from train.distill import refuse
from train.distill_settings import DistillSettings
from train.execute import Executor
from train.loss import mean_ahead, sums
from train.time_spans import Spans

FP64, WEIGHT, MODULES = torch.float64, 0.3, 2
Found = tuple[float, dict[str, np.ndarray]]
BROKEN = "shifted after the cut"
# Documents that end on a border of ranks and a token or two behind it, and some that are shorter than a module looks.
BATCH = [
    Sample((31, 32, 1, 2, 3, 27)),
    Sample((40, 5, 3), seed=1, masked=(17, 29), padding=3),
    Sample((26, 6, 1), seed=2),
    Sample((3,), seed=3),
]
LENGTHS = [len(s.tokens) for s in BATCH]


def _options(tied: bool = False) -> dict[str, Any]:
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12)
    blocks = {
        "gla": partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=moe),
        "attention": partial(Block, mixer=partial(MIXERS["attention"], heads=4), ffn=partial(SwiGLU, hidden=24)),
        "ahead": partial(Block, mixer=partial(MIXERS["gated_deltanet"], heads=2), ffn=moe),
    }
    sizes = {"vocabulary": VOCABULARY, "dim": 32, "layers": 2, "pattern": ["gla", "attention"], "blocks": blocks}
    return {**sizes, "mtp_layers": MODULES, "mtp_block": "ahead", "tied": tied, "embedding_scale": 1.5}


def model(tied: bool = False) -> LM:
    """A linear and a softmax layer, and modules of a third kind, which has experts as one of the layers has."""
    return LM(**_options(tied))


def alone(tied: bool = False) -> Found:
    """Loss and gradients from the paper's equations 21 to 25, a document at a time: what has no token ahead is cut off
    in front of each module, and nothing is masked."""
    lm = initialise(model(tied).to(FP64), seed=1)
    lm.compute = FP64
    weight_VD = lm.embedding * 32**-0.5 if tied else lm.head.weight
    nats, balance = [torch.zeros((), dtype=FP64) for _ in range(1 + MODULES)], torch.zeros((), dtype=FP64)
    asked = [0] * (1 + MODULES)

    def normed(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale

    def even(routing: Any) -> Tensor:
        """The balance loss of a document (2101.03961, equation 4), times its tokens."""
        chosen = F.one_hot(routing.choices, 4).sum(-2).to(FP64)
        return (4 / 2) * (chosen.mean(1) * routing.probabilities.sum(1)).sum()

    def learn(k: int, hidden: Tensor, targets: Tensor) -> None:
        nats[k] += F.cross_entropy((hidden @ weight_VD.T)[0], targets, ignore_index=-100, reduction="sum")
        asked[k] += int((targets != -100).sum())

    for s in BATCH:
        begins = [i for i in range(int(s.counted.sum())) if s.positions[i] == 0]
        for begin, end in zip(begins, [*begins[1:], int(s.counted.sum())], strict=True):
            tokens, targets = (torch.from_numpy(x[begin:end]) for x in (s.tokens, s.targets))
            x, seq = lm.embedding[tokens][None] * 1.5, Whole.of(torch.arange(end - begin)[None])
            x, routing, _ = lm.layers["0"](x, seq)
            x = normed(lm.layers["1"](x, seq)[0], lm.norm.weight)
            learn(0, x, targets)
            balance += even(routing)
            for k in range(1, 1 + MODULES):
                left = len(tokens) - k
                if left < 1:
                    break
                module: Any = lm.mtp[str(k - 1)]
                embedded = normed(lm.embedding[tokens[k:]][None] * 1.5, module.embedding_norm.weight)
                joined = torch.cat((embedded, normed(x[:, :left], module.hidden_norm.weight)), -1)
                x, routing, _ = module.block(joined @ module.join.weight.T, Whole.of(torch.arange(left)[None]))
                x = normed(x, module.norm.weight)
                learn(k, x, targets[k:])
                balance += even(routing)
    loss = nats[0] / asked[0] + BALANCE * balance / (1 + MODULES) / counted(BATCH)
    loss = loss + WEIGHT / MODULES * sum(n / count for n, count in zip(nats[1:], asked[1:], strict=True))
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in lm.named_parameters()}


class Case(NamedTuple):
    mesh: Mesh
    tied: bool = False
    remat: str = "none"
    each: int | None = None  # tokens that a rank holds in a micro-step
    spans: Spans | None = None
    plan: Plan | None = None


def unequal() -> Plan:
    """Four ranks: spans whose borders lie one and two tokens before and behind ends of documents, two spans on a rank,
    an idle rank."""
    first = MicroStep((Group((0, 1, 2, 3), (0,), (((0, 30),), ((30, 32),), ((32, 64),), ((64, 96),))),))
    second = MicroStep(
        (
            Group((0, 2), (2, 3), (((0, 9), (27, 36)), ((9, 18), (18, 27)))),
            Group((1, 3), (1,), (((0, len(BATCH[1].tokens)),), ())),
        )
    )
    return Plan(0, tuple(LENGTHS), (first, second))


CASES = {
    2: {
        "sequence": Case(Mesh(sequence=2)),
        "data, recomputed, in two micro-steps": Case(Mesh(data=2), remat="full", each=100),
        "tensor, tied": Case(Mesh(tensor=2), tied=True),
        "experts": Case(Mesh(expert=2)),
        "pipeline": Case(Mesh(pipeline=2), each=100),
        "spans in time": Case(Mesh(sequence=2), spans=Spans(13)),
    },
    4: {
        "unequal spans": Case(Mesh(sequence=4), plan=unequal()),
        "data and sequence": Case(Mesh(data=2, sequence=2), tied=True, remat="selective", each=60),
    },
}


def trained(case: Case) -> Found:
    """Loss and gradients of a step by the executor on this world."""
    mesh, device = case.mesh, torch.device("cpu")
    groups, meshes = Groups(mesh), Meshes(mesh, device)
    with torch.device("meta"):
        lm = model(case.tied)
    lm.compute, lm.loss_chunk = FP64, 13
    cut = PipelineCut.of(lm, given((1, 1)), 2) if mesh.pipeline > 1 else None
    experts = {"layers.0": 4, "mtp.0": 4, "mtp.1": 4} if cut else {}
    parallelise(lm, meshes, seed=1, dtype=FP64, remat=case.remat, reshard_after_forward=True, cut=cut)
    pipeline = Pipeline(lm, cut, "1f1b", meshes) if cut else None
    options: dict[str, Any] = {"mtp": lm.mtp_layers, "mtp_weight": WEIGHT, "pipeline": pipeline, "experts": experts}
    executor = Executor(lm, groups, device, GatherEffects(), GatherKeys(), BALANCE, spans=case.spans, **options)
    data, sequence = mesh.split
    plan = case.plan or Static(tokens_per_rank=case.each).plan(0, LENGTHS, data=data, sequence=sequence)
    tally = executor.train(plan, BATCH)
    own = torch.cat((torch.stack((tally.cross_entropy, tally.balance)), tally.ahead)).double() * groups.counts
    nats, balance, *ahead = groups.all_comm.all_reduce(own, purpose="loss").tolist()
    targets = [sum(int((placing.shifted(s.targets, s.positions, k, -100) >= 0).sum()) for s in BATCH) for k in (1, 2)]
    loss = nats / sum(int((s.targets != -100).sum()) for s in BATCH) + BALANCE * balance / counted(BATCH)
    loss += WEIGHT * mean_ahead(ahead, targets)
    gradients = {parameter_name(n): p.grad for n, p in lm.named_parameters() if p.grad is not None}
    return loss, {name: x.numpy() for name, x in logical(lm, gradients).items()}


def shift_after_the_cut() -> None:
    """Each rank shifts what it holds: the last tokens of its spans see nothing ahead."""

    def within(values: Tensor, positions: Tensor, by: int, missing: int) -> Tensor:
        rows = zip(values.numpy(), positions.numpy(), strict=True)
        return torch.from_numpy(np.stack([placing.shifted(*row, by, missing) for row in rows]))

    def cut(tokens: Any, targets: Any, positions: Any, mtp: int, rows: Any) -> Ahead:
        found = [
            [within(rows(x), rows(positions), k + 1, m) for k in range(mtp)] for x, m in ((tokens, -1), (targets, -100))
        ]
        return Ahead(*map(torch.stack, found))

    placing._ahead = cut


def every(world: int) -> dict[str, Found]:
    found = {name: trained(case) for name, case in CASES[world].items()}
    if world == 2:
        shift_after_the_cut()
        found[BROKEN] = trained(CASES[2]["sequence"])
    return found


@pytest.fixture(scope="module")
def exact() -> dict[bool, Found]:
    return {tied: alone(tied) for tied in (False, True)}


@pytest.mark.dist
@pytest.mark.parametrize("world", CASES)
def test_ranks_have_the_loss_and_the_gradients_of_the_paper(run, exact, world):
    found = run(world, every, world)
    for name, case in CASES[world].items():
        (loss, gradients), held = exact[case.tied], set()
        for rank in found:
            held |= set(rank[name][1])
            assert_close(rank[name], (loss, {n: gradients[n] for n in rank[name][1]}), "fp64")
        assert held == set(gradients), name
    if BROKEN in found[0]:
        with pytest.raises(AssertionError):
            assert_close(found[0][BROKEN], exact[False], "fp64")


def one_process(lm: LM) -> Found:
    """By `LM` itself, whole packed sequences."""
    lm.compute, total = FP64, 0.0
    asked = placing.targets_ahead(BATCH, MODULES)
    for s in BATCH:
        tokens, targets, positions = (x[s.counted] for x in (s.tokens, s.targets, s.positions))
        ahead = placing._ahead(tokens, targets, positions, MODULES, lambda x: torch.from_numpy(x)[None])
        given = (torch.from_numpy(x)[None] for x in (tokens, targets))
        part = sums(lm(next(given), Whole.of(torch.from_numpy(positions)[None]), next(given), ahead=ahead))
        counts = {"targets": sum(int((s.targets != -100).sum()) for s in BATCH), "tokens": counted(BATCH)}
        loss = part.objective(**counts, balance_weight=BALANCE, mtp_weight=WEIGHT, targets_ahead=asked)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.numpy() for name, p in lm.named_parameters()}


def test_the_objective_is_its_formula(exact):
    assert_close(one_process(initialise(model().to(FP64), seed=1)), exact[False], "fp64")


def reach_over_the_end_of_a_document(monkeypatch):
    def shifted(values, positions, by, missing):
        return np.append(values[by:], np.full(min(by, len(values)), missing))

    monkeypatch.setattr(placing, "shifted", shifted)


def join_the_halves_in_the_other_order(monkeypatch):
    honest = MTPModule.forward
    monkeypatch.setattr(MTPModule, "forward", lambda self, hidden, seq, embedded: honest(self, embedded, seq, hidden))


def count_places_without_a_token_ahead(monkeypatch):
    monkeypatch.setattr(lm_module, "counting", lambda seq, counted: seq)


@pytest.mark.parametrize(
    "mutation",
    [
        reach_over_the_end_of_a_document,
        join_the_halves_in_the_other_order,
        count_places_without_a_token_ahead,
    ],
)
def test_a_mutation_is_seen(monkeypatch, exact, mutation):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        assert_close(one_process(initialise(model().to(FP64), seed=1)), exact[False], "fp64")


def test_without_tokens_ahead_the_modules_do_not_run():
    lm = initialise(model().to(FP64), seed=1)
    lm.compute, tokens = FP64, torch.from_numpy(BATCH[0].tokens)[None]
    plain = LM(**{**_options(), "mtp_layers": 0}).to(FP64)
    plain.load_state_dict({n: x for n, x in lm.state_dict().items() if not n.startswith("mtp.")})
    plain.compute, seq = FP64, Whole.of(torch.from_numpy(BATCH[0].positions)[None])
    a, b = lm(tokens, seq), plain(tokens, seq)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.balance, b.balance) and a.load.keys() == b.load.keys()
    assert a.ahead is None


def test_the_costs_of_modules_are_those_of_training_and_not_of_generating():
    with torch.device("meta"):
        with_modules, plain = account(model()), account(LM(**{**_options(), "mtp_layers": 0}))
    assert len(with_modules.ahead) == MODULES and with_modules.layers == plain.layers
    more = sum(module.per_token.model for module in with_modules.ahead)
    assert with_modules.per_token.model == pytest.approx(plain.per_token.model + more)
    assert with_modules.head == plain.head and with_modules.state(50) == plain.state(50)
    own = 3 * 2 * (2 * 32 * 32 + 32 * VOCABULARY)  # the projection and the head, forward and twice backward
    assert with_modules.ahead[0].per_token.model > own


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="mtp_layers=-1: must be 0 for none, or up to 64"):
        LM(**{**_options(), "mtp_layers": -1})
    with pytest.raises(ValueError, match="mtp_block=x: must be one of gla, attention, ahead, or null"):
        LM(**{**_options(), "mtp_block": "x"})
    blocks = {"rwkv7": partial(Block, mixer=partial(MIXERS["rwkv7"], heads=2), ffn=partial(SwiGLU, hidden=24))}
    options: dict[str, Any] = {"vocabulary": 9, "dim": 32, "layers": 2, "pattern": ["rwkv7"], "mtp_layers": 1}
    with pytest.raises(ValueError, match="mtp_block=rwkv7: must be a kind of layer that takes nothing from earlier"):
        LM(blocks=blocks, **options)
    with torch.device("meta"), pytest.raises(ValueError, match="teacher=x: must be null with model.mtp_layers=2"):
        refuse(DistillSettings(teacher="x"), model(), model())


def fitted(job: dict[str, Any]) -> None:
    build(job).fit()


@pytest.mark.dist
def test_a_run_records_the_loss_apart_and_its_export_says_what_it_leaves_out(run, tmp_path):
    plain = [each for each in overrides(tmp_path) if "blocks" not in each and "pattern" not in each]
    sizes = ["model.dim=32", "model.blocks.attn.ffn.hidden=24", "train.steps=3", "train.batch_tokens=192"]
    config = composed([*plain, "model=llama_tiny", *sizes, "model.mtp_layers=1", "cluster.workers=1"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    run(1, fitted, {"config": config, "run_dir": str(folder), "device": "cpu"})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, ends = [r for r in records if "mtp_loss" in r], [r for r in records if "heldout_loss" in r]
    assert len(steps) == 3 and all(r["mtp_loss"] != r["loss"] and 4 < r["mtp_loss"] < 8 for r in steps)
    assert len(ends) == 1 and ends[0].get("mtp_loss") in (None, steps[-1]["mtp_loss"])
    (saved,) = (folder / "checkpoints").iterdir()
    said = written(saved, tmp_path / "out")
    assert any(line.startswith("left out: mtp.0.") and "(model.mtp_layers=1)" in line for line in said), said
    published = Published(tmp_path / "out")
    assert not published.left_out and published.model.get("mtp_layers", 0) == 0
    own = torch.empty(config.model["vocabulary"], 32)
    checkpoint.read({"model": {"embedding": own}}, saved, alone=True)
    assert torch.equal(published.read("embedding", 0, len(own)), own)
