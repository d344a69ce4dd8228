"""Expert parallelism: each rank of an expert group holds some of every layer's experts, and rows travel to them.

The ranks of a group have tokens of their own. A layer's router says which experts a token goes to; `Exchange` sorts the
rows by expert, so that those for one rank lie together, and one all-to-all brings each to the rank that has its expert.
How many come is not known before, so the ranks first tell each other their counts: that is the one question that a
device is asked. While rows travel, the shared expert is computed. Their outputs come back by the same way reversed.

Two ranks, four experts: rank 0 has the experts 0 and 1, rank 1 the experts 2 and 3. Rank 0's tokens want (1, 2), rank
1's want (0, 1), (1, 3). Rank 0 sends one row to itself and one to rank 1; rank 1 sends three to rank 0, in the order of
their experts 0, 1, 1, and one to itself. So rank 0 receives [1 | 0, 1, 1], sender after sender, and puts them in the
order of its experts: [0 | 1, 1, 1]. Backward, each gradient goes to where its row came from: an all-to-all whose counts
are those of the forward pass, sent for received. A departure and an arrival are two nodes of the graph, each the
other's transpose, so that what is computed between them is computed while rows travel in both directions.

No rank is left out: one without tokens, or to whose experts nobody goes, sends and receives counts and empty rows.
Ranks of one expert group need not be of one sequence group, nor of groups that stay the same.

Weights of experts [E, ...] are cut along E over the group, and each rank's part is sharded by FSDP over the ranks that
hold the same experts. Their gradients are sums of what all tokens of all ranks ask for, with no further sum over the
expert group: the tokens came here.

Legend: N tokens, D model width, E experts, X choices a token, P ranks of the group, L = E/P experts of a rank,
M rows that a rank receives, S rows that it sends.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from models.dispatch import Dispatched, Sent, by_expert, combined
from parallel.collectives import Comm
from parallel.liveness import Marked
from parallel.mesh import Meshes
from parallel.schedule.expert_volume import COUNTS, OUTPUTS, ROWS


class Exchange:
    """A `Dispatch` over the ranks of `comm`, of which rank p holds the experts pL to (p+1)L.

    padded: where `room` is known, every rank sends so many rows to every expert, zeros among them, and asks nobody.
    """

    def __init__(self, comm: Comm, *, padded: bool = False):
        self.comm, self.padded = comm, padded

    def held(self, weight: Tensor) -> Tensor:
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def send(self, x: Tensor, experts: Tensor, num_experts: int, room: int | None) -> Sent:
        if self.padded and room is not None:
            return self._send_padded(x, experts, num_experts, room)
        order, counts_E = by_expert(experts, num_experts)
        given, received = self._counts(counts_E.view(self.comm.size, -1))
        trip = Trip(self.comm, [sum(each) for each in given], [sum(each) for each in received], ROWS)
        order = order[: sum(trip.there)]
        rows = trip.depart(x.index_select(0, order // experts.shape[1]))
        ends = torch.tensor(received, device=x.device).sum(0).cumsum(0)
        return Sent(rows, ends.to(torch.int32), order, Journey(trip, _by_expert(received, x.device)))

    def receive(self, sent: Sent) -> Sent:
        trip, places = sent.journey
        rows = trip.arrive(sent.rows)
        if isinstance(places, Tensor):
            return sent._replace(rows=rows.index_select(0, places))
        return sent._replace(rows=rows.unflatten(0, (self.comm.size, -1, places)).transpose(0, 1).flatten(0, 2))

    def collect(self, rows: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        trip, places = sent.journey
        if not isinstance(places, Tensor):
            return self._collect_padded(rows, sent, weights)
        by_sender = torch.empty_like(rows).index_copy(0, places, rows)
        home = Trip(self.comm, trip.here, trip.there, OUTPUTS)
        return combined(home.arrive(home.depart(by_sender)), sent.order, weights)

    def _send_padded(self, x: Tensor, experts: Tensor, num_experts: int, room: int) -> Sent:
        """Sends the row of each place [E, room]; the `order` is the place of each choice [N·X], behind all: none."""
        (N, X), P, device = experts.shape, self.comm.size, x.device
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
        begins = counts.scatter_add(0, flat, torch.ones_like(flat)).cumsum(0).roll(1)
        begins[0] = 0
        sorted_ = flat[order]
        within = torch.arange(N * X, device=device) - begins[sorted_]
        places = torch.where(sorted_ < num_experts, sorted_ * room + within, num_experts * room)
        tokens = torch.full((num_experts * room + 1,), N, device=device).scatter(0, places, order // X)[:-1]
        rows = torch.cat((x, x.new_zeros(1, x.shape[1]))).index_select(0, tokens)
        each = [num_experts // P * room] * P
        trip = Trip(self.comm, each, each, ROWS)
        offsets = torch.arange(1, num_experts // P + 1, dtype=torch.int32, device=device) * (P * room)
        return Sent(trip.depart(rows), offsets, torch.empty_like(places).scatter(0, order, places), Journey(trip, room))

    def _collect_padded(self, rows: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        trip, room = sent.journey
        by_sender = rows.unflatten(0, (-1, self.comm.size, room)).transpose(0, 1).flatten(0, 2)
        home = Trip(self.comm, trip.here, trip.there, OUTPUTS)
        back = home.arrive(home.depart(by_sender))
        by_choice = torch.cat((back, back.new_zeros(1, back.shape[1]))).index_select(0, sent.order)
        return (by_choice.unflatten(0, weights.shape) * weights.unsqueeze(-1).to(back.dtype)).sum(1)

    def _counts(self, counts_PL: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Rows from this rank to each expert of each rank, and from each rank to each expert of this one, [P][L]."""
        taken_PL = self.comm.all_to_all(counts_PL, purpose=COUNTS)
        given, received = torch.stack((counts_PL, taken_PL)).tolist()
        return given, received


class Trip:
    """An all-to-all of rows [S, D] -> [M, D], of which `there` [P] go to each rank and `here` [P] come from each.

    `depart` starts it and `arrive` waits for it; backward, `arrive` starts the gradients' way back, and `depart` waits.
    Each of the two is called once. Collective.
    """

    def __init__(self, comm: Comm, there: list[int], here: list[int], purpose: str):
        self.comm, self.there, self.here, self.purpose = comm, there, here, purpose
        self._flight: tuple[Marked, Tensor] | None = None  # and what it still reads
        self.gradient: Tensor | None = None  # of the rows, while that is on its way

    def depart(self, rows: Tensor) -> Tensor:
        """Returns the rows [M, D] as they will be: nobody may read them before `arrive` hands them on."""
        return _Depart.apply(self, rows)  # type: ignore[no-any-return]

    def arrive(self, travelling: Tensor) -> Tensor:
        return _Arrive.apply(self, travelling)  # type: ignore[no-any-return]

    def start(self, rows: Tensor, there: list[int], here: list[int], purpose: str) -> Tensor:
        """Sends, unless a layer that is computed again has kept what came."""
        rows = rows.contiguous()
        work, received = self.comm.start_all_to_all(rows, there, here, purpose=purpose)
        self._flight = None if work is None else (work, rows)
        return received

    def finish(self) -> None:
        if self._flight is not None:
            with self.comm.waiting():
                self._flight[0].wait()
        self._flight = None


class Journey(NamedTuple):
    """The way of rows to this rank's experts. places [M] int64: of each row that an expert reads, the place among those
    that came; or how many each rank sends to each expert, where that is one number."""

    trip: Trip
    places: Tensor | int


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip: Trip, rows: Tensor) -> Tensor:
        ctx.trip = trip
        return trip.start(rows, trip.there, trip.here, trip.purpose)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """`grad` is the stand-in of `_Arrive`: the gradient's own shape is that of the rows before they left."""
        trip = ctx.trip
        trip.finish()
        gradient, trip.gradient = trip.gradient, None
        return None, gradient


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip: Trip, travelling: Tensor) -> Tensor:
        ctx.trip = trip
        trip.finish()
        return travelling.view_as(travelling)

    @staticmethod
    def backward(ctx, grad: Tensor):
        trip = ctx.trip
        trip.gradient = trip.start(grad, trip.here, trip.there, f"{trip.purpose} gradient")
        return None, grad


def _by_expert(received: list[list[int]], device: torch.device) -> Tensor:
    """The places of received rows, sender after sender and each sender's by expert, in the order of experts: [M] int64;
    those of one expert in the order of senders."""
    sizes = torch.tensor(received, device=device).flatten()
    total, experts = sum(map(sum, received)), torch.arange(len(received[0]), device=device).repeat(len(received))
    return experts.repeat_interleave(sizes, output_size=total).argsort(stable=True)


def pad(model: nn.Module) -> None:
    """Has every exchange send rows in a number of places that its capacity gives, and ask no device for theirs."""
    for module in model.modules():
        if isinstance(module, Dispatched) and isinstance(module.dispatch, Exchange):
            module.dispatch.padded = True


def spread_experts(model: nn.Module, meshes: Meshes) -> list[nn.Module]:
    """Cuts the experts of each layer over the ranks along `expert`, and has their tokens travel. Before FSDP.

    Returns the modules that hold experts, which are to be sharded over those who have the same. Raises ValueError where
    the ranks do not divide the experts.
    """
    comm, mesh, modules = meshes.comm("expert"), meshes.experts["expert"], list[nn.Module]()
    for name, module in model.named_modules():
        if not isinstance(module, Dispatched):
            continue
        if module.num_experts % comm.size:
            raise ValueError(f"parallel.expert={comm.size}: must divide num_experts={module.num_experts}")
        module.dispatch = Exchange(replace(comm, layer=name))
        for each, weight in list(module.experts.named_parameters(recurse=False)):
            part = weight.detach().chunk(comm.size)[comm.rank].clone()
            cut = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            module.experts.register_parameter(each, nn.Parameter(cut, requires_grad=weight.requires_grad))
        modules.append(module.experts)
    return modules
