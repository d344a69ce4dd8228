"""Some of a sequence's tokens as a sequence: what a mixer sees that is given only those tokens (mixture of memories).

A token that is not taken is the identity of whatever recurrence runs over those that are: the state stays as it is. So
nothing about ranks is new. A span's effect is that of its taken tokens, and of a span without any it is the identity; a
document that starts at a token not taken resets the state all the same. The convolution's tail, the last inputs that
were taken, however many spans ago, is a state too: it moves on by as many places as a span takes tokens. And where a
token stands among the taken ones of its document is a sum over those before it. All three are recurrences, which
`Sequence.scan` joins over ranks and over spans in time by any transport.

Taken tokens are worked on at the length of the span that takes most; what fills the others up reaches nothing.

Legend: B spans, T tokens, R tokens that the fullest span takes, D width, W places of a tail.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.chunking import Begun, Effect
from models.kernels.indexed_attention import Index, Selected
from models.kernels.pieces import Piece, pieces_of
from models.precision import wide
from models.recurrence import Dense, Elementwise, Recurrence
from models.sequence import DocumentKey, Sequence


@dataclass(frozen=True)
class TokenChoice:
    """Chosen tokens of each span: `indices` [B, R] in order, of which the first `counts[b]` are meant."""

    indices: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, mask_BT: Tensor, share: float) -> "TokenChoice":
        """Chooses the tokens where the mask is true. On the meta device, where nothing is known, the first tokens, by
        their `share`."""
        B, T = mask_BT.shape
        if mask_BT.is_meta:
            counts = (max(int(T * share), 1),) * B
            return cls(torch.empty(B, counts[0], dtype=torch.long, device="meta"), counts)
        counts = tuple(mask_BT.sum(1).tolist())
        order = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        return cls(order[:, : max(1, *counts)], counts)

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, R, ...]."""
        return x.gather(1, self.indices.view(*self.indices.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    def only(self, after: Tensor, before: Tensor) -> Tensor:
        """Rows of `after` [B, ...] of which a token is taken, those of `before` else."""
        chosen = torch.tensor(self.counts, device=after.device) > 0
        return torch.where(chosen.view(-1, *(1,) * (after.dim() - 1)), after, before)

    def add(self, y_BTD: Tensor, x_BRD: Tensor) -> Tensor:
        """y with the taken tokens' x added to them."""
        B, T, _ = y_BTD.shape
        if y_BTD.is_meta:
            return y_BTD + x_BRD.sum(1, keepdim=True)
        parts = [index[:n] + b * T for b, (index, n) in enumerate(zip(self.indices, self.counts, strict=True))]
        values = torch.cat([x[:n] for x, n in zip(x_BRD, self.counts, strict=True)])
        return y_BTD.flatten(0, 1).index_add(0, torch.cat(parts), values).view(B, T, -1)


class RaggedSpans(Begun):
    """Spans of unequal numbers of tokens, each begun by itself."""

    def __init__(self, recurrence: Recurrence, choice: TokenChoice, xs: tuple[Tensor, ...], starts: Tensor):
        self.recurrence, self.choice, self.length = recurrence, choice, xs[0].shape[1]
        index = starts.cumsum(1)
        at = choice.rows(index)
        own = at > F.pad(at[:, :-1], (1, 0))
        self.begun, self.cut = [], []
        for b, n in enumerate(choice.counts):
            some = slice(0, max(n, 1))
            row_starts = own[b : b + 1, some] if n else torch.zeros_like(own[b : b + 1, some])
            self.begun.append(recurrence.begin(*(x[b : b + 1, some] for x in xs), starts=row_starts))
            left = at[b : b + 1, n - 1] if n else torch.zeros_like(at[b : b + 1, 0])
            self.cut.append(index[b : b + 1, -1] > left)  # a document started after the last token taken

    @cached_property
    def effect(self) -> Effect:
        effects = []
        for begun, n, cut in zip(self.begun, self.choice.counts, self.cut, strict=True):
            A, U, alive = begun.effect
            if not n:
                A, U, alive = self.recurrence.unchanged(A), _gone(U), torch.ones_like(alive)
            carry = (~cut).to(U.dtype)
            effects.append(Effect(A, U.masked_fill(cut.view(-1, *(1,) * (U.dim() - 1)), 0.0), alive * carry))
        return Effect(*(torch.cat(parts) for parts in zip(*effects, strict=True)))

    def ahead(self) -> None:
        for begun in self.begun:
            begun.ahead()

    def finish(self, state: Tensor | None) -> Tensor:
        outs = []
        for b, begun in enumerate(self.begun):
            out = begun.finish(None if state is None else state[b : b + 1])
            outs.append(F.pad(out, [0, 0] * (out.dim() - 2) + [0, self.length - out.shape[1]]))
        return torch.cat(outs)


@dataclass(frozen=True)
class Picked(Recurrence):
    """`inner` over the tokens of a choice, of which its inputs are [B, R, ...]; `starts` are the sequence's [B, T]."""

    inner: Any = None
    choice: Any = None

    @property
    def block_axis(self) -> int:  # type: ignore[override]
        axis: int = self.inner.block_axis
        return axis

    @property
    def splits_decay(self) -> bool:  # type: ignore[override]
        splits: bool = self.inner.splits_decay
        return splits

    def begin(self, *xs: Tensor, starts: Tensor) -> Begun:
        return RaggedSpans(self.inner, self.choice, xs, starts)

    def step(self, *xs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            return super().step(*xs, state=None)
        out, after = self.inner.step(*xs, state=state.clone())
        return out, self.choice.only(after, state)

    def multiply(self, then: Tensor, first: Tensor) -> Tensor:
        product: Tensor = self.inner.multiply(then, first)
        return product

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        applied: Tensor = self.inner.apply(A, state)
        return applied

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        total: Tensor = self.inner.add(a, b)
        return total


class Moved(Begun):
    """The tail that a span leaves; its output is the tail that it was entered with, [B, W, D]."""

    def __init__(self, x_BRD: Tensor, counts: tuple[int, ...], width: int):
        x = F.pad(wide(x_BRD), (0, 0, width, 0))
        U = torch.stack([x[b, n : n + width] for b, n in enumerate(counts)]).unsqueeze(1)
        places = torch.eye(width, dtype=x.dtype, device=x.device)
        A = torch.stack([F.pad(places[min(n, width) :], (0, 0, 0, min(n, width))) for n in counts]).unsqueeze(1)
        self._effect, self.dtype = Effect(A, U, torch.ones_like(U[:, 0, 0, 0])), x_BRD.dtype

    @property
    def effect(self) -> Effect:
        return self._effect

    def finish(self, state: Tensor | None) -> Tensor:
        return (torch.zeros_like(self._effect.U) if state is None else state)[:, 0].to(self.dtype)


@dataclass(frozen=True)
class Tail(Dense):
    """The last `width` tokens taken [B, 1, W, D], of this document or of one before: who uses them masks by positions.
    Moving them is a matrix of zeros and ones."""

    counts: tuple[int, ...] = ()
    width: int = 0

    def begin(self, *xs: Tensor, starts: Tensor) -> Begun:
        return Moved(xs[0], self.counts, self.width)

    def step(self, *xs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            return super().step(*xs, state=None)
        moved = torch.cat((state[:, :, 1:], wide(xs[0]).unsqueeze(1)), dim=2)
        chosen = torch.tensor(self.counts, device=state.device).view(-1, 1, 1, 1) > 0
        return state[:, 0].to(xs[0].dtype), torch.where(chosen, moved, state)


@dataclass
class TokenSubset:
    """The `choice` of a sequence's tokens as a `Sequence`; positions [B, R] count those taken in the document."""

    seq: Sequence
    choice: TokenChoice
    positions: Tensor

    def __post_init__(self) -> None:
        self.documents, self.counted = self.choice.rows(self.seq.documents), self.choice.rows(self.seq.counted)
        self.num_documents: int = self.seq.num_documents
        self.identities: list[DocumentKey] | None = self.seq.identities
        self.firsts: tuple[int, ...] | None = None  # a document may have none of the tokens
        self.decoding: bool = self.seq.decoding
        self.index_losses = self.seq.index_losses

    @cached_property
    def starts(self) -> Tensor:
        return self.positions == 0

    @property
    def pieces(self) -> list[list[Piece]]:
        return pieces_of(self.positions)

    def before(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        tail = Tail("tail", counts=self.choice.counts, width=width)
        return self.seq.scan(tail, x.flatten(2), slot=f"{slot}/before").unflatten(-1, x.shape[2:])

    def scan(self, recurrence: Recurrence, *xs: Tensor, slot: str) -> Tensor:
        picked = Picked(
            recurrence.rule, recurrence.scale, shared=recurrence.shared, inner=recurrence, choice=self.choice
        )
        return self.seq.scan(picked, *xs, slot=slot)

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
        raise NotImplementedError("softmax attention over some of a sequence's tokens")

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        raise NotImplementedError("softmax attention over some of a sequence's tokens")

    def sum(self, x: Tensor) -> Tensor:
        meant = torch.arange(x.shape[1], device=x.device) < torch.tensor(self.choice.counts, device=x.device)[:, None]
        flat = (x * meant.view(*meant.shape, *(1,) * (x.dim() - 2)).to(x.dtype)).flatten(2)
        whole = flat.new_zeros(*self.seq.documents.shape, flat.shape[-1])
        return self.seq.sum(self.choice.add(whole, flat)).unflatten(-1, x.shape[2:])


def places(seq: Sequence, mask_BTE: Tensor, *, slot: str) -> Tensor:
    """Counts for each token [B, T, E] int64 the tokens of its document before it that are true in the mask."""
    marks = mask_BTE.double()  # whole numbers to 2^53; fp32 would lose count at 16 million
    with torch.no_grad():
        counts = seq.scan(Elementwise("elementwise"), marks, torch.zeros_like(marks), slot=f"{slot}/places")
    return (counts - marks).long()


def take(seq: Sequence, mask_BTE: Tensor, places_BTE: Tensor, share: float) -> list[TokenSubset]:
    """For each of E choices of tokens, those of its mask; on the meta device, where masks are not known, a `share`."""
    parts = []
    for mask, place in zip(mask_BTE.unbind(-1), places_BTE.unbind(-1), strict=True):
        choice = TokenChoice.of(mask, share)
        parts.append(TokenSubset(seq, choice, choice.rows(place)))
    return parts


def _gone(x: Tensor) -> Tensor:
    """Zeros that every rank still differentiates."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0)
