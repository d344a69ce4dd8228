"""A GPU that is not there: whole training steps on a device that holds shapes and no numbers.

The device is torch's Python backend for a private device, under FakeTensorMode. A tensor on it has a shape, a dtype and
a place, so three things show that the CPU hides:

- a tensor that was made on the host and meets one of the device;
- a question to the device, for which the host would wait: `.item()`, `bool`, `.tolist()`, `nonzero` and others, whose
  shapes depend on numbers. There are no numbers here, so each of them is an error with a place in the source;
- launches: every operator that is neither a view nor an allocation starts at least one kernel. A kernel of
  flash-linear-attention, and fused attention, counts as one; the stand-ins below take their place.

It shows no numbers, no races, no memory, no speed, and not that a Triton kernel compiles.
"""

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from launch.config.compose import composed
from models import linear
from models.axes import declarations
from models.kernels import conv, fla, norm, registry, varlen
from models.lm import LM
from parallel import collectives
from parallel.mesh import Groups, Meshes
from parallel.sequence.states import transport
from tests.parity import Sample
from train.execute import Executor
from train.guards.step_guard import Guard, apply
from train.metrics.timing import PhaseTimes
from train.optim import adamw
from train.optim.build import build_optimizer
from train.optim.clip import clip
from train.placed_model import place_model
from train.run_config import RunConfig

NAME = "drygpu"
ROOT = str(Path(__file__).parent.parent)
PAGE, TITLE = Path(ROOT) / "docs/gpu.md", "Launches"
DOCUMENTS = (200, 1, 399)  # tokens of each, in one sequence, and in the other order in the next
OF_VALUES = {  # operators whose result, or its shape, the host has to wait for
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "bincount",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
}
BACKWARD = {"conv": 3}  # launches of the gradients of a kernel, where these are not one
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}


class WaitError(AssertionError):
    """The host asked the device a question."""


class PlaceError(AssertionError):
    """A tensor of the host met one of the device."""


class Stream:
    """A queue of the device, and a mark in one: nothing runs, so nobody waits. FSDP2 asks for these."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> "Stream":
        return self

    record_event = record

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        raise WaitError(f"the host waits for a stream at {place()}")


class Backend(_DummyBackendModule):
    """What `torch.cuda` is to CUDA, as far as FSDP2 asks."""

    Stream = Event = Stream
    _stream = Stream()

    def current_stream(self, device: Any = None) -> Stream:
        return self._stream

    def stream(self, stream: Stream) -> Any:
        return nullcontext()

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None:
        raise WaitError(f"the host waits for the device at {place()}")


def _empty(size: Any, **kwargs: Any) -> Tensor:
    """What FSDP2 allocates while the model is on no device yet."""
    with shapes_alone():
        return torch.empty(size, **kwargs)


_LIBRARY = torch.library.Library("aten", "IMPL")


@cache
def device() -> torch.device:
    """The device, which a process registers once."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    _LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
    return torch.device(NAME, 0)


@cache
def shapes_alone() -> FakeTensorMode:
    """The mode that makes shapes of tensors: one a process, since the masks that kernels cache belong to it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Watch(TorchDispatchMode):
    """Counts launches by the part of the step that is on, and raises at questions and at tensors in a wrong place.

    launches: by part, by operator. uploads: by part, copies from the host to the device, for which it does not wait.
    kinds: of each layer of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[str, Counter[str]] = {}
        self.uploads: Counter[str] = Counter()
        self.part = "outside"
        self.kinds: list[str] = []

    def count(self, name: str) -> None:
        self.launches.setdefault(self.part, Counter())[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.farspan.call.default:  # a function that communicates: what it does is counted as well
            with self:
                return collectives._calls[args[1]](*args[0])
        room, _, name = func._schema.name.partition("::")
        if room == "prim":  # a question to the tensor, not to the device
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.device.type == NAME]
        if on_device:
            self._check(name, args, kwargs, tensors)
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not on_device and tensors and any(x.device.type == NAME for x in results):
            self._sent(kwargs)
        elif (on_device or any(x.device.type == NAME for x in results)) and not _free(func, name):
            self.count(name)
        return out

    def _sent(self, kwargs: Any) -> None:
        """A copy from the host to the device."""
        if not kwargs.get("non_blocking"):
            raise WaitError(f"a copy to the device that the host waits for, at {place()}")
        self.uploads[self.part] += 1

    def _check(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        if name in OF_VALUES or name == "repeat_interleave" and "output_size" not in kwargs and len(args) < 4:
            raise WaitError(f"{name} at {place()}")
        if name.startswith(("index", "_index")) and name not in ("index_select", "index_add", "index_copy"):
            masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise WaitError(f"{name} by a mask at {place()}")
        if name in ("_to_copy", "copy_"):
            to = kwargs.get("device") if name == "_to_copy" else args[0].device
            source = args[0] if name == "_to_copy" else args[1]
            if to is not None and torch.device(to).type == "cpu" and source.device.type == NAME:
                raise WaitError(f"a copy to the host at {place()}")
            if name == "copy_" and source.device.type == "cpu":
                self._sent({"non_blocking": len(args) > 2 and args[2]})
            return
        if any(x.device.type != NAME and x.dim() for x in tensors):
            raise PlaceError(f"{name} of tensors on {sorted({str(x.device) for x in tensors})} at {place()}")


def _free(func: Any, name: str) -> bool:
    """Says whether an operator starts no kernel."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return views or name in ALLOCATIONS or name in ("detach", "set_", "record_stream")


def place() -> str:
    """Where in the project the operator was called."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT) and f.filename != __file__]
    frames = [f for f in frames if "/.venv/" not in f.filename]
    return f"{frames[-1].filename.removeprefix(ROOT + '/')}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"


class Launched(torch.autograd.Function):
    """A kernel that is not here: results of these shapes in one launch, and the gradients of its inputs in another."""

    @staticmethod
    def forward(ctx: Any, watch: Watch, name: str, like: list[tuple[tuple[int, ...], torch.dtype]], *xs: Tensor) -> Any:
        ctx.watch, ctx.name = watch, name
        ctx.save_for_backward(*xs)
        watch.count(name)
        return tuple(torch.empty(shape, dtype=dtype, device=xs[0].device) for shape, dtype in like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        for _ in range(BACKWARD.get(ctx.name, 1)):
            ctx.watch.count(f"{ctx.name}_backward")
        return None, None, None, *(torch.empty_like(x) for x in ctx.saved_tensors)


class Fused(TorchFunctionMode):
    """torch's fused attention and norm, of which a device of this kind has none of its own."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            xs = [x for x in args if isinstance(x, Tensor)]
            return Launched.apply(self.watch, "rms_norm", [(xs[0].shape, xs[0].dtype)], *xs)[0]
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return Launched.apply(self.watch, "attention", [((*q.shape[:-1], v.shape[-1]), q.dtype)], *args[:3])[0]
        return func(*args, **(kwargs or {}))


def of_fla(watch: Watch, rule: str) -> Callable[..., Any]:
    """The stand-in of flash-linear-attention's kernel of a rule, with its signature, or of one between products."""
    if rule in fla.FUSED:

        def fused(x: Tensor, *args: Any, output_dtype: torch.dtype | None = None, **more: Any) -> Tensor:
            dtype = output_dtype or (torch.float32 if rule.endswith("decay") else x.dtype)
            xs = [each for each in args if isinstance(each, Tensor)]
            made: Tensor = Launched.apply(watch, rule, [(x.shape, dtype)], x, *xs)[0]
            return made

        return fused

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, initial_state: Any, **more: Any) -> Any:
        gates = [x for name, x in more.items() if name in fla.CALLS[rule].gates]
        state = ((len(cu_seqlens) - 1, v.shape[2], k.shape[-1], v.shape[-1]), torch.float32)
        xs = [q, k, v, *gates, *([] if initial_state is None else [initial_state])]
        return Launched.apply(watch, rule, [(v.shape, v.dtype), state], *xs)

    return kernel


def of_conv(watch: Watch) -> Any:
    """The stand-in of `models.kernels.conv_triton`."""

    def apply(x: Tensor, taps: Tensor, bias: Tensor | None, positions: Tensor, silu: bool) -> Any:
        xs = [x, taps] if bias is None else [x, taps, bias]
        return Launched.apply(watch, "conv", [((*positions.shape, x.shape[-1]), x.dtype)], *xs)[0]

    return SimpleNamespace(Conv=SimpleNamespace(apply=apply), DTYPES=(torch.bfloat16, torch.float32))


class _AtOnce:
    """In place of a thread, in which no mode of this one would hold."""

    @staticmethod
    def submit(way: Callable[..., Any], *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(way(*args))
        return future


@contextmanager
def believed(watch: Watch) -> Iterator[None]:
    """Has what asks for CUDA by name take the device for one, and its libraries for installed."""
    at = {
        (conv, "TRITON"): (*conv.TRITON, NAME),
        (conv, "_kernels"): lambda: of_conv(watch),
        (varlen, "FLASH"): (*varlen.FLASH, NAME),
        (norm, "FUSED"): (*norm.FUSED, NAME),
        (registry, "TRITON"): (*registry.TRITON, NAME),
        (registry, "_missing"): lambda rule: None,
        (adamw, "HAVE_FUSED"): (*adamw.HAVE_FUSED, NAME),
        (linear, "TOGETHER"): (*linear.TOGETHER, NAME),
        (fla, "function"): lambda rule: of_fla(watch, rule),
        (transport.Crossing, "_thread"): _AtOnce,
    }
    before = {key: getattr(*key) for key in at}
    try:
        for (owner, name), value in at.items():
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def _parts(model: LM, watch: Watch) -> None:
    """Has the watch count each layer by itself, forward and backward."""
    first = next(iter(model.layers))
    for name, layer in model.layers.items():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            watch.part = f"forward {name}"

        def leave(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            watch.part = "forward rest"

            def arrived(grad: Tensor) -> None:
                watch.part = f"backward {name}"

            def departed(grad: Tensor) -> None:
                watch.part = "backward rest"

            out[0].register_hook(arrived)
            if name == first:
                args[0].register_hook(departed)

        layer.register_forward_pre_hook(enter, prepend=True)
        layer.register_forward_hook(leave)


def _whole(config: RunConfig, where: torch.device) -> tuple[LM, Optimizer]:
    """A model whose weights are whole, in fp32, and its optimizer."""
    with shapes_alone(), where:
        model = config.model.build()
    model.compute = torch.bfloat16
    return model, build_optimizer(config.optimizer.build(), model, declarations(model))


def _placed(config: RunConfig, meshes: Meshes) -> tuple[LM, Optimizer]:
    """The same, cut and sharded by the engine of the configuration, as a run has it."""
    order = {"config": config, "device": NAME}
    with ExitStack() as stack:

        def to_empty(model: LM, **where: Any) -> nn.Module:
            """From here on the model is on the device. A tensor of shapes alone cannot be cut: torch swaps it."""
            stack.enter_context(shapes_alone())
            return nn.Module.to_empty(model, **where)

        stack.enter_context(patch.object(LM, "to_empty", to_empty))
        placed = place_model(order, meshes, PhaseTimes(), lambda line: None)
    return placed.model, placed.optimizer


def steps(
    overrides: list[str],
    *,
    world: int = 1,
    sharded: bool = False,
    documents: tuple[int, ...] = DOCUMENTS,
    count: int = 2,
) -> Watch:
    """Training steps of a configuration on rank `world` - 1, from the batch to the new weights. The last is watched:
    the first makes what later ones find. sharded: the configuration's engine places the model, as a run has it; else
    weights are whole, and in fp32.

    Returns the watch. Raises WaitError or PlaceError at the first fault.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    where, config, watch = device(), composed(["precision=bf16", *overrides]), Watch()
    rank = world - 1
    dist.init_process_group(f"cpu:fake,{NAME}:fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh = config.parallel.mesh(world)
        with believed(watch):
            model, optimizer = _placed(config, Meshes(mesh, where)) if sharded else _whole(config, where)
        _parts(model, watch)
        watch.kinds = model.kinds
        with shapes_alone(), believed(watch), watch, Fused(watch):
            groups = Groups(mesh)
            recurrence, attention = config.parallel.transport.build()
            executor = Executor(
                model, groups, where, recurrence, attention, config.train.balance_weight, z_weight=config.train.z_weight
            )
            guard = Guard(config.train.guard, groups.all_comm, where)
            data, sequence = mesh.split
            scheduler, batch = config.scheduler.build(), [Sample(documents), Sample(documents[::-1])] * data
            for step in range(count):
                watch.launches.clear()
                watch.uploads.clear()
                plan = scheduler.plan(step + 1, [len(s.tokens) for s in batch], data=data, sequence=sequence)
                watch.part = "forward rest"
                tally = executor.train(plan, batch)
                watch.part = "update"
                norm = clip(model, groups.layers_comm, largest=1.0, each=None, value=None)
                apply(optimizer, guard.decide(tally.cross_entropy, 1000, norm))
                optimizer.zero_grad()
    finally:
        dist.destroy_process_group()
    return watch


def report(watch: Watch) -> str:
    """A line a part: its launches, its copies from the host, and the operators that are most of them."""
    lines = []
    for part, operators in watch.launches.items():
        most = ", ".join(f"{n} {name}" for name, n in operators.most_common(12))
        lines.append(f"{part}: {operators.total()} launches, {watch.uploads[part]} uploads: {most}")
    return "\n".join(lines)


def a_layer(watch: Watch) -> dict[str, tuple[int, int]]:
    """The launches of a layer of each kind of the model, forward and backward; the most of those of one kind."""
    found: dict[str, tuple[int, int]] = {}
    for i, kind in enumerate(watch.kinds):
        forward, backward = (watch.launches[f"{way} {i}"].total() for way in ("forward", "backward"))
        found[kind] = max(found.get(kind, (0, 0)), (forward, backward))
    return found


def written(world: int) -> dict[tuple[str, str], tuple[int, int]]:
    """The launches that the table of docs/gpu.md allows a layer, by model and kind; forward and backward."""
    table = {}
    for line in PAGE.read_text(encoding="utf-8").partition(f"<!-- begin: {TITLE} -->")[2].splitlines():
        if line.startswith("| ") and line.split("|")[1].strip().endswith(("_tiny", "_2b", "_7b", "_1b", "_study")):
            model, kind, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
            forward, backward = numbers[:2] if world == 1 else numbers[2:4]
            table[model, kind] = (int(forward), int(backward))
    return table


def table(models: dict[str, list[str]]) -> str:
    """Measures a table of launches for docs/gpu.md; models: the overrides of each."""
    lines = [
        "`python -m tests.dry_gpu` counts launches a layer on a device that holds shapes and no numbers: sequences of",
        f"{sum(DOCUMENTS)} tokens in {len(DOCUMENTS)} documents, two in a micro-step, in bf16, as if",
        "flash-linear-attention were installed. A kernel of a library is one launch, whatever it starts inside. The",
        "last rank of eight shares both sequences with the others. A test fails where a number grows.",
        "",
        "| model | layer | forward | backward | forward, rank 8 of 8 | backward, rank 8 of 8 |",
        "|---|---|---|---|---|---|",
    ]
    for model, overrides in models.items():
        one, eight = (a_layer(steps(overrides, world=world)) for world in (1, 8))
        for kind in one:
            lines.append(
                f"| {model} | {kind} | {one[kind][0]} | {one[kind][1]} | {eight[kind][0]} | {eight[kind][1]} |"
            )
        print("\n".join(lines[-len(one) :]), flush=True)
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Without arguments, writes the table of docs/gpu.md; else prints the parts of one configuration's step: the number
    of ranks, `sharded` or nothing, then overrides."""
    from tests.benchmarks.section import write
    from tests.test_dry_gpu import MODELS, overrides

    if arguments:
        ranks, *more = arguments
        sharded = more[:1] == ["sharded"]
        print(report(steps(more[sharded:], world=int(ranks), sharded=sharded)))
    else:
        write(PAGE, TITLE, table({model: overrides(model) for model in MODELS}))


if __name__ == "__main__":
    main(sys.argv[1:])
