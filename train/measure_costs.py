"""Measures the costs of a run's model on its ranks: seconds of each kind of layer at several lengths, and of messages.

Seconds of a CPU are those of its processor, divided by its threads, so that a machine that does something else besides
gives the same; a GPU's are those of its clock. Every rank measures, as all compute at once in training; rank 0's
are kept. All of it takes `cost.seconds`, half a minute as it is.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.pack import Packed
from models.axes import declarations, initial, start_buffers
from models.cross_layer import Depth
from models.kernels.indexed_attention import Index, Selected
from models.lm import LM
from models.sequence import Whole
from parallel.mesh import Groups, Meshes
from parallel.schedule.adaptive.cost import Layer, powers
from parallel.schedule.adaptive.fit import fit, fit_wire
from parallel.schedule.mesh import Mesh
from parallel.schedule.plan import Group, MicroStep, Plan
from train.cost_profile import CostProfile, LayerCost, machine_name, model_key
from train.execute import Executor
from train.precision import dtypes
from train.run_config import RunConfig

SHORTEST, LONGER = 64, 512  # tokens
MESSAGES = (1 << 12, 1 << 16, 1 << 19, 1 << 21)  # bytes from each rank
REPEATS = 3  # at least, of each length


@dataclass(kw_only=True)
class _Attending(Whole):
    """Notes the windows of softmax attention."""

    windows: list[int | None] = field(default_factory=list)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        slot: str,
        window: int | None = None,
        sinks: int = 0,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        values_in_keys: bool = False,
    ) -> Tensor:
        self.windows.append(window)
        return super().attend(q, k, v, slot=slot, window=window, sinks=sinks, softcap=softcap, sink_logits=sink_logits)

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        self.windows.append(None)  # every key is scored
        return super().attend_selected(q, k, v, index, slot=slot)


def run(order: dict[str, Any]) -> None:
    """The entry of every rank: measures, and writes the profile on rank 0."""
    config: RunConfig = order["config"]
    device = torch.device("cuda", torch.cuda.current_device()) if order["device"] == "cuda" else torch.device("cpu")
    with torch.device("meta"):
        model = config.model.build()
    compute = dtypes(config.precision.compute, device.type)[0]
    limit = config.data.get("max_length") or 4096
    kinds = {kind: str(model.kinds.index(kind)) for kind in dict.fromkeys(model.kinds)}
    budget = config.cost.seconds / (len(kinds) + 2)
    layers = tuple(
        _layer(kind, model.layers[name], model.kinds.count(kind), config.model["dim"], limit, device, compute, budget)
        for kind, name in kinds.items()
    )
    head = _head(model, config, limit, device, compute, budget)
    beside = _beside(config, layers, head, device) / len(layers)
    layers = tuple(replace(each, launch=each.launch + beside) for each in layers)
    layers = tuple(replace(each, shared=_shared(config, each, device, budget)) for each in layers)
    wires = _wires(device, budget)
    if dist.get_rank() == 0:
        machine = machine_name(order["device"], torch.get_num_threads())
        CostProfile(model_key(config), machine, layers, head, wires).write(Path(order["path"]))


def _layer(
    kind: str,
    layer: nn.Module,
    count: int,
    dim: int,
    limit: int,
    device: torch.device,
    compute: torch.dtype,
    budget: float,
) -> LayerCost:
    """The cost of one layer, fitted to several lengths. Raises ValueError for one that cannot run alone."""
    declared = declarations(layer)
    layer = layer.to_empty(device=device).to(compute)
    start_buffers(layer, device.type)
    with torch.no_grad():
        for name, each in declared.items():
            parameter = layer.get_parameter(name)
            parameter.copy_(initial(0, name, each, tuple(parameter.shape)))
    windows: list[int | None] = []

    def step(tokens: int) -> Callable[[], None]:
        depth: Depth = layer.depth  # type: ignore[assignment]
        x_BTD = torch.randn(depth.stream(1, tokens, dim), device=device, dtype=compute, requires_grad=True)

        def once() -> None:
            seq = _Attending.of(torch.arange(tokens, device=device)[None])
            y_BTD = layer(x_BTD, seq)[0]
            y_BTD.backward(torch.ones_like(y_BTD))
            windows[:] = cast(_Attending, seq).windows
            layer.zero_grad()

        return once

    try:
        samples = _timed(step, _lengths(limit), device, budget)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"cost.profile: a layer {kind} cannot be measured alone ({str(error)[:80]})") from None
    shape = Layer(1, window=windows[0] if windows else None)
    tokens = torch.tensor([float(n) for n, _ in samples], dtype=torch.float64).numpy()
    features: dict[str, Any] = {"token": tokens, "launch": tokens * 0 + 1}
    if windows and windows[0] is None or windows and tokens.max() < 2 * (windows[0] or 0):
        features["pair"] = shape.pairs(tokens) * len(windows)
    elif windows:  # beyond its window a layer is linear, and what is short tells little of its pairs
        features["token"] = tokens
    cost = fit(features, [seconds for _, seconds in samples])
    own = cost.constants
    pair = own.get("pair", 0.0) * max(len(windows), 1)
    return LayerCost(kind, count, pair, own["token"], own["launch"], shape.window, (cost.rms, cost.worst))


def _head(model: LM, config: RunConfig, limit: int, device: torch.device, compute: torch.dtype, budget: float) -> float:
    """Seconds a token of embedding, head and loss."""
    weight_VD = torch.randn(model.embedding.shape, device=device, dtype=compute, requires_grad=True)

    def step(tokens: int) -> Callable[[], None]:
        x_TD = torch.randn(tokens, config.model["dim"], device=device, dtype=compute, requires_grad=True)
        targets_T = torch.zeros(tokens, dtype=torch.long, device=device)

        def once() -> None:
            weight_VD.grad = None
            F.cross_entropy(F.linear(x_TD, weight_VD).float(), targets_T).backward()

        return once

    samples = _timed(step, _lengths(min(limit, config.train.loss_chunk or limit)), device, budget)
    own = fit({"token": [n for n, _ in samples], "launch": [1.0] * len(samples)}, [s for _, s in samples])
    return own.constants["token"]


def _beside(config: RunConfig, layers: tuple[LayerCost, ...], head: float, device: torch.device) -> float:
    """Seconds of a micro-step beside its layers: placing tokens, gathering and letting go of weights, hooks.

    Of a model with one layer of each kind, sharded as the run's is: the second of two micro-steps, since the last also
    reduces gradients. 0 for a model that cannot be cut down so.
    """
    executor = _executor(config, [each.kind for each in layers], device)
    if executor is None:
        return 0.0
    known = sum(each.token * SHORTEST + each.launch + each.pair * SHORTEST**2 / 2 for each in layers)
    return max(0.0, _micro_step(executor, 1, SHORTEST, device) - known - head * SHORTEST)


def _shared(config: RunConfig, layer: LayerCost, device: torch.device, budget: float) -> dict[int, tuple[float, float]]:
    """Seconds more that a rank computes in a layer where several share a sequence, by the size of their group: whatever
    it holds, and a token of its own. Effects of spans, two spans for one, packing; not the messages' time on a wire."""
    executor, world = _executor(config, [layer.kind], device), dist.get_world_size()
    seconds_by_size: dict[int, tuple[float, float]] = {}
    if executor is None:
        return seconds_by_size
    took = torch.tensor([(layer.launch + LONGER * layer.token) * 16 * REPEATS], dtype=torch.float64, device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)  # every rank decides the same
    lengths = (SHORTEST, LONGER) if took.item() < 4 * budget else (SHORTEST,)
    shape = Layer(1, window=layer.window)
    alone = [_micro_step(executor, 1, n, device) for n in lengths]
    for size in (size for size in powers(world) if size > 1 and world % size == 0):
        try:
            together = [_micro_step(executor, size, n, device) for n in lengths]
        except ValueError:  # a transport that does not serve groups of this size: all ranks say so
            continue
        more = []
        for n, one, several in zip(lengths, alone, together, strict=True):
            pairs = shape.pairs(np.array([float(size * n), float(n)]))
            more.append(several - one - layer.pair * (pairs[0] / size - pairs[1]))
        token = max(0.0, (more[-1] - more[0]) / max(lengths[-1] - lengths[0], 1))
        seconds_by_size[size] = (max(0.0, more[0] - token * lengths[0]), token)
    return seconds_by_size


def _executor(config: RunConfig, kinds: list[str], device: torch.device) -> Executor | None:
    """An executor of a model with one layer of each of these kinds, sharded as the run's is; None for a model that
    cannot be cut down so."""
    compute, master = dtypes(config.precision.compute, device.type)
    try:
        with torch.device("meta"):
            model = config.model.having(layers=len(kinds), pattern=kinds).build()
    except ValueError:
        return None
    model.compute = compute
    meshes = Meshes(Mesh(sequence=dist.get_world_size()), device)
    config.engine.build().prepare(model, meshes, seed=0, dtype=master)
    return Executor(model, Groups(), device, *config.parallel.transport.build(), 0.0)


def _micro_step(executor: Executor, size: int, tokens: int, device: torch.device) -> float:
    """Seconds of a micro-step in groups of so many ranks that hold so many tokens each, zigzag: of the second of two,
    since the last also reduces gradients."""
    total, groups = size * tokens, dist.get_world_size() // size
    own, each = np.zeros(total, dtype=np.int64), total // (2 * size)
    batch = [Packed(tokens=own, targets=own, starts=np.arange(total) == 0) for _ in range(2 * groups)]
    if size == 1:
        spans: Any = (((0, total),),)
    else:
        ends = [2 * size - 1 - r for r in range(size)]
        spans = tuple(((r * each, (r + 1) * each), (end * each, (end + 1) * each)) for r, end in enumerate(ends))
        spans = (*spans[:-1], ((spans[-1][0][0], spans[-1][1][1]),))  # the last rank's meet, and are one
    seconds = []
    for count in (1, 2):
        micro_steps = tuple(
            MicroStep(
                tuple(Group(tuple(range(g * size, (g + 1) * size)), (m * groups + g,), spans) for g in range(groups))
            )
            for m in range(count)
        )
        once = partial(executor.train, Plan(0, (total,) * (count * groups), micro_steps), batch[: count * groups])
        once()
        seconds.append(min(seconds_of(once, device) for _ in range(REPEATS)))
    return seconds[1] - seconds[0]


def _lengths(limit: int) -> list[int]:
    """Lengths, each four times the one before, and the limit: three at least."""
    lengths, limit = [SHORTEST], max(limit, 16 * SHORTEST)
    while 4 * lengths[-1] < limit:
        lengths.append(4 * lengths[-1])
    return [*lengths, limit]


def _timed(
    step: Callable[[int], Callable[[], None]], lengths: Iterable[int], device: torch.device, budget: float
) -> list[tuple[int, float]]:
    """(tokens, seconds), the least of some repeats for each length, the short first; three lengths at least, and then
    as many as the budget has time for."""
    end, samples = time.monotonic() + budget, list[tuple[int, float]]()
    for tokens in lengths:
        once = step(tokens)
        began = time.monotonic()
        once()  # allocates, and compiles, what later ones find
        times = [seconds_of(once, device) for _ in range(REPEATS)]
        samples.append((tokens, min(times)))
        if len(samples) >= 3 and time.monotonic() + 5 * (time.monotonic() - began) > end:
            break
    return samples


def seconds_of(once: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call: of the CPU, divided by its threads; a GPU's by the clock."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        clock = time.thread_time if threads == 1 else time.process_time  # the first leaves out threads that only send
        began = clock()
        once()
        return (clock() - began) / threads
    torch.cuda.synchronize(device)
    wall = time.perf_counter()
    once()
    torch.cuda.synchronize(device)
    return time.perf_counter() - wall


def _wires(device: torch.device, budget: float) -> dict[int, tuple[float, float]]:
    """(bandwidth, latency) of an all-gather in the first ranks, for each size of group from two on."""
    wires: dict[int, tuple[float, float]] = {}
    sizes = [size for size in powers(dist.get_world_size()) if size > 1]
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if dist.get_rank() < size:
            wires[size] = _wire(group, size, device, budget / len(sizes))
        dist.barrier()
    return wires


def _wire(group: Any, size: int, device: torch.device, budget: float) -> tuple[float, float]:
    received, seconds = [], []
    for number in MESSAGES:
        own = torch.zeros(number // 4, device=device)
        parts = [torch.empty_like(own) for _ in range(size)]
        readings = []
        for _ in range(4):
            began = time.perf_counter()
            dist.all_gather(parts, own, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            readings.append(time.perf_counter() - began)
        received.append(float((size - 1) * number))
        seconds.append(min(readings[1:]))
    try:
        wire, _ = fit_wire(received, seconds)
    except ValueError:  # time that does not grow with the message: a wire that is never what is waited for
        return received[-1] / seconds[-1], min(seconds)
    return wire.bandwidth, wire.latency
