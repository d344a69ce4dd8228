"""`auto`: for each kind of recurrence the transport that is fastest on these wires, by
`parallel.schedule.transport_cost`."""

import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor

from models.kernels.chunking import Effect
from models.recurrence import Recurrence
from parallel.collectives import Comm
from parallel.schedule.transport_cost import LinkCost, choose
from parallel.sequence.span_layout import SpanLayout
from parallel.sequence.states.all_gather import GatherEffects
from parallel.sequence.states.relay import AllScan, Relay
from parallel.sequence.states.transport import Transport

UNMEASURED = LinkCost(latency=50e-6, bandwidth=1e9)
SMALL, MIDDLE, LARGE = 4, 1 << 18, 1 << 22  # bytes of the messages that are timed
SLOW = 2e-3  # seconds that a middle one may take for a large one to follow: all stays under 0.2 s


class AutoTransport:
    """`wire` must be the same on all ranks. The choice follows from it and from the shapes alone."""

    def __init__(self, blocks: int = 4, wire: LinkCost = UNMEASURED):
        self.blocks, self.wire = blocks, wire
        self._ways: dict[str, Transport] = {"gather": GatherEffects(), "relay": Relay(), "allscan": AllScan(blocks)}

    def choice(self, ranks: int, decay: int, state: int, extent: int, spans: int = 1) -> str:
        """For effects of `decay` and `state` bytes, that can be cut into `extent` blocks, of so many spans a rank."""
        return choose(ranks, decay, state, self.wire, min(self.blocks, extent), spans)

    def states(self, chain: SpanLayout, recurrence: Recurrence, effect: Effect) -> tuple[Tensor, list[Tensor]]:
        return self._way(chain, recurrence, effect).states(chain, recurrence, effect)

    def gradients(
        self,
        chain: SpanLayout,
        recurrence: Recurrence,
        effect: Effect,
        entering: Tensor,
        saved: list[Tensor],
        grad: Tensor,
    ) -> Tensor:
        return self._way(chain, recurrence, effect).gradients(chain, recurrence, effect, entering, saved, grad)

    def _way(self, chain: SpanLayout, recurrence: Recurrence, effect: Effect) -> Transport:
        decay, state = effect.A[0].nbytes, effect.U[0].nbytes
        extent = effect.U.shape[recurrence.block_axis]
        return self._ways[self.choice(chain.comm.size, decay, state, extent, chain.rows)]


def measure(comm: Comm, world: Comm, device: torch.device) -> LinkCost:
    """Measures the cost of a message to the next rank of `comm` while all send, the worst of `world`: the same on every
    rank.

    Collective over `world`. Under 0.2 seconds on what is faster than 100 Mbit/s.
    """

    def ping(size: int, times: int) -> float:
        """Seconds, the median of so many; the worst rank's. The first, which may set up a connection, is not one."""
        seconds = [_ping(comm, size, device) for _ in range(times + 1)][1:] if comm.size > 1 else [0.0]
        own = torch.tensor([statistics.median(seconds)], dtype=torch.float64, device=device)
        return float(world.all_gather(own, purpose="ping").max())

    latency, size = ping(SMALL, 9), MIDDLE
    if (whole := ping(size, 3)) < SLOW:
        whole = ping(size := LARGE, 3)
    return LinkCost(latency, size / max(whole - latency, whole / 2, 1e-9))


def _ping(comm: Comm, size: int, device: torch.device) -> float:
    after, before = ((comm.rank + d) % comm.size for d in (1, -1))
    sent, received = torch.zeros(size // 4, device=device), torch.empty(size // 4, device=device)
    began = time.perf_counter()
    ways = [
        dist.P2POp(dist.isend, sent, group=comm.group, group_peer=after),
        dist.P2POp(dist.irecv, received, group=comm.group, group_peer=before),
    ]
    for work in dist.batch_isend_irecv(ways):
        work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
