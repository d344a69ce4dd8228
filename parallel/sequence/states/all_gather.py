"""LASP-2 (Sun et al. 2025, 2502.07563): one all-gather of (A, U, alive) forward, one of the entering states' gradients
backward; each rank folds what it needs. One latency each way, (P-1) payloads received."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunking import Effect
from models.recurrence import Recurrence
from parallel.sequence.span_layout import SpanLayout
from parallel.sequence.states.transport import transpose


class GatherEffects:
    """`gather`: the fewest messages. For few ranks, and for small states."""

    def states(self, chain: SpanLayout, recurrence: Recurrence, effect: Effect) -> tuple[Tensor, list[Tensor]]:
        packed = torch.cat([part.reshape(part.shape[0], -1) for part in effect], dim=1)
        gathered = chain.comm.all_gather(_padded(chain, packed), purpose="state")
        entering, state = [], None
        for n, span in enumerate(self._spans(chain, effect, gathered, chain.mine[-1] + 1)):
            if n in chain.mine:
                entering.append(torch.zeros_like(span.U) if state is None else state)
            state = recurrence.act(span, state)
        return torch.cat(entering), [gathered]

    def gradients(
        self,
        chain: SpanLayout,
        recurrence: Recurrence,
        effect: Effect,
        entering: Tensor,
        saved: list[Tensor],
        grad: Tensor,
    ) -> Tensor:
        gathered = chain.comm.all_gather(_padded(chain, grad.flatten(1)), purpose="state gradient")
        spans = list(self._spans(chain, effect, saved[0], len(chain.links)))
        states, state = [], torch.zeros_like(spans[0].U)
        for span in spans:  # what they are matters only where `act` is not linear in them
            states.append(state)
            state = recurrence.act(span, state)
        leaving, after = {}, torch.zeros_like(state)
        for n in range(len(spans) - 1, chain.mine[0] - 1, -1):
            leaving[n] = after
            link = chain.links[n]
            after = transpose(recurrence, spans[n], states[n], after)[2] + gathered[link.rank, link.row].view_as(after)
        return torch.cat([leaving[n] for n in chain.mine])

    @staticmethod
    def _spans(chain: SpanLayout, effect: Effect, gathered: Tensor, count: int) -> list[Effect]:
        """The effects of the chain's first `count` spans."""
        shapes = [(1, *part.shape[1:]) for part in effect]
        sizes = [math.prod(shape) for shape in shapes]
        return [
            Effect(*(p.view(s) for p, s in zip(gathered[a.rank, a.row].split(sizes), shapes, strict=True)))
            for a in chain.links[:count]
        ]


def _padded(chain: SpanLayout, rows: Tensor) -> Tensor:
    return F.pad(rows, [0, 0, 0, chain.rows - rows.shape[0]])
