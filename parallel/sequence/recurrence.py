"""Transports of effects: how the state that enters a span reaches it. Each serves every recurrence.

`GatherEffects` is LASP-2 (Sun et al. 2025, 2502.07563): one all-gather of (A, U, alive), after which each rank folds,
in the order of the sequence, the effects of the spans before its own. One latency, (P-1) payloads received; its
transpose is one reduce-scatter.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunk import Effect
from models.recurrence import Recurrence
from parallel.collectives import gather
from parallel.sequence.chain import Chain


class GatherEffects:
    """One all-gather of effects forward, one reduce-scatter backward."""

    def enter(self, chain: Chain, recurrence: Recurrence, effect: Effect) -> Tensor:
        """The states [B, H, K, V] that enter this rank's spans, from the effects [B, ...] of its own."""
        shapes = [part.shape[1:] for part in effect]
        sizes = [math.prod(shape) for shape in shapes]
        packed = torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in effect], dim=1)
        packed = F.pad(packed, [0, 0, 0, chain.rows - packed.shape[0]])

        def fold(gathered: Tensor) -> Tensor:
            state, entering = None, []
            for n, link in enumerate(chain.links[: chain.mine[-1] + 1]):
                parts = gathered[link.rank, link.row].split(sizes)
                span = Effect(*(p.view(1, *shape) for p, shape in zip(parts, shapes, strict=True)))
                if n in chain.mine:
                    entering.append(torch.zeros_like(span.U) if state is None else state)
                state = recurrence.act(span, state)
            return torch.cat(entering)

        return gather(chain.comm, packed, fold)
