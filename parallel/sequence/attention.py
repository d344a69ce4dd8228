"""Transports of softmax attention: how a query reaches the keys of its document on other ranks.

`GatherKeys` all-gathers keys and values (LASP-2H; the Llama-3 report, 2407.21783, section 3.3.2): documents may start
anywhere and spans may differ in length; the gradients of keys and values return by one reduce-scatter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.softmax import Piece, attend_pieces
from parallel.collectives import gather
from parallel.sequence.chain import Chain


class GatherKeys:
    """One all-gather of keys and values forward, one reduce-scatter backward."""

    def attend(
        self,
        chain: Chain,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pieces: list[list[Piece]],
        *,
        window: int | None = None,
        sinks: int = 0,
    ) -> Tensor:
        """q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] of this rank's spans -> [B,T,H,V]; see `Sequence.attend`."""
        local = torch.cat((k, v), dim=-1)
        B, T = local.shape[:2]
        local = F.pad(local, [0, 0, 0, 0, 0, chain.longest - T, 0, chain.rows - B])
        needed = chain.links[: chain.mine[-1] + 1]

        def in_order(gathered: Tensor) -> Tensor:
            return torch.cat([gathered[link.rank, link.row, : link.length] for link in needed])

        keys, values = gather(chain.comm, local, in_order, linear=True).split((k.shape[-1], v.shape[-1]), dim=-1)
        offsets = [chain.links[n].begin for n in chain.mine]
        keys, values = keys.expand(B, *keys.shape), values.expand(B, *values.shape)
        return attend_pieces(q, keys, values, pieces, offsets, window=window, sinks=sinks)
