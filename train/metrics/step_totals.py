"""The totals of a step, which the ranks exchange at its end in one all-gather."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.mesh import Groups
from train.execute import Tally
from train.metrics import comm_record
from train.metrics.timing import peak_memory_bytes


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks, the same on each.

    stop, held: whether any rank was asked to stop, or held the step back. memory: the largest peak of a rank, bytes.
    cpu: seconds of processor time. computing: seconds in layers, of each rank of a plan. choices: by layer, how many
    tokens each expert got, [E]. ahead: nats of each module of multi-token prediction. dropped: by layer, the share of
    choices that an expert had no room for. communication: as `comm_record.record` has it. magnitudes: the
    largest of each over ranks, None without any.
    """

    stop: bool
    held: bool
    memory: int
    cpu: float
    computing: tuple[float, ...]
    cross_entropy: float
    balance: float
    z: float
    divergence: float
    index_loss: float
    ahead: list[float]
    choices: dict[str, Tensor]
    dropped: dict[str, float]
    communication: dict[str, Any]
    magnitudes: Tensor | None = None


def totals(
    tally: Tally,
    held: Tensor,
    stop: bool,
    cpu: float,
    device: torch.device,
    groups: Groups,
    computing: float = 0.0,
    magnitudes: Tensor | None = None,
) -> StepTotals:
    """Adds up what this rank found in a step with that of the others. held: bool []. magnitudes: [n], of matrices whose
    scales are delayed (`models.delayed_scaling`). Collective."""
    layers, limited = sorted(tally.load), sorted(tally.dropped)
    loads = [tally.load[name].double() for name in layers]
    losses = [tally.cross_entropy, tally.balance, tally.z, tally.divergence, tally.index_loss, *tally.ahead.unbind()]
    sums = [*losses, *(tally.dropped[name] for name in limited)]
    memory = float(peak_memory_bytes(str(device)))
    own = torch.tensor([float(stop), memory, cpu, 0.0, computing], dtype=torch.float64, device=device)
    own[3] = held  # without a word from the device to the host
    received = torch.tensor(comm_record.taken(), dtype=torch.float64, device=device)
    totals_now = torch.cat([x.double().view(-1) for x in (*sums, *loads)]) * float(groups.counts)
    seen = own.new_empty(0) if magnitudes is None else magnitudes.double()
    rows = groups.all_comm.all_gather(torch.cat([own, totals_now, received, seen]), purpose="metrics")
    rows, others = rows.split([rows.shape[1] - len(seen), len(seen)], 1)
    total = rows.sum(0)
    first = len(own) + len(sums)
    *counts, received = total[first:].split([*(len(load) for load in loads), comm_record.COLUMNS])
    choices = dict(zip(layers, counts, strict=True))
    cross_entropy, balance, z, divergence, index_loss, *rest = total[len(own) : first].tolist()
    ahead, left_out = rest[: len(tally.ahead)], rest[len(tally.ahead) :]
    dropped = dict(zip(limited, left_out, strict=True))
    return StepTotals(
        stop=bool(total[0] > 0),
        held=bool(total[3] > 0),
        memory=int(rows[:, 1].max()),
        cpu=total[2].item(),
        computing=tuple(rows[list(groups.speakers), 4].tolist()),
        cross_entropy=cross_entropy,
        balance=balance,
        z=z,
        divergence=divergence,
        index_loss=index_loss,
        ahead=ahead,
        choices=choices,
        dropped={name: count / choices[name].sum().clamp_min(1).item() for name, count in dropped.items()},
        communication=comm_record.record(received.tolist()),
        magnitudes=None if magnitudes is None else others.amax(0),
    )
