"""One training step of the default hybrid, type-checked on a fake world: `make types`, `python -m tests.spmd`.

The types are those of the package spmd-types (`pip install -e .[dev]`), the declarations those of
`parallel.collective_types`. One process plays one rank of a world in which every other rank sends what it sends itself:
the numbers mean nothing, and only types and collectives are looked at. docs/types.md says what that finds.
"""

import argparse
import inspect
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import spmd_types as spmd
import spmd_types.checker
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_group
import torch.distributed.fsdp._fully_shard._fsdp_state as fsdp_state
from spmd_types import SpmdTypeError, rules
from spmd_types import _checker as checker
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel.collectives
import parallel.expert
import parallel.fsdp
import parallel.tensor
import train.execute
from launch.config.compose import composed
from launch.config.model import model_of
from models.lm import LM
from models.recurrence import Diagonal
from parallel.collective_types import GRADIENT, UNTYPED
from parallel.collectives import LEDGER, Comm, sum_over
from parallel.mesh import Groups, Meshes
from parallel.parallelize import parallelise, parameter_name
from parallel.schedule.mesh import PLANNED, Mesh
from parallel.schedule.static import Static
from parallel.sequence.attention import GatherKeys
from parallel.sequence.states import GatherEffects
from parallel.shards import local
from tests.parity import Sample, small_model
from tests.spmd_step import (
    FsdpDistributed,
    Overwrites,
    Step,
    comm_changes,
    fsdp_changes,
    function_changes,
    stamp,
    weights,
)
from train.execute import Executor

WORLD = Mesh(replicate=2, data=16, expert=2, sequence=8, tensor=2)
SMALL = Mesh(replicate=2, expert=2, sequence=2, tensor=2)
LIMIT = 60  # seconds


class Checked(NamedTuple):
    """A step that holds: what ran, how many parameters it has, and its seconds, by the clock and of work."""

    sent: Counter[tuple[str, str]]
    functions: Counter[str]
    untyped: Counter[str]
    locals: int
    parameters: int
    seconds: float
    worked: float


@contextmanager
def instead(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    honest = [(place, name, inspect.getattr_static(place, name)) for place, name, _ in changes]
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in honest:
            setattr(place, name, value)


def model_changes(step: Step, reduced: Callable[[], None]) -> Iterator[tuple[Any, str, Any]]:
    """Types begin here: the inputs of a rank, experts that are cut, and the loss, of which each rank has a part."""
    place, held, backward = train.execute.place, parallel.expert.Exchange.held, Executor._backward

    def placed(*args, **kwargs):
        with spmd.no_typecheck():
            found = place(*args, **kwargs)
        for x in (found.tokens, found.targets, *vars(found.seq).values()):
            if isinstance(x, Tensor):
                stamp(x, step.types())
        return found

    def held_here(self, weight):
        with spmd.no_typecheck():
            part = held(self, weight)
        if part is not weight:
            stamp(part, weight.lies)
        return part

    def parts_of_a_sum(self, loss):
        for name in PLANNED:
            if name in step.axes and spmd.get_local_type(loss)[step.axes[name]] is spmd.V:
                spmd.mutate_type(loss, step.axes[name], src=spmd.V, dst=spmd.P)
        backward(self, loss)
        if step.forward != step.backward:
            raise SpmdTypeError(f"a gradient passed {dict(step.backward)}, it has to pass {dict(step.forward)}")
        reduced()

    yield train.execute, "place", placed
    yield parallel.expert.Exchange, "held", held_here
    yield Executor, "_backward", parts_of_a_sum


def passed_on(outputs: tuple[Tensor, ...], *, inputs: tuple[Tensor, ...]) -> None:
    """FSDP's own function hands its inputs on as they are."""
    rules.ignore(*inputs)
    for out, x in zip(outputs, inputs, strict=True):
        stamp(out, dict(spmd.get_local_type(x)))


def teach() -> None:
    """Tells the package what it does not know. Memory that nobody has written to is the same for all, as zeros are.
    FSDP moves bytes between buffers that have no type; what it sends is recorded where `parallel.fsdp` counts it."""
    alike = (torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like)
    checker._DETERMINISTIC_NEW_FACTORIES.update((torch.Tensor.new_empty, *alike))
    checker._DETERMINISTIC_FACTORIES.add(torch.empty)
    fsdp_group.RegisterPostBackwardFunction.spmd_typecheck = staticmethod(passed_on)
    for honest in (fsdp_group.FSDPParamGroup.unshard, fsdp_group.FSDPParamGroup.wait_for_unshard):
        spmd.register_no_typecheck(honest)
    for honest in (fsdp_group.FSDPParamGroup.post_forward, fsdp_state.FSDPState._lazy_init):
        spmd.register_no_typecheck(honest)
    spmd.register_no_typecheck(fsdp_state.FSDPState._register_pre_backward_hook)


def fsdp_groups(model: LM) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups


def hybrid() -> LM:
    """The default job's model, of its own size."""
    model: LM = model_of(composed([]).model.values)
    return model


def check(mesh: Mesh = WORLD, build: Callable[[], LM] = hybrid) -> Checked:
    """Type-checks one step on this process's rank of a world that is open. Raises SpmdTypeError."""
    begun, worked = time.monotonic(), time.process_time()
    step = Step(mesh)
    teach()
    with torch.device("meta"):
        model = build()
    model.compute = torch.float32
    groups, meshes = Groups(mesh), Meshes(mesh, torch.device("cpu"))
    parallelise(model, meshes, seed=1, dtype=torch.float32, remat="none", reshard_after_forward=True)
    lies = weights(step, model, mesh)
    of_parameter: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.register_forward_pre_hook(_stamped(step, prefix, lies))
    batch = [Sample((5, mesh.sequence * 8 - 5), seed=i) for i in range(mesh.split[0])]
    plan = Static(tokens_per_rank=None).plan(
        0, [len(s.tokens) for s in batch], data=mesh.split[0], sequence=mesh.split[1]
    )
    executor = Executor(model, groups, torch.device("cpu"), GatherEffects(), GatherKeys(), 0.01, z_weight=0.001)
    groups.prepare(plan)

    def reduced() -> None:
        with spmd.no_typecheck():
            of_parameter.update(_reduced(step, model, lies))

    changes = [*comm_changes(step), *fsdp_changes(step), *function_changes(step), *model_changes(step, reduced)]
    summing = train.execute.sum_undivided_gradients

    def summed(model: nn.Module) -> None:
        with Overwrites(), instead((parallel.tensor, "local", lambda grad: of_parameter[id(grad)][1])):
            summing(model)

    with instead(*changes, (train.execute, "sum_undivided_gradients", summed)):
        with spmd.set_current_mesh(step.axes), spmd_types.checker.typecheck():
            executor.train(plan, batch)
    for name, grad in of_parameter.values():
        for axis_name, axis in step.axes.items():
            if spmd.get_local_type(grad)[axis] is spmd.P:
                raise SpmdTypeError(f"{name}: its gradient is still a part of a sum along {axis_name}")
    sent = Counter((each.kind, each.axis) for each in step.sent)
    took = (time.monotonic() - begun, time.process_time() - worked)
    return Checked(sent, step.calls, step.untyped, step.locals, len(lies), *took)


def _stamped(step: Step, prefix: str, lies: dict[str, dict[str, str]]) -> Callable[..., None]:
    """Weights have a type once they are whole."""

    def stamp_parameters(module: nn.Module, args: Any) -> None:
        for name, parameter in module.named_parameters(prefix):
            types = step.types(**lies[parameter_name(name)])
            if isinstance(parameter, DTensor):
                parameter.lies = types
            else:
                stamp(parameter, types)

    return stamp_parameters


def _reduced(step: Step, model: LM, lies: dict[str, dict[str, str]]) -> dict[int, tuple[str, Tensor]]:
    """The gradients as FSDP leaves them: what it sums over is no part of a sum any more, what it does not stays one."""
    ran = Counter((each.kind, each.axis) for each in step.sent if each.purpose == "weights gradient")
    asked, over = Counter[tuple[str, str]](), {}
    for group in fsdp_groups(model):
        mesh = group.mesh_info
        sums = [("reduce-scatter", step.name_of(mesh.shard_process_group))] if mesh.shard_mesh_size > 1 else []
        if isinstance(mesh, HSDPMeshInfo):
            sums.append(("all-reduce", step.name_of(mesh.replicate_process_group)))
        asked.update(sums)
        over.update({id(each.sharded_param): sums for each in group.fsdp_params})
    if ran != asked:
        raise SpmdTypeError(f"weights gradient: groups of weights ask for {dict(asked)}, FSDP sent {dict(ran)}")
    found = {}
    for name, parameter in model.named_parameters():
        name, sums = parameter_name(name), over[id(parameter)]
        if parameter.grad is None:
            raise SpmdTypeError(f"{name}: has no gradient")
        letters = {along: GRADIENT[letter] for along, letter in lies[name].items()}
        for kind, along in ((kind, each) for kind, axis in sums for each in axis.split(" × ")):
            if letters[along] != "P":
                raise SpmdTypeError(f"{name}: each rank's own along {along}, its gradients are summed there")
            letters[along] = "V" if kind == "reduce-scatter" else "R"
        grad = local(parameter.grad)
        stamp(grad, step.types(**letters))
        found[id(parameter.grad)] = (name, grad)
    return found


@contextmanager
def fake_world(mesh: Mesh, rank: int) -> Iterator[None]:
    """A process group in which this process is one rank, and all others send what it does."""
    axes = dict(LEDGER.axes)
    dist.init_process_group("fake", rank=rank, world_size=mesh.world, store=FakeStore())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        dist.destroy_process_group()
        LEDGER.axes = axes
        LEDGER.take()


class Mutation(NamedTuple):
    """A fault: what it puts in place of what, and a part of the error that has to come."""

    place: Any
    name: str
    value: Any
    error: str


def mutations() -> dict[str, Mutation]:
    """Faults that a step's types show."""
    tensor, collectives, backward = parallel.tensor, parallel.collectives, Executor._backward

    def keep_own_share(ctx, comm, y):
        ctx.comm, ctx.rows = comm, y.shape[:2]
        return tensor._dealt(y, comm.size)[comm.rank]

    def keep_own_gradient(ctx, grad):
        return None, None, tensor._dealt(grad, ctx.comm.size)[ctx.comm.rank]

    def leave_with_the_user(ctx, grad):
        with torch.enable_grad():
            gathered = grad.new_zeros(ctx.shape).requires_grad_()
            (gradient,) = torch.autograd.grad(ctx.use(gathered), gathered, grad)
        return None, None, None, None, gradient[ctx.comm.rank]

    def sum_the_loss(self, loss):
        backward(self, sum_over(self.groups.world_comm, loss, purpose="loss"))

    def sum_losses_of_a_tensor_group(self, loss):
        backward(self, sum_over(self.model.division.comm, loss, purpose="loss"))

    def stay(ctx, grad):
        ctx.trip.gradient = grad.new_zeros(sum(ctx.trip.there), *grad.shape[1:])
        return None, grad

    return {
        "a layer's results are not summed over tensor ranks": Mutation(
            tensor._Leave, "forward", staticmethod(keep_own_share), "asks for reduce-scatter, it sent nothing"
        ),
        "gradients of a layer's input are not summed over tensor ranks": Mutation(
            tensor._Enter, "backward", staticmethod(keep_own_gradient), "asks for reduce-scatter, it sent nothing"
        ),
        "gradients of whole weights are not summed over tensor ranks": Mutation(
            train.execute, "sum_undivided_gradients", lambda model: None, "still a part of a sum along tensor"
        ),
        "a gradient stays with the rank that used the halo": Mutation(
            collectives._Gathered, "backward", staticmethod(leave_with_the_user), "asks for reduce-scatter, it sent"
        ),
        "gradients of rows stay with their experts": Mutation(
            parallel.expert._Arrive, "backward", staticmethod(stay), "asks for all-to-all, it sent nothing"
        ),
        "the loss is summed before its gradient is": Mutation(
            Executor, "_backward", sum_the_loss, "backward() on a Replicate loss"
        ),
        "the loss is summed over tensor ranks that have the same": Mutation(
            Executor, "_backward", sum_losses_of_a_tensor_group, "its type asks for P"
        ),
        "copies of shards keep gradients of their own": Mutation(
            FsdpDistributed, "all_reduce", lambda self, x, *args, **options: None, "groups of weights ask for"
        ),
        "FSDP averages gradients": Mutation(parallel.fsdp, "sum_gradients", lambda model: None, "reduced by"),
        "losses of routers count on every tensor rank": Mutation(
            tensor.DividedWidth, "alike", lambda self, x: x, "cannot mix with other types"
        ),
    }


def unseen() -> dict[str, Mutation]:
    """Faults that no type shows: they change numbers of one type into others of that type."""
    return {
        "a state enters a span without the span's transition": Mutation(
            Diagonal, "apply", lambda self, A, state: state + 0 * A.sum(), ""
        ),
        "a rank reads another's rows of the halo": Mutation(
            Comm,
            "all_gather",
            lambda self, x, *, purpose, _honest=Comm.all_gather: _honest(self, x, purpose=purpose).flip(0),
            "",
        ),
    }


def small_error(mutation: Mutation | None) -> str | None:
    """The first line of the error that a small hybrid's step gives under a fault; None where its types hold."""
    with fake_world(SMALL, 5):  # always one: torch remembers how a rank of a mesh cuts tensors
        changes = [] if mutation is None else [tuple(mutation[:3])]
        with instead(*changes):
            try:
                check(SMALL, small_model)
            except SpmdTypeError as error:
                return str(error).splitlines()[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.spmd", description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=77, help="the rank that this process plays")
    parser.add_argument("--faults", action="store_true", help="seed faults into a small step, and show what is said")
    args = parser.parse_args()
    if not 0 <= args.rank < WORLD.world:
        parser.error(f"--rank={args.rank}: must lie between 0 and {WORLD.world - 1}")
    if args.faults:
        return faults()
    with fake_world(WORLD, args.rank):
        try:
            found = check(WORLD)
        except SpmdTypeError as error:
            print(f"wrong: {error}", file=sys.stderr)
            return 1
    print(f"right: one step of the default hybrid, rank {args.rank} of {WORLD.world}: {WORLD}")
    print(f"{found.parameters} parameters, each with the gradient that its optimizer needs")
    print(f"\n{'collective':16}{'axis':28}calls")
    for (kind, axis), calls in sorted(found.sent.items()):
        print(f"{kind:16}{axis:28}{calls}")
    print(f"\n{'typed function':58}calls")
    for name, calls in sorted(found.functions.items()):
        print(f"{name:58}{calls}")
    print(f"{'functions of models/, which know of no rank':58}{found.locals}")
    print("\nno type describes, each rank's own (V) goes in and comes out:")
    for name, why in UNTYPED.items():
        print(f"{name:58}{found.untyped[name]} calls: {why}")
    print(f"\n{found.seconds:.1f} s, {found.worked:.1f} s of CPU; the limit is {LIMIT} s of CPU")
    return int(found.worked > LIMIT)


def faults() -> int:
    """Prints what is said of each fault. Returns 1 where one is not found, or a step that is right is called wrong."""
    wrong = small_error(None) is not None
    for name, mutation in mutations().items():
        said = small_error(mutation)
        wrong |= said is None or mutation.error not in said
        print(f"{name}: {said or 'NOT FOUND'}")
    for name, mutation in unseen().items():
        print(f"{name}: {small_error(mutation) or 'not seen, as docs/types.md says'}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
