"""A packed sequence spread over ranks: the distributed answer to `models.sequence.Sequence`.

A rank holds one span of it or several; lengths may differ, documents start anywhere, a rank may hold nothing but a
masked token. The chain gives the order; the transports carry effects, keys and values; this file only asks them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.indexed_attention import Index, Selected, attend_selected, causal, packed
from models.kv_cache import KVCache
from models.nonlinear_recurrence import Serial
from models.recurrence import Recurrence
from models.sequence import Tokens
from parallel.collectives import gather, sum_over
from parallel.sequence import nonlinear, time_spans
from parallel.sequence.attention import Keys
from parallel.sequence.span_layout import SpanLayout
from parallel.sequence.states import Transport, cross


@dataclass(kw_only=True)
class Spread(Tokens):
    """Rows are this rank's spans of one packed sequence."""

    chain: SpanLayout
    recurrence: Transport
    attention: Keys

    def before(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        """The halo, from as many spans back as `width` needs: spans may be shorter than a convolution."""
        halos = self.halos(x, width, slot=slot)
        return halos if self.memory is None else time_spans.with_past(self, halos, slot=f"{slot}/before")

    def halos(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        """The last `width` inputs before each span of this rank [B, width, ...] from the chain alone, zeros before it;
        with a memory, those before the chain's end behind them [B + 1, width, ...]."""
        chain = self.chain.of(slot)
        B, T = x.shape[:2]
        padding = [max(0, width - T), 0, 0, chain.rows - B]
        tails = F.pad(x[:, max(0, T - width) :], [0, 0] * (x.dim() - 2) + padding)

        def halos(gathered: Tensor) -> Tensor:
            parts = []
            for n in ends:
                past = [
                    gathered[a.rank, a.row, width - min(width, a.length) :] for a in chain.links[max(0, n - width) : n]
                ]
                parts.append(torch.cat([tails.new_zeros(width, *tails.shape[2:]), *past])[-width:])
            return torch.stack(parts)

        ends = chain.mine if self.memory is None else [*chain.mine, len(chain.links)]
        return gather(chain.comm, tails, halos, purpose="halo", linear=True)

    def scan(self, recurrence: Recurrence | Serial, *xs: Tensor, slot: str) -> Tensor:
        if isinstance(recurrence, Serial):
            return nonlinear.passed(self, recurrence, *xs, slot=slot)
        begun = recurrence.begin(*xs, starts=self.starts)
        if self.memory is not None:
            return begun.finish(time_spans.entering(self, recurrence, begun.effect, slot=slot))
        entering = cross(self.recurrence, self.chain.of(slot), recurrence, begun.effect)
        begun.ahead()
        return begun.finish(entering())

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
        if self.memory is not None:
            how: dict[str, Any] = {"window": window, "sinks": sinks, "softcap": softcap, "sink_logits": sink_logits}
            return time_spans.attend(self, q, k, v, slot=slot, values_in_keys=values_in_keys, **how)
        return self.attention.attend(
            self.chain.of(slot),
            q,
            k,
            v,
            self.pieces,
            window=window,
            sinks=sinks,
            softcap=softcap,
            sink_logits=sink_logits,
            values_in_keys=values_in_keys,
        )

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        """Keys and values of all tokens come here, whatever the transport: any query may select any of them."""
        chain = self.chain.of(slot)
        keys, values = packed(k, v, index.k)
        widths = keys.shape[-1], values.shape[-1]
        held, offset = KVCache(*self._joined(chain, torch.cat((keys, values), dim=-1)).split(widths, dim=-1)), 0
        if self.memory is not None:
            past = self.recall(slot) or KVCache(held.k[:, :0], held.v[:, :0])
            held, offset = past.joined(*held[:2]), past.k.shape[1]
            self.leave(slot, lambda: held.kept([time_spans.pieces(chain)], None, None, 0))
        begins = [offset + chain.links[n].begin - chain.links[0].begin for n in chain.mine]
        firsts, lasts = zip(
            *(causal(row[None], at) for row, at in zip(self.positions, begins, strict=True)), strict=True
        )
        return attend_selected(q, held.k, held.v, index, torch.cat(firsts), torch.cat(lasts))

    @staticmethod
    def _joined(chain: SpanLayout, x: Tensor) -> Tensor:
        """x [B, T, ...] of this rank's spans -> [1, L, ...] of the whole chain."""

        def joined(gathered: Tensor) -> Tensor:
            return torch.cat([gathered[a.rank, a.row, : a.length] for a in chain.links])[None]

        padding = [0, 0] * (x.dim() - 2) + [0, chain.longest - x.shape[1], 0, chain.rows - x.shape[0]]
        return gather(chain.comm, F.pad(x, padding), joined, purpose="keys and values", linear=True)

    def sum(self, x: Tensor) -> Tensor:
        return self.summed(lambda: sum_over(self.chain.comm, self.local_sum(x), purpose="document sums"))
