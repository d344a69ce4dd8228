"""The checker of a running step: how each value lies over the ranks, and which collectives ran. See `tests.spmd`."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from math import prod
from typing import Any, NamedTuple

import spmd_types as spmd
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_collectives as fsdp_collectives
from spmd_types import MeshAxis, SpmdTypeError, rules
from spmd_types._mesh_axis import _mesh_axis_names
from torch import Tensor
from torch.overrides import TorchFunctionMode

import parallel.fsdp
from models.lm import LM
from parallel.collective_types import EXCHANGE, FUNCTIONS, GATHER, SCATTER, SUM, UNTYPED, FunctionType
from parallel.collectives import Comm
from parallel.mesh import DENSE, EXPERTS
from parallel.parallelize import parameter_name
from parallel.schedule.mesh import PLANNED, Mesh

LETTERS = {"R": spmd.R, "I": spmd.I, "V": spmd.V, "P": spmd.P}
# The types that pass for one. Each rank's own value may be read as a part of a sum, and a value of all as each rank's
# own; a value of all is no part of a sum, for it would count once for each rank.
TAKEN = {"V": (spmd.V, spmd.R), "P": (spmd.P, spmd.V), "R": (spmd.R,), "I": (spmd.I,)}
OF_STATES = ("state", "state gradient")  # purposes of what the scan sends, on a thread of its own
ROOT = ("models.", "parallel.")


class Sent(NamedTuple):
    """A collective that ran: its kind, axis and purpose, and the autograd function that called it, if one did."""

    kind: str
    axis: str
    purpose: str
    function: str | None


def functions() -> dict[str, type]:
    """Every autograd function of models/ and parallel/, by its dotted name."""
    found, waiting = {}, [torch.autograd.Function]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.startswith(ROOT) and not cls.__name__.endswith("Backward"):
                found[f"{cls.__module__}.{cls.__name__}"] = cls
    return found


class Step:
    """The checker of one step: what is declared, and what ran."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.axes = {n: self._axis(n) for n in (*PLANNED, "tensor") if mesh.sizes[n] > 1}
        _mesh_axis_names.clear()
        _mesh_axis_names.update({axis: {name} for name, axis in self.axes.items()})  # by which errors call them
        self.sent: list[Sent] = []
        self.calls: Counter[str] = Counter()
        self.untyped: Counter[str] = Counter()
        self.running: list[str] = []
        self.locals = 0
        self.forward: Counter[str] = Counter()  # calls that a gradient has to pass, by function
        self.backward: Counter[str] = Counter()

    def _axis(self, name: str) -> MeshAxis:
        names = list(self.mesh.sizes)
        return MeshAxis.of(self.mesh.sizes[name], prod(self.mesh.sizes[n] for n in names[names.index(name) + 1 :]))

    def name_of(self, group: dist.ProcessGroup) -> str:
        """The axes that a group spans, by its ranks."""
        ranks = dist.get_process_group_ranks(group)
        for name in self.mesh.sizes:
            if tuple(ranks) == self.mesh.group(dist.get_rank(), name):
                return name
        for several in (DENSE, EXPERTS, PLANNED, (*PLANNED, "tensor")):
            if tuple(ranks) == self.mesh.group(dist.get_rank(), *several):
                return " × ".join(n for n in several if self.mesh.sizes[n] > 1)
        return f"{len(ranks)} ranks"

    def types(self, **letters: str) -> dict[MeshAxis, Any]:
        """A type on every axis: V along those with tokens of their own and R along `tensor`, unless named."""
        chosen = {**dict.fromkeys(PLANNED, "V"), "tensor": "R", **letters}
        return {axis: LETTERS[chosen[name]] for name, axis in self.axes.items()}

    def record(self, kind: str, group: dist.ProcessGroup, purpose: str) -> None:
        function = self.running[-1] if self.running and purpose not in OF_STATES else None
        sent = Sent(kind, self.name_of(group), purpose, function)
        self.sent.append(sent)
        if function in FUNCTIONS:
            declared = FUNCTIONS[function].axis
            if declared not in ("any", sent.axis):
                raise SpmdTypeError(f"{function}: {kind} over {sent.axis}, declared over {declared}")

    # --- functions ---

    def apply(self, name: str, cls: type, args: tuple[Any, ...]) -> Any:
        """Runs a declared function, holds what it sends to its declaration, and types what comes out."""
        declared = FUNCTIONS[name]
        axis_name = declared.axis
        comm = next((c for c in map(comm_of, args) if c is not None), None)
        before = len(self.sent)
        out = cls.apply(*args)
        ran = [each for each in self.sent[before:] if each.function == name]
        size = comm.size if comm is not None else self.mesh.sizes[axis_name]
        if axis_name == "any":
            axis_name = self.name_of(comm.group) if comm is not None and comm.group is not None else "tensor"
        if size > 1:
            self._times(name, declared.sent, [each.kind for each in ran], "forward")
        self._typed(name, declared, axis_name if size > 1 else None, args, out, cls)
        self.calls[name] += 1
        if isinstance(out, Tensor) and out.requires_grad:
            self.forward[name] += 1
        return out

    @staticmethod
    def _times(name: str, declared: tuple[str, ...], ran: list[str], which: str) -> None:
        times = len(ran) // len(declared) if declared else 0
        if Counter(ran) != Counter({kind: n * max(times, 1) for kind, n in Counter(declared).items()}):
            said = " and ".join(declared) or "nothing"
            raise SpmdTypeError(f"{name}: {which}: its type asks for {said}, it sent {' and '.join(ran) or 'nothing'}")

    def _typed(
        self, name: str, declared: FunctionType, axis_name: str | None, args: tuple[Any, ...], out: Tensor, cls: type
    ) -> None:
        given = dict(zip(list(inspect.signature(cls.forward).parameters)[1:], args, strict=False))
        tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        along = [self.axes[n] for n in axis_name.split(" × ") if n in self.axes] if axis_name else []
        first = declared.steps[0].before if declared.steps else "V"
        for key, x in tensors.items():
            wanted = first if declared.of in (None, key) else declared.others.get(key, "V")
            got = spmd.get_local_type(x)
            if missing := [n for n, a in self.axes.items() if a not in got]:
                raise SpmdTypeError(f"{name}: {key} has no type along {', '.join(missing)}")
            for axis in along:
                if got[axis] not in TAKEN[wanted]:
                    raise SpmdTypeError(f"{name}: {key} is {got[axis]!r} along {axis_name}, its type asks for {wanted}")
        result = {}
        for each, axis in self.axes.items():
            if axis not in along:
                result[axis] = joined(name, each, [spmd.get_local_type(x)[axis] for x in tensors.values()])
        for axis in along:
            value: Any = rules.NdimWithSpmdType(8)
            spmd.assert_type(value, {axis: LETTERS[first]})
            for step in declared.steps:
                rule = getattr(rules, step.kind.replace("-", "_"))
                value = rule(value, axis, src=LETTERS[step.before], dst=LETTERS[step.after])
            result[axis] = spmd.get_local_type(value)[axis]
        stamp(out, result)

    def local(self, name: str, cls: type, args: tuple[Any, ...]) -> Any:
        """Runs a function that knows of no rank. A list may hold an earlier call's results: no type."""
        out = cls.apply(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        types = {a: joined(name, n, [spmd.get_local_type(x).get(a) for x in tensors]) for n, a in self.axes.items()}
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, Tensor):
                stamp(each, types)
        self.locals += 1
        return out

    def scanned(self, name: str, cls: type, args: tuple[Any, ...]) -> Any:
        """Runs a function that no type describes: what comes out is each rank's own."""
        out = cls.apply(*args)
        self.untyped[name] += 1
        for each in out if isinstance(out, tuple) else (out,):
            stamp(each, {axis: spmd.V for axis in self.axes.values()})
        return out

    def returned(self, name: str, cls: type, backward: Callable[..., Any]) -> Callable[..., Any]:
        """The backward pass of a declared function, held to the transpose of its type."""

        def run(ctx: Any, *grads: Any) -> Any:
            before = len(self.sent)
            self.running.append(name)
            try:
                found = backward(ctx, *grads)
            finally:
                self.running.pop()
            ran = [each for each in self.sent[before:] if each.function == name]
            comm = comm_of(ctx)
            if comm is None or comm.size > 1:
                axis = next((each.axis for each in ran), FUNCTIONS[name].axis)
                self._times(name, FUNCTIONS[name].returned, [each.kind for each in ran], f"backward over {axis}")
            self.backward[name] += 1
            return found

        return run

    def named(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)  # by whose signature arguments are named
        def run(*args: Any) -> Any:
            self.running.append(name)
            try:
                return forward(*args)
            finally:
                self.running.pop()

        return run


def joined(name: str, axis: str, types: list[Any]) -> Any:
    """The type along an axis of what a function of one rank makes of values of these types: its own, if one is."""
    kinds = set(types)
    if len(kinds) == 1 and kinds <= {spmd.R, spmd.I, spmd.V}:
        return types[0]
    if kinds == {spmd.R, spmd.V}:
        return spmd.V
    raise SpmdTypeError(f"{name}: takes values that are {' and '.join(map(repr, types))} along {axis}")


def comm_of(x: Any) -> Comm | None:
    """The communicator that an argument or a context carries."""
    for each in (x, getattr(x, "comm", None), getattr(getattr(x, "chain", None), "comm", None)):
        if isinstance(each, Comm):
            return each
    return getattr(getattr(x, "trip", None), "comm", None)


def stamp(x: Tensor, types: dict[MeshAxis, Any]) -> None:
    """Gives a tensor a type, whatever it had."""
    if hasattr(x, "_local_type"):
        del x._local_type
    spmd.assert_type(x, types)


def _recorded(step: Step, method: str) -> Callable[..., Tensor]:
    honest, kind = getattr(Comm, method), method.replace("_", "-")
    type_step = next(each for each in (GATHER, SCATTER, SUM, EXCHANGE) if each.kind == kind)

    def call(self: Comm, x: Tensor, *, purpose: str) -> Tensor:
        if self.size == 1:
            return honest(self, x, purpose=purpose)
        step.record(kind, self.group, purpose)
        if step.running or not spmd.is_type_checking():
            return honest(self, x, purpose=purpose)
        with spmd.no_typecheck():
            out = honest(self, x, purpose=purpose)
        axis, types = step.axes[step.name_of(self.group)], dict(spmd.get_local_type(x))
        if types.get(axis) not in TAKEN[type_step.before]:
            raise SpmdTypeError(
                f"{purpose}: {kind} of a value that is {types.get(axis)!r}, it takes {type_step.before}"
            )
        stamp(out, types | {axis: LETTERS[type_step.after]})
        return out

    return call


def comm_changes(step: Step) -> Iterator[tuple[Any, str, Any]]:
    """Each collective of a `Comm` is recorded; one that is called outside of a function is typed as it stands."""
    for method in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
        yield Comm, method, _recorded(step, method)

    start = Comm.start_all_to_all

    def started(self, x, there, here, *, purpose):
        if self.size > 1:
            step.record("all-to-all", self.group, purpose)
        return start(self, x, there, here, purpose=purpose)

    yield Comm, "start_all_to_all", started


class Overwrites(TorchFunctionMode):
    """A tensor that is overwritten takes the type of what is written, which the package wants it to have had before;
    and of `view_as` it takes the second for a value, where it is a shape."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (torch.Tensor.copy_, torch.Tensor.view_as):
            return func(*args, **(kwargs or {}))
        with spmd.no_typecheck():
            out = func(*args)
        stamp(out, dict(spmd.get_local_type(args[func is torch.Tensor.copy_])))
        return out


class FsdpDistributed:
    """`torch.distributed` as FSDP sees it: it sums over copies of the shards by itself, and tells nobody."""

    def __init__(self, step: Step):
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, x: Tensor, *args: Any, group: dist.ProcessGroup, **options: Any) -> Any:
        self._step.record("all-reduce", group, "weights gradient")
        return dist.all_reduce(x, *args, group=group, **options)


def fsdp_changes(step: Step) -> Iterator[tuple[Any, str, Any]]:
    gather, scatter = parallel.fsdp.CountedGather.__call__, parallel.fsdp.CountedScatter.__call__

    def gathered(self, output_tensor, input_tensor, group, async_op=False):
        step.record("all-gather", group, "weights")
        return gather(self, output_tensor, input_tensor, group, async_op)

    def scattered(self, output_tensor, input_tensor, group, op, async_op=False):
        if op != dist.ReduceOp.SUM:
            raise SpmdTypeError(f"weights gradient: reduced by {op}, parts of a sum are added")
        step.record("reduce-scatter", group, "weights gradient")
        return scatter(self, output_tensor, input_tensor, group, op, async_op)

    yield fsdp_collectives, "dist", FsdpDistributed(step)
    yield parallel.fsdp.CountedGather, "__call__", gathered
    yield parallel.fsdp.CountedScatter, "__call__", scattered


def function_changes(step: Step) -> Iterator[tuple[Any, str, Any]]:
    """Functions of models/ know of no rank: their results are each rank's own where one of their inputs is."""
    for name, cls in functions().items():
        if name in FUNCTIONS:
            yield cls, "forward", staticmethod(step.named(name, cls.forward))
            yield cls, "backward", staticmethod(step.returned(name, cls, cls.backward))
            run: Any = step.apply
        elif name in UNTYPED:
            run = step.scanned
        else:
            if name.startswith("parallel."):
                raise SpmdTypeError(f"{name}: has no type in parallel.collective_types")
            run = step.local
        cls.typecheck_forward = staticmethod(lambda *args, _n=name, _c=cls, _run=run: _run(_n, _c, args))
        spmd.register_autograd_function(cls)


def weights(step: Step, model: LM, mesh: Mesh) -> dict[str, dict[str, str]]:
    """How each parameter lies: the same on all ranks that gather its shards, cut along `tensor` or `expert` where it
    is divided."""
    found = {}
    for name, _ in model.named_parameters():
        name = parameter_name(name)
        cut = model.division is not None and model.division.pieces[name].along is not None
        letters = dict.fromkeys(PLANNED, "R") | {"tensor": "V" if cut else "R"}
        if ".experts." in name and mesh.expert > 1:
            letters["expert"] = "V"
        found[name] = letters
        if cut and model.division.pieces[name].copies > 1:
            raise SpmdTypeError(f"{name}: {model.division.pieces[name].copies} neighbours have the same piece")
    return found
