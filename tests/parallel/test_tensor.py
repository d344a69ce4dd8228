"""Layers divided over tensor ranks, and copies of shards, against one process: losses, gradients, norms, checkpoints.

`make tensor` prints how far every mixer is from one process, at two tensor ranks and with two sequence ranks to each.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

import parallel.matrix_pieces
import parallel.tensor
import parallel.tensor_loss
import train.execute
from models.axes import declarations, initialise
from models.block import Block
from models.ffn import MLP, SwiGLU
from models.linear import Linear
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from parallel.collectives import LEDGER, LedgerEntry
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.comm_volume import How
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Plan
from parallel.schedule.static import Static
from parallel.tensor import TensorPiece, division
from tests.parallel.test_mixers import BUILDS
from tests.parallel.test_parity import BATCH
from tests.parity import TOLERANCE, VOCABULARY, differences, logical, mixer_model, small_model, spread, truth
from tests.world import run_world
from train.checkpoints import checkpoint, saving
from train.metrics.width_trace import of_step
from train.optim import AdamW, Muon
from train.optim.build import build_optimizer
from train.optim.clip import clip, layer_norms

pytestmark = pytest.mark.dist

SHORT = BATCH[2:]  # documents that end on a span's edge, and one shorter than a convolution


def shared() -> LM:
    """Fewer key heads than four ranks, B and C shared by heads, a tied head, a gate on the shared expert, a vocabulary
    that does not divide."""
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12, shared_hidden=8, shared_gate=True)
    biases = {"norm_heads": "all", "qkv_bias": True, "out_bias": True}
    heads = partial(MIXERS["attention"], heads=4, kv_heads=2, gate=True, qk_norm=True, **biases)
    blocks = {
        "attention": partial(Block, mixer=heads, ffn=moe, norms="both"),
        "mamba2": partial(Block, mixer=partial(MIXERS["mamba2"], heads=4, groups=2, state=8), ffn=None),
        "gdn": partial(
            Block,
            mixer=partial(MIXERS["gated_deltanet"], heads=4),
            ffn=partial(MLP, hidden=24, bias=True),
            norms="post",
        ),
    }
    return LM(vocabulary=VOCABULARY + 1, dim=32, layers=3, pattern=list(blocks), blocks=blocks, tied=True)


def parts() -> LM:
    """A mixer beside another, a feed-forward alone, experts of relu² and of two biases, LayerNorm, a residual stream of
    what was normed, and capped logits."""
    heads = partial(MIXERS["attention"], heads=4, kv_heads=2)
    mamba = partial(MIXERS["mamba2"], heads=4, groups=2, state=8, out_norm="none", dt_min=0.2)
    clamped = partial(MoE, num_experts=4, top_k=2, hidden=12, expert="clamped", bias=True)
    squared = partial(MoE, num_experts=4, top_k=2, hidden=12, expert="relu2", shared_hidden=8)
    scales = {"mixer_residual_scale": 1.5, "ffn_residual_scale": 0.7}
    blocks = {
        "beside": partial(Block, mixer=mamba, beside=heads, ffn=clamped, norm="layer"),
        "squared": partial(Block, mixer=None, ffn=squared, norms="both"),
        "normed": partial(Block, mixer=heads, ffn=partial(SwiGLU, hidden=24, bias=True), residual="normed", **scales),
    }
    cap: dict[str, Any] = {"logit_softcap": 0.7, "norm": "layer"}
    return LM(vocabulary=VOCABULARY + 1, dim=32, layers=3, pattern=list(blocks), blocks=blocks, **cap)


MODELS: dict[str, Callable[[], LM]] = {"hybrid": small_model, "shared heads": shared, "parts": parts}
LAYOUTS: dict[str, tuple[Mesh, str, str, int | None]] = {  # mesh, model, recomputation, tokens a rank at a time
    "tensor 2 × sequence 2, recomputed": (Mesh(tensor=2, sequence=2), "hybrid", "full", None),
    "tensor 4": (Mesh(tensor=4), "shared heads", "none", None),
    "tensor 2 × sequence 2, parts": (Mesh(tensor=2, sequence=2), "parts", "none", None),
    "expert 2 × sequence 2, parts": (Mesh(expert=2, sequence=2), "parts", "selective", None),
    "replicate 2 × data 2, accumulated, recomputed": (Mesh(replicate=2, data=2), "hybrid", "selective", 140),
}
BATCHES = {name: SHORT if tokens is None else BATCH for name, (_, _, _, tokens) in LAYOUTS.items()}
DIVISIONS = {"tensor 2": Mesh(tensor=2), "tensor 2 × sequence 2": Mesh(tensor=2, sequence=2)}
OPTIONS = {  # that are divided in another way than the mixer's plain form
    "gated_deltanet, value heads": partial(mixer_model, "gated_deltanet", heads=2, value_heads=4),
    "attention, one key head": partial(mixer_model, "attention", heads=4, kv_heads=1, gate=True, qk_norm=True),
    "mamba2, two groups": partial(mixer_model, "mamba2", heads=4, groups=2, state=8),
}


def planned(layout: str) -> Plan:
    mesh, _, _, tokens = LAYOUTS[layout]
    lengths = [len(s.tokens) for s in BATCHES[layout]]
    return Static(tokens_per_rank=tokens).plan(0, lengths, data=mesh.split[0], sequence=mesh.split[1])


def every_layout() -> dict[str, Any]:
    """Returns loss and gradients of each layout; and by "axis/purpose", the bytes and calls that this rank counts."""
    found = {}
    for name, (mesh, model, remat, _) in LAYOUTS.items():
        LEDGER.take()
        got = spread(BATCHES[name], planned(name), "fp64", remat, mesh=mesh, build=MODELS[model])
        size, calls = LEDGER.take()
        own = {LedgerEntry("plan", "loss"), LedgerEntry("world", "loss")}  # the sum that `spread` takes
        found[name] = got, {"/".join(e): (size[e], calls[e]) for e in calls.keys() - own}
    return found


def on_four_ranks(folder: Path) -> dict[str, Any]:
    """All that a world of four ranks is asked for here: a world costs as much as what it does."""
    return {"layouts": every_layout(), "states": travelled(folder), "muon": muon_on(MUON_MESHES)}


@pytest.fixture(scope="module")
def four(run, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(4, on_four_ranks, tmp_path_factory.mktemp("travelled"))


def test_every_layout_gives_the_loss_and_gradients_of_one_process(four):
    wanted = {name: truth(BATCHES[name], "fp64", build=MODELS[LAYOUTS[name][1]]) for name in LAYOUTS}
    for rank in four:
        for name, (got, _) in rank["layouts"].items():
            for what, error in differences(got, wanted[name]).items():
                assert error <= TOLERANCE["fp64"], f"{name}: {what}: {error:.1e}"


# --- mutations: each breaks one thing for the time of a pass, and the pass must then differ ---


@contextmanager
def instead(place: Any, name: str, value: Any) -> Iterator[None]:
    honest = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, honest)


def mutations() -> dict[str, tuple[Any, str, Any]]:
    """Where each stands, and what is put there."""
    tensor, segments = parallel.tensor, TensorPiece.segments

    def side_by_side(self: TensorPiece, rank: int) -> list[tuple[int, int]]:
        """Cuts q, k and v as if they were one matrix."""
        return segments(TensorPiece(self.shape, self.ranks, self.along, self.pieces), rank)

    def reversed_shares(y, ranks):
        return dealt(y, ranks).flip(0)

    dealt = tensor._dealt
    return {
        "gradients of whole parameters are not summed": (train.execute, "sum_undivided_gradients", lambda model: None),
        "losses of routers count on every rank": (tensor.DividedWidth, "alike", lambda self, x: x),
        "norms over all heads see their own alone": (tensor.DividedWidth, "sum", lambda self, x: x * self.comm.size),
        "parts are cut as one": (TensorPiece, "segments", side_by_side),
        "tokens are dealt out in another order": (tensor, "_dealt", reversed_shares),
        "every rank looks up the first rows": (parallel.tensor_loss, "_own", _blind),
        "the logsumexp is the rank's own": (parallel.tensor_loss, "_over_all", _alone),
        "a bias is added by every rank": (Linear, "forward", _whole_bias),
    }


def _whole_bias(self: Linear, x):
    return nn.functional.linear(x, self.weight, self.bias)


def _blind(tokens, rows, first):
    return tokens.clamp(0, rows - 1), (tokens < 0) | (tokens >= rows)


def _alone(comm, z_CV, index_C, elsewhere_C):
    _, target = HONEST(comm, z_CV, index_C, elsewhere_C)
    return z_CV.logsumexp(-1), target


HONEST = parallel.tensor_loss._over_all


def probe() -> LM:
    """Two layers that meet all of the mutations: a norm over all heads, packed parts, a router, a bias behind heads."""
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12)
    blocks = {
        "hgrn2": partial(Block, mixer=partial(MIXERS["hgrn2"], heads=2), ffn=moe),
        "rglru": partial(Block, mixer=partial(MIXERS["rglru"], heads=2, bias=True), ffn=None),
    }
    return LM(vocabulary=VOCABULARY, dim=16, layers=2, pattern=list(blocks), blocks=blocks)


def broken() -> dict[str, Any]:
    plan = Static().plan(0, [len(s.tokens) for s in SHORT], data=1, sequence=1)
    pass_ = partial(spread, SHORT, plan, "fp64", mesh=Mesh(tensor=2), build=probe)
    found = {"nothing": pass_()}
    for name, (place, attribute, value) in mutations().items():
        with instead(place, attribute, value):
            found[name] = pass_()
    return found


def test_each_mechanism_broken_on_purpose_is_seen(run):
    want, worlds = truth(SHORT, "fp64", build=probe), run(2, broken)
    for got in worlds:
        assert max(differences(got["nothing"], want).values()) <= TOLERANCE["fp64"]
    for name in mutations():
        worst = max(max(differences(got[name], want).values()) for got in worlds)
        assert not worst < 1e-4, f"{name}: {worst:.1e}"


# --- norms, clipping, checkpoints ---


ADAMW = partial(AdamW, lr=1e-2)


def model_on(mesh: Mesh, seed: int, make: Any = ADAMW) -> tuple[LM, Any, Groups]:
    """A model on a mesh of this world, and its optimizer."""
    with torch.device("meta"):
        model = shared()
    model.compute = torch.float64
    declared = declarations(model)
    meshes = Meshes(mesh, torch.device("cpu"))
    parallelise(model, meshes, seed=seed, dtype=torch.float64, remat="none", reshard_after_forward=True)
    return model, build_optimizer(make, model, declared), Groups(mesh)


def filled(model: LM, division: Any, rank: int) -> None:
    """Gives each parameter a gradient that its name and place alone decide."""
    generator = torch.Generator().manual_seed(3)
    for name, p in sorted(model.named_parameters()):
        name = parameter_name(name)
        shape = tuple(p.shape) if division is None else division.pieces[name].shape
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        own = whole if division is None else division.pieces[name].of(whole, rank)
        if not hasattr(p, "device_mesh"):
            p.grad = own
            continue
        p.grad = distribute_tensor(own, p.device_mesh, p.placements, src_data_rank=None)


def state_of(model: LM, optimizer: Any) -> dict[str, np.ndarray]:
    named = {parameter_name(name): p for name, p in model.named_parameters()}
    found = {name: x.numpy() for name, x in logical(model, {n: p.detach() for n, p in named.items()}).items()}
    for key in ("exp_avg", "exp_avg_sq"):
        moments = logical(model, {name: optimizer.state[p][key] for name, p in named.items()})
        found |= {f"{name}/{key}": x.numpy() for name, x in moments.items()}
    return found


def travelled(folder: Path) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """Norms on meshes of four ranks, and a state that goes from each to the next through a checkpoint."""
    norms, states = {}, []
    path, meshes = None, (Mesh(tensor=2, sequence=2), Mesh(replicate=2, data=2), Mesh(tensor=4))
    for step, mesh in enumerate(meshes):
        model, optimizer, groups = model_on(mesh, seed=step)
        filled(model, model.division, groups.mesh.coordinates(groups.all_comm.rank)["tensor"])
        layers = layer_norms(model, groups.all_comm)["gradient_norms"]
        norm = clip(model, groups.all_comm, largest=1.0, each=5.0, value=2.0)
        after = clip(model, groups.all_comm, largest=1e9, each=None, value=None)
        norms[str(mesh)] = (norm.item(), after.item(), layers)
        optimizer.step()
        if path is not None:
            checkpoint.load(path, model, optimizer)
        states.append(state_of(model, optimizer))
        if mesh != meshes[-1]:
            path = saving.save(folder, model, optimizer, {"step": step + 1}, keep=9)
    return norms, states


def test_norms_are_those_of_whole_tensors_and_checkpoints_load_on_any_mesh(four):
    for norms, states in (rank["states"] for rank in four):
        first, *others = norms.values()
        for norm, after, layers in others:
            assert norm == pytest.approx(first[0], rel=1e-12) and after == pytest.approx(first[1], rel=1e-12)
            assert layers == pytest.approx(first[2], rel=1e-12)
        assert first[0] > 10 and first[1] == pytest.approx(1.0, rel=1e-6)
        for state in states[1:]:
            assert state.keys() == states[0].keys()
            for name, value in state.items():
                assert np.array_equal(value, states[0][name]), name
                assert np.isfinite(value).all(), name


def muon_steps(model: LM, optimizer: Any, rank: int) -> dict[str, np.ndarray]:
    """The parameters after two steps along gradients that depend on names alone."""
    for _ in range(2):
        filled(model, model.division, rank)
        optimizer.step()
    whole = logical(model, {parameter_name(name): p.detach() for name, p in model.named_parameters()})
    return {name: x.numpy().copy() for name, x in whole.items()}


def muon_on(sizes: list[Mesh]) -> list[dict[str, np.ndarray]]:
    found = []
    for mesh in sizes:
        model, optimizer, groups = model_on(mesh, seed=1, make=MUON)
        found.append(muon_steps(model, optimizer, groups.mesh.coordinates(groups.all_comm.rank)["tensor"]))
    if sizes[1:]:
        with instead(parallel.matrix_pieces.Beside, "through", lambda self, function: function):
            found += muon_on(sizes[:1])
    return found


MUON = partial(Muon, lr=0.05, weight_decay=0.2)
MUON_MESHES = [Mesh(tensor=4), Mesh(tensor=2, sequence=2)]


def test_muon_moves_divided_matrices_as_one_process_does(four):
    whole = initialise(shared().double(), seed=1)
    want = muon_steps(whole, build_optimizer(MUON, whole, declarations(whole)), 0)
    for *meshes, broken in (rank["muon"] for rank in four):
        for got in meshes:
            for name, b in want.items():
                assert np.linalg.norm(got[name] - b) <= 1e-10 * np.linalg.norm(b), name
        assert any(np.linalg.norm(broken[name] - b) > 1e-3 * np.linalg.norm(b) for name, b in want.items())


# --- bytes ---


def test_bytes_by_axis_are_those_foretold(four):
    measured = [{name: counted for name, (_, counted) in rank["layouts"].items()} for rank in four]
    for name, (mesh, model_name, remat, _) in LAYOUTS.items():
        if mesh.expert > 1:  # rows go where routers send them: `test_expert_volume`
            continue

        def build(model_name=model_name):
            with torch.device("meta"):
                model = MODELS[model_name]()
            model.compute = torch.float64
            return model

        starts = [np.flatnonzero(s.positions == 0).tolist() for s in BATCHES[name]]
        foretold = of_step(build, mesh, planned(name), starts, How(), itemsize=8, reshard=True, recompute=remat)
        for got, want in zip(measured, foretold, strict=True):
            there = {f"{axis}/{p}": (t.bytes[p], t.calls[p]) for axis, t in want.items() for p in t.calls}
            assert got[name] == there, name
        axes = {key.partition("/")[0] for got in measured for key in got[name]}
        assert axes >= {axis for axis in ("tensor", "replicate", "sequence") if mesh.sizes[axis] > 1}


# --- refusals ---


@pytest.mark.parametrize(
    ("build", "ranks", "line"),
    [
        (small_model, 4, "parallel.tensor=4: must divide the 2 heads of layers.0.mixer.qkv"),
        (
            partial(mixer_model, "mamba2", heads=6, groups=3, expand=3),
            2,
            "must divide the 3 groups of layers.0.mixer.bc",
        ),
        (partial(mixer_model, "hgrn"), 3, "parallel.tensor=3: must divide the 16 heads of layers.0.mixer.i"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(build, ranks, line):
    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match=line):
        division(model, declarations(model), ranks)


def test_a_mixer_that_does_not_say_how_its_heads_divide_is_refused():
    with torch.device("meta"):
        model = mixer_model("gla", heads=2)
    del model.layers["1"].mixer.units
    with pytest.raises(ValueError, match="parallel.tensor: must be 1 with layers.1.mixer.*does not say"):
        division(model, declarations(model), 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_pieces_of_a_parameter_are_all_of_it(ranks):
    with torch.device("meta"):
        model = shared()
    for name, piece in division(model, declarations(model), ranks).items():
        if piece.along is None:
            continue
        numbers = torch.arange(int(np.prod(piece.shape))).view(piece.shape)
        found = torch.cat([piece.of(numbers, rank).flatten() for rank in range(0, ranks, piece.copies)])
        assert torch.equal(found.sort().values, numbers.flatten()), name
        for rank in range(ranks):
            assert tuple(piece.of(numbers, rank).shape) == piece.local_shape(rank)


# --- every mixer: a command, and a slow test ---


def every_mixer(division: str, names: list[str]) -> dict[str, Any]:
    mesh = DIVISIONS[division]
    plan = Static().plan(0, [len(s.tokens) for s in SHORT], data=mesh.split[0], sequence=mesh.split[1])
    builds = BUILDS | OPTIONS
    return {name: spread(SHORT, plan, "fp64", mesh=mesh, build=builds[name]) for name in names}


def worst(division: str, names: list[str], run: Callable[..., Any] = run_world) -> dict[str, tuple[float, str]]:
    """The largest error of each mixer on any rank, and of what."""
    wants = {name: truth(SHORT, "fp64", build=(BUILDS | OPTIONS)[name]) for name in names}
    found: dict[str, tuple[float, str]] = {name: (0.0, "") for name in names}
    for got in run(DIVISIONS[division].world, every_mixer, division, names, timeout=1800):
        for name in names:
            errors = differences(got[name], wants[name])
            found[name] = max(found[name], max((error, what) for what, error in errors.items()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_mixer_divided_gives_the_loss_and_gradients_of_one_process(run, division):
    for name, (error, what) in worst(division, list(BUILDS | OPTIONS), run).items():
        assert error <= TOLERANCE["fp64"], f"{name}: {what}: {error:.1e}"


if __name__ == "__main__":
    wanted_names = sys.argv[1:] or list(BUILDS | OPTIONS)
    for each in DIVISIONS:
        for mixer, (error, what) in worst(each, wanted_names).items():
            print(f"{each:<24}{mixer:<32}{error:9.1e}  {what}", flush=True)
