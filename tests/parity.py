"""What parity tests share: a small hybrid of every kind of layer, packed unequal documents, one-process truth."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.recipes import RECIPES, LowPrecision, apply, policy
from models.sequence import Whole
from parallel.matrix_owners import wholes
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Plan
from parallel.sequence.attention import GatherKeys, Keys
from parallel.sequence.states import GatherEffects, Transport
from train.execute import Executor
from train.loss import sums
from train.time_spans import Spans

VOCABULARY, BALANCE = 32, 0.05
DTYPE = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
KEY_FORMATS = {"fp8": 448.0, "int8": 127.0}  # and their largest numbers


def small_model(attention: dict[str, Any] | None = None) -> LM:
    """GLA, Gated DeltaNet and grouped attention with these options, with dense and expert feed-forwards."""
    moe = partial(MoE, num_experts=4, top_k=2, hidden=12, shared_hidden=8)
    dense = partial(SwiGLU, hidden=24)
    mixers = {
        "gla": partial(MIXERS["gla"], heads=2),
        "gdn": partial(MIXERS["gated_deltanet"], heads=2),
        "attn": partial(MIXERS["attention"], **{"heads": 4, "kv_heads": 2, **(attention or {})}),
    }
    blocks = {name: partial(Block, mixer=mixer, ffn=dense if name == "gdn" else moe) for name, mixer in mixers.items()}
    return LM(vocabulary=VOCABULARY, dim=32, layers=4, pattern=["gla", "gdn", "attn", "gdn"], blocks=blocks)


@dataclass(frozen=True)
class Sample:
    """A packed sequence from document lengths, with random tokens and a few positions without a target."""

    documents: tuple[int, ...]
    seed: int = 0
    masked: tuple[int, int] = (0, 0)  # targets of [begin, end) are dropped as well
    tokens: np.ndarray = field(init=False)
    targets: np.ndarray = field(init=False)
    positions: np.ndarray = field(init=False)
    counted: np.ndarray = field(init=False)
    padding: int = 0  # of the tokens, the last ones; they are a document of their own

    def __post_init__(self):
        rng = np.random.default_rng((self.seed, *self.documents))
        tokens = rng.integers(0, VOCABULARY, sum(self.documents))
        positions = np.concatenate([np.arange(n) for n in self.documents])
        targets = np.where(np.roll(positions, -1) == 0, -100, np.roll(tokens, -1))
        targets[self.masked[0] : self.masked[1]] = -100
        if self.padding:
            targets[-self.padding - 1 :] = -100
        counted = np.arange(len(tokens)) < len(tokens) - self.padding
        for name, value in (("tokens", tokens), ("targets", targets), ("positions", positions), ("counted", counted)):
            object.__setattr__(self, name, value)


def mixer_model(mixer: str, layers: int = 3, **options: Any) -> LM:
    """Some layers of one mixer, its required options among these, each with a dense feed-forward."""
    block = partial(Block, mixer=partial(MIXERS[mixer], **options), ffn=partial(SwiGLU, hidden=24))
    return LM(vocabulary=VOCABULARY, dim=16, layers=layers, pattern=["layer"], blocks={"layer": block})


def follow(model: LM, recipe: str | None, gather: bool = False) -> LowPrecision | None:
    """Gives all layers that the policy leaves a recipe, whatever their widths; but for experts where blocks of tokens
    share scales, which depend on how many come from where."""
    if recipe is None:
        return None
    low = LowPrecision(RECIPES[recipe], gather=gather)
    blocks = any(scaling is not None and scaling.columns for scaling in low.recipe.weight_gradient)
    apply(model, policy(model, high=["*.experts.*"] if blocks else []), low)
    return low


def near(x: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., W] by a scale a row, the least power of two that cuts nothing off: whole numbers, or numbers of four
    significant bits down to 2^-9 (OCP 8-bit floating point, E4M3). Its gradient is x's."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.exp2((largest / KEY_FORMATS[name]).clamp_min(1e-37).log2().ceil())
    y = x.detach() / scale
    step = torch.exp2(y.abs().clamp_min(2.0**-6).log2().floor() - 3) if name == "fp8" else torch.ones_like(y)
    return x + ((y / step).round() * step * scale - x.detach())


def rounding(name: str) -> Any:
    """Has one process round its keys and values, as ranks do with `parallel.transport.keys`, where it attends."""
    whole = Whole.attend

    def attend(seq, q, k, v, **more):
        k = near(k, name)
        return whole(seq, q, k, k[..., : v.shape[-1]] if more.get("values_in_keys") else near(v, name), **more)

    return patch.object(Whole, "attend", attend)


def truth(
    batch: list[Sample],
    precision: str,
    attention: dict[str, Any] | None = None,
    build: Callable[..., LM] = small_model,
    recipe: str | None = None,
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and every gradient with the whole model on one device, one sequence at a time, without its padding, no
    process group."""
    model = initialise((build() if attention is None else build(attention)).to(DTYPE[precision]), seed=1)
    model.compute = DTYPE[precision]
    follow(model, recipe)
    targets = sum(int((s.targets != -100).sum()) for s in batch)
    tokens = counted(batch)
    total = 0.0
    for s in batch:
        real, targeted, positions = (torch.from_numpy(x[s.counted])[None] for x in (s.tokens, s.targets, s.positions))
        seq = Whole.of(positions)
        seq.index_losses.weight = 1 / tokens
        part = sums(model(real, seq), targeted)
        loss = part.objective(targets=targets, tokens=tokens, balance_weight=BALANCE)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.numpy() for name, p in model.named_parameters()}


def spread(
    batch: list[Sample],
    plan: Plan,
    precision: str,
    remat: str = "none",
    device: str = "cpu",
    attention: dict[str, Any] | None = None,
    build: Callable[..., LM] = small_model,
    recurrence: Transport | None = None,
    keys: Keys | None = None,
    mesh: Mesh | None = None,
    spans: Spans | None = None,
    recipe: str | None = None,
    scales: str = "sequence",
    gather: bool = False,
) -> tuple[float, dict[str, np.ndarray]]:
    """The same, run by the executor on this world along `plan`: the global loss, every gradient as this rank has it.

    mesh: how the world is divided; None for sequences alone. spans: in time, None for none.
    """
    groups = Groups(mesh)
    plan.check(groups.world)
    with torch.device("meta"):
        model = build() if attention is None else build(attention)
    model.compute = DTYPE[precision]
    low = follow(model, recipe, gather)
    meshes = Meshes(groups.mesh, torch.device(device))
    parallelise(model, meshes, seed=1, dtype=DTYPE[precision], remat=remat, reshard_after_forward=True)
    transports, shared = (recurrence or GatherEffects(), keys or GatherKeys()), low if scales == "sequence" else None
    executor = Executor(model, groups, torch.device(device), *transports, BALANCE, spans=spans, low=shared)
    tally = executor.train(plan, batch)
    targets = sum(int((s.targets != -100).sum()) for s in batch)
    both = groups.world_comm.all_reduce(torch.stack((tally.cross_entropy, tally.balance)).double(), purpose="loss")
    loss = both[0].item() / targets + BALANCE * both[1].item() / counted(batch)
    gradients = logical(model, {parameter_name(n): p.grad for n, p in model.named_parameters()})
    return loss, {name: gradient.cpu().numpy() for name, gradient in gradients.items()}


def logical(model: LM, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """The whole of tensors that lie as the parameters of their names do, by few messages for all. Collective."""
    found = wholes(tensors)
    pieces = {} if model.division is None else model.division.pieces
    divided = {name: x for name, x in found.items() if pieces and pieces[name].along is not None}
    if not pieces:
        return found
    comm = next(module.width for module in model.modules() if hasattr(module, "width")).comm
    parts: list[Any] = [None] * comm.size
    dist.all_gather_object(parts, divided, group=comm.group)
    for name, own in divided.items():
        piece = pieces[name]
        found[name] = own.new_full(piece.shape, float("nan"))
        for rank, part in enumerate(parts):
            at = 0
            for begin, end in piece.segments(rank):
                theirs = part[name].narrow(piece.along, at, end - begin)
                found[name].narrow(piece.along, begin, end - begin).copy_(theirs)
                at += end - begin
    return found


def counted(batch: list[Sample]) -> int:
    """Tokens that do more than fill a place."""
    return sum(int(s.counted.sum()) for s in batch)


def differences(got: tuple[float, dict], want: tuple[float, dict]) -> dict[str, float]:
    """||a - b|| / ||b|| of the loss and of each gradient; one that is zero is held to the layer's gradient norm."""
    assert got[1].keys() == want[1].keys()
    found = {"loss": abs(got[0] - want[0]) / abs(want[0])}
    sizes = {name: np.linalg.norm(expected) for name, expected in want[1].items()}
    layers: dict[str, float] = defaultdict(float)
    for name, size in sizes.items():
        layers[_layer(name)] += size**2
    for name, size in sizes.items():
        scale, error = layers[_layer(name)] ** 0.5, np.linalg.norm(got[1][name] - want[1][name])
        found[name] = float(error / (size if size > 1e-6 * scale else scale)) if error else 0.0
    return found


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:2])


def assert_close(got: tuple[float, dict], want: tuple[float, dict], precision: str) -> None:
    """Each of the `differences` within the precision's tolerance; what is not a number is not within it."""
    for name, error in differences(got, want).items():
        assert error <= TOLERANCE[precision], f"{name}: error {error:.3e} of its norm, over {TOLERANCE[precision]:.0e}"
