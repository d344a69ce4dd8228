"""LASP (Sun et al. 2024, 2404.02882): each span hands its outgoing state to the next. One state a hop, whatever the
length and the number of ranks.

All-Scan (ZeCO, 2507.01004) is the same in blocks of the state, so that a rank passes its first block on while it waits
for the second, and the hops overlap. Blocks divide what A does not mix: the key channels of a diagonal A, the value
channels of a dense one (ZeCO's split along d_k holds for diagonal decays only).
"""

import torch
from torch import Tensor

from models.kernels.chunking import Effect
from models.recurrence import Recurrence
from parallel.sequence.span_layout import SpanLayout
from parallel.sequence.states.p2p import Post
from parallel.sequence.states.transport import row, transpose


class Relay:
    """`relay`: the fewest bytes, one latency after another."""

    blocks = 1

    def states(self, chain: SpanLayout, recurrence: Recurrence, effect: Effect) -> tuple[Tensor, list[Tensor]]:
        entering: list[Tensor] = []
        leaving: dict[int, list[Tensor]] = {}
        with Post(chain, "state") as post:
            for i, n in enumerate(chain.mine):
                states, leaving[n] = [], []
                for b, span in enumerate(recurrence.blocks(row(effect, i), self.blocks)):
                    if n == 0:
                        state = torch.zeros_like(span.U)
                    elif n - 1 in leaving:
                        state = leaving[n - 1][b]
                    else:
                        state = post.receive(n - 1, span.U)
                    states.append(state)
                    leaving[n].append(recurrence.act(span, state))
                    post.send(n + 1, leaving[n][b])
                entering.append(torch.cat(states, dim=recurrence.block_axis))
        return torch.cat(entering), []

    def gradients(
        self,
        chain: SpanLayout,
        recurrence: Recurrence,
        effect: Effect,
        entering: Tensor,
        saved: list[Tensor],
        grad: Tensor,
    ) -> Tensor:
        leaving: dict[int, Tensor] = {}
        arriving: dict[int, list[Tensor]] = {}
        axis = recurrence.block_axis
        with Post(chain, "state gradient") as post:
            for i, n in reversed(list(enumerate(chain.mine))):
                spans = recurrence.blocks(row(effect, i), self.blocks)
                sizes = [span.U.shape[axis] for span in spans]
                states, ours = (x[i : i + 1].split(sizes, dim=axis) for x in (entering, grad))
                after, arriving[n] = [], []
                for b, (span, state) in enumerate(zip(spans, states, strict=True)):
                    if n + 1 == len(chain.links):
                        after.append(torch.zeros_like(state))
                    elif n + 1 in arriving:
                        after.append(arriving[n + 1][b])
                    else:
                        after.append(post.receive(n + 1, state))
                    arriving[n].append(transpose(recurrence, span, state, after[b])[2] + ours[b])
                    post.send(n - 1, arriving[n][b])
                leaving[n] = torch.cat(after, dim=axis)
        return torch.cat([leaving[n] for n in chain.mine])


class AllScan(Relay):
    """`allscan`: the relay in `blocks` that follow each other through the ranks."""

    def __init__(self, blocks: int = 4):
        self.blocks = blocks
