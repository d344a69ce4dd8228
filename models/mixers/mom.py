"""MoM, mixture of memories (Du et al. 2025, 2502.13685): each token writes to and reads from a few of several states.

A router sends a token to its `top_k` of `memories`, with weights that sum to 1 (section 3.2 of the paper); a memory is
a linear mixer that sees only the tokens sent to it, convolution included, so that what one memory holds does not
interfere with what another does. A shared memory sees every token. The output is the weighted sum of the memories' and
of the shared one's. Here a memory is a whole mixer: it has its own queries and output too, which the authors' layer
shares between memories, so that any linear mixer can be one.

Over ranks an idle memory sends the identity of its recurrence, so what travels depends on the number of memories E and
never on where tokens went (`models.token_subset`): with a convolution 2E crossings a layer, one by one, beside the
shared memory's and that of the counts of tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.axes import positive
from models.mixers.gated_deltanet import GatedDeltaNet
from models.precision import wide
from models.recurrence import Recurrence
from models.router import Router
from models.sequence import Sequence
from models.token_subset import places, take


class MixtureOfMemories(nn.Module):
    """The state is that of `inner`, for every memory and for the shared one.

    heads: number of heads of each memory; must fit `inner`. memories: number of memories to choose from, the shared one
    not counted. top_k: number of them that a token goes to, from 1 to memories. shared: true adds a memory that sees
    every token. inner: the mixer of a memory, any linear one; in Python null for Gated DeltaNet. norm_after: true adds
    up the reads of the memories' heads before the norm, the gate and the output, of which there is then one each, as in
    the authors' layer; of Gated DeltaNet only.

    x [B, T, D] -> [B, T, D].
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        memories: int = 4,
        top_k: int = 2,
        shared: bool = True,
        inner: Callable[..., nn.Module] | None = None,
        norm_after: bool = False,
    ):
        super().__init__()
        positive(dim=dim, memories=memories)
        if not 1 <= top_k <= memories:
            raise ValueError(f"top_k={top_k}: must lie between 1 and memories={memories}")
        build = partial(GatedDeltaNet, heads=heads) if inner is None else inner
        self.memories = nn.ModuleList(build(dim=dim) for _ in range(memories))
        self.shared = build(dim=dim) if shared else None
        kind = type(self.memories[0]).__name__
        if not isinstance(getattr(self.memories[0], "recurrence", None), Recurrence):
            raise ValueError(f"inner={kind}: must be a linear mixer, whose state a token can leave as it is")
        self.closing = _closing(build(dim=dim), [*self.memories, self.shared]) if norm_after else None
        self.top_k = top_k
        self.router = Router(
            dim=dim,
            num_experts=memories,
            top_k=top_k,
            router="softmax",
            renormalise=top_k > 1,  # a single weight of 1 would teach nothing
            scale=1.0,
            balance="none",
            bias_rate=0.0,
        )

    def forward(self, x_BTD: Tensor, seq: Sequence, *, slot: str) -> Tensor:
        weights_BTX, routing = self.router(x_BTD)
        weights_BTE = torch.zeros_like(routing.probabilities).scatter(-1, routing.choices, weights_BTX)
        mask_BTE = torch.zeros_like(weights_BTE, dtype=torch.bool).scatter(-1, routing.choices, True)
        share = self.top_k / len(self.memories)
        chosen = take(seq, mask_BTE, places(seq, mask_BTE, slot=slot), share)
        y_BTN = None if self.shared is None else wide(self._read(self.shared, x_BTD, seq, slot=f"{slot}/shared"))
        for m, (memory, chosen_here) in enumerate(zip(self.memories, chosen, strict=True)):
            if seq.decoding and not any(chosen_here.choice.counts):  # its state stays as it is
                continue
            o_BRN = wide(self._read(memory, chosen_here.choice.rows(x_BTD), chosen_here, slot=f"{slot}/memory.{m}"))
            y_BTN = o_BRN.new_zeros(*x_BTD.shape[:2], o_BRN.shape[-1]) if y_BTN is None else y_BTN
            y_BTN = chosen_here.choice.add(y_BTN, o_BRN * chosen_here.choice.rows(weights_BTE[..., m : m + 1]))
        assert y_BTN is not None
        if self.closing is None:
            return y_BTN.to(x_BTD.dtype)
        return self.closing.close(y_BTN.unflatten(-1, (-1, self.closing.value_dim)), x_BTD)  # type: ignore[operator]

    def _read(self, memory: nn.Module, x_BTD: Tensor, seq: Any, *, slot: str) -> Tensor:
        """Returns a memory's contribution: its output, or the reads of its heads, side by side."""
        if self.closing is None:
            return memory(x_BTD, seq, slot=slot)  # type: ignore[no-any-return]
        return memory.read(x_BTD, seq, slot=slot).flatten(-2)  # type: ignore[operator, no-any-return]


def _closing(whole: nn.Module, memories: list[nn.Module | None]) -> nn.Module:
    """The closing part of a mixer, which none of the memories then has. Raises ValueError for one without."""
    names = getattr(whole, "CLOSING", None)
    if names is None:
        raise ValueError(f"norm_after=true: must be false with memories of {type(whole).__name__}")
    for memory in memories:
        for name in names if memory is not None else ():
            delattr(memory, name)
    for name in [*whole._modules, *whole._parameters]:
        if name not in names:
            delattr(whole, name)
    return whole
