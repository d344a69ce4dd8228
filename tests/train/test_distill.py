"""A run that distils has the loss and the gradients of one process, by formulas written out here, on any ranks."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import distillation
from models.axes import initialise
from models.block import Block
from models.distillation import MatchLogits, read_head
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Whole
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.mesh import Mesh
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.place import Placed
from parallel.sequence.states import GatherEffects
from tests.parity import BALANCE, VOCABULARY, Sample, assert_close, counted, logical
from train import distill
from train.distill import Teacher, refuse, unlike
from train.distill_settings import DistillSettings
from train.execute import Executor
from train.loss import distilled

FP64 = torch.float64
BATCH = [Sample((9, 14, 1, 2, 22)), Sample((31, 5), seed=1, masked=(4, 11)), Sample((17, 6), seed=2, padding=6)]
SETTINGS = {
    "logits": DistillSettings(teacher="somewhere", weight=0.7, temperature=1.5),
    "hidden": DistillSettings(teacher="somewhere", target="hidden"),
}
MESHES = {"sequence": Mesh(sequence=2), "data": Mesh(data=2), "expert": Mesh(expert=2)}


def hybrid(*mixers: str) -> LM:
    """Layers of these mixers, with dense and expert feed-forwards in turns."""
    made = {"gla": {"heads": 2}, "gated_deltanet": {"heads": 2}, "attention": {"heads": 4, "kv_heads": 2}}
    ffns = [partial(SwiGLU, hidden=24), partial(MoE, num_experts=4, top_k=2, hidden=12)]
    blocks = {
        f"{i}": partial(Block, mixer=partial(MIXERS[name], **made[name]), ffn=ffns[i % 2])
        for i, name in enumerate(mixers)
    }
    return LM(vocabulary=VOCABULARY, dim=32, layers=len(mixers), pattern=list(blocks), blocks=blocks)


student, teacher = partial(hybrid, "gla", "gated_deltanet", "attention"), partial(hybrid, *3 * ["attention"])


def alone(target: str) -> tuple[float, dict[str, np.ndarray]]:
    """One process, one sequence at a time, without its padding; by torch's own functions."""
    settings = SETTINGS[target]
    ours, theirs = (initialise(lm().to(FP64), seed=seed) for lm, seed in ((student, 1), (teacher, 2)))
    ours.compute = theirs.compute = FP64
    targets = sum(int((s.targets != -100).sum()) for s in BATCH)
    total = torch.zeros((), dtype=FP64)
    for s in BATCH:
        tokens, targeted, positions = (torch.from_numpy(x[s.counted]) for x in (s.tokens, s.targets, s.positions))
        seq, asked = Whole.of(positions[None]), targeted != -100
        if target == "logits":
            out = ours(tokens[None], seq)
            with torch.no_grad():
                taught = theirs(tokens[None], Whole.of(positions[None])).logits[0][asked]
            heat, logits = settings.temperature, out.logits[0][asked]
            apart = F.kl_div((logits / heat).log_softmax(-1), (taught / heat).softmax(-1), reduction="sum")
            nats = F.cross_entropy(logits, targeted[asked], reduction="sum")
            total += (0.3 * nats + 0.7 * heat**2 * apart) / targets + BALANCE * out.balance / counted(BATCH)
            continue
        x = theirs.embedding[tokens][None].detach()
        for i in range(3):
            with torch.no_grad():
                t = theirs.layers[str(i)](x, Whole.of(positions[None]))[0]
            if i < 2:
                y = ours.layers[str(i)](x, seq)[0]
                errors = (y - t).square().sum(-1) / (t - x).square().sum(-1)
                total += errors[0][asked].sum() / 2 / targets
            x = t
    total.backward()
    trained = ("layers.0.mixer.", "layers.1.mixer.") if target == "hidden" else ("",)
    return total.item(), {n: p.grad.numpy() for n, p in ours.named_parameters() if n.startswith(trained)}


def on_ranks(target: str, mesh: Mesh) -> tuple[float, dict[str, np.ndarray]]:
    """The same by the executor on this world."""
    groups, settings = Groups(mesh), SETTINGS[target]
    meshes = Meshes(mesh, torch.device("cpu"))
    with torch.device("meta"):
        ours, theirs = student(), teacher()
    ours.compute = theirs.compute = FP64
    layers = unlike(theirs, ours)
    if target == "hidden":
        distill._freeze(ours, layers)
    how = {"dtype": FP64, "remat": "none", "reshard_after_forward": True}
    for lm, seed in ((theirs, 2), (ours, 1)):
        parallelise(lm, meshes, seed=seed, **how)
    placed = Teacher(theirs.requires_grad_(False), settings, layers)
    executor = Executor(ours, groups, torch.device("cpu"), GatherEffects(), GatherKeys(), BALANCE, teacher=placed)
    data, sequence = mesh.split
    ours.loss_chunk = 13
    tally = executor.train(Static().plan(0, [len(s.tokens) for s in BATCH], data=data, sequence=sequence), BATCH)
    targets = sum(int((s.targets != -100).sum()) for s in BATCH)
    sums = groups.world_comm.all_reduce(
        torch.stack((tally.cross_entropy, tally.divergence, tally.balance)).double(), purpose="loss"
    ).tolist()
    if target == "hidden":
        loss = sums[0] / targets
    else:
        loss = (0.3 * sums[0] + 0.7 * 1.5**2 * sums[1]) / targets + BALANCE * sums[2] / counted(BATCH)
    gradients = {parameter_name(n): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    return loss, {name: x.numpy() for name, x in logical(ours, gradients).items()}


def every(targets: list[str], meshes: list[str]) -> dict[tuple[str, str], tuple[float, dict[str, np.ndarray]]]:
    return {(target, mesh): on_ranks(target, MESHES[mesh]) for target in targets for mesh in meshes}


@pytest.mark.dist
def test_both_objectives_on_two_ranks_are_those_of_one_process(run):
    found = run(2, every, list(SETTINGS), list(MESHES))
    for target in SETTINGS:
        want = alone(target)
        for rank in found:
            for mesh in MESHES:
                assert_close(rank[target, mesh], want, "fp64")


def one_process(target: str) -> tuple[float, dict[str, np.ndarray]]:
    """As `alone`, by the objectives themselves."""
    ours, theirs = (initialise(lm().to(FP64), seed=seed) for lm, seed in ((student, 1), (teacher, 2)))
    ours.compute = theirs.compute = FP64
    layers = unlike(theirs, ours)
    if target == "hidden":
        distill._freeze(ours, layers)
    placed, total = Teacher(theirs, SETTINGS[target], layers), 0.0
    targets = sum(int((s.targets != -100).sum()) for s in BATCH)
    for s in BATCH:
        own = (torch.from_numpy(x[s.counted])[None] for x in (s.tokens, s.targets, s.positions))
        tokens, targeted, positions = own
        asked = placed.objective(Placed(tokens, targeted, Whole.of(positions)))
        part = distilled(ours(tokens, Whole.of(positions), targeted, objective=asked))
        loss = part.objective(targets=targets, tokens=counted(BATCH), balance_weight=BALANCE)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.numpy() for n, p in ours.named_parameters() if p.grad is not None}


def forget_the_mask(monkeypatch):
    monkeypatch.setattr(distillation, "NO_TARGET", -7)


def align_to_what_enters(monkeypatch):
    honest = distillation.AlignLayers.__call__
    shifted = lambda self, *given: honest(replace(self, streams=[self.streams[0], *self.streams[:-1]]), *given)  # noqa: E731
    monkeypatch.setattr(distillation.AlignLayers, "__call__", shifted)


def leave_the_teacher_at_its_own_temperature(monkeypatch):
    honest = distillation.MatchLogits.__call__

    def cooled(self, *given):
        taught = self.taught._replace(x=self.taught.x * self.temperature)
        return honest(replace(self, taught=taught), *given)

    monkeypatch.setattr(distillation.MatchLogits, "__call__", cooled)


@pytest.mark.parametrize("target", SETTINGS)
def test_the_objectives_are_their_formulas(target):
    assert_close(one_process(target), alone(target), "fp64")


@pytest.mark.parametrize(
    ("target", "mutation"),
    [
        ("logits", forget_the_mask),
        ("hidden", forget_the_mask),
        ("hidden", align_to_what_enters),
        ("logits", leave_the_teacher_at_its_own_temperature),
    ],
)
def test_a_mutation_of_an_objective_is_seen(monkeypatch, target, mutation):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        assert_close(one_process(target), alone(target), "fp64")


def test_a_share_of_one_and_the_students_own_logits_leave_nothing_to_learn():
    ours = initialise(student().to(FP64), seed=1)
    ours.compute = FP64
    s = BATCH[0]
    tokens, targets, positions = (torch.from_numpy(x)[None] for x in (s.tokens, s.targets, s.positions))
    taught = ours(tokens, Whole.of(positions), targets, objective=read_head)
    found = ours(tokens, Whole.of(positions), targets, objective=MatchLogits(taught, 1.0, 2.0))
    found.objective.backward()
    assert abs(found.divergence.item()) < 1e-12
    assert max(p.grad.abs().max().item() for p in ours.parameters()) < 1e-12
    plain = ours(tokens, Whole.of(positions), targets).cross_entropy
    assert found.output.cross_entropy.item() == pytest.approx(plain.item(), rel=1e-12)


def test_models_that_do_not_fit_are_refused_by_name():
    with torch.device("meta"):
        ours, theirs, shorter = student(), teacher(), hybrid("attention")
    refuse(SETTINGS["hidden"], theirs, ours)
    with pytest.raises(ValueError, match="teacher=somewhere: must have layers=3 as this model with target=hidden"):
        refuse(SETTINGS["hidden"], shorter, ours)
    refuse(SETTINGS["logits"], shorter, ours)
    with pytest.raises(ValueError, match="target=hidden: must be logits: every layer has a mixer of the teacher"):
        refuse(SETTINGS["hidden"], theirs, theirs)
    ours.vocabulary = 99
    with pytest.raises(ValueError, match=f"teacher=somewhere: must have 99 tokens .* has {VOCABULARY}"):
        refuse(SETTINGS["logits"], theirs, ours)
