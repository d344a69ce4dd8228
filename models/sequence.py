"""Access of a token to the tokens before it: the contract between the mixers and whoever placed the sequence.

A mixer is written once, as `mixer(x, seq)`. It never knows a rank; it asks `seq` for the inputs before a span, runs its
recurrence through `seq`, attends through `seq`, sums over documents through `seq`. `Whole` answers when one device
holds everything; `parallel.sequence.Spread` answers when the tokens lie on several ranks.

Legend: B spans on this device, T tokens a span, D model width, H heads, G key/value heads, K key width, V value width.
Tensors are span-major: a row never continues the row above it through a convolution. In `Whole` the rows are
independent packed sequences; in `Spread` they are the spans that this rank holds of one packed sequence.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from models.kernels.indexed_attention import Index, Selected, attend_selected, causal, packed
from models.kernels.packed_attention import attend_pieces
from models.kernels.pieces import Piece, know, known, pieces_of
from models.kv_cache import KVCache
from models.nonlinear_recurrence import Serial
from models.recurrence import Recurrence


class DocumentKey(NamedTuple):
    """The name of a document in training, the same at any layout: keys of random choices contain it. length: its
    tokens."""

    step: int
    sequence: int  # its sequence's index in the step's global batch
    document: int  # its own in that sequence
    length: int


class IndexLosses:
    """The losses of the indices of selected attention, summed over this device's counted tokens, of one forward pass.

    weight: their factor in what is differentiated, since each joins the backward pass in its own layer. A layer that is
    run again for its backward pass adds its loss again: whoever reads the total does so before that.

    No dataclass, for the reason that `Memory` is none.
    """

    def __init__(self, weight: float = 1.0):
        self.weight = weight
        self.total: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        loss = loss.detach()
        self.total = loss if self.total is None else self.total + loss

    def take(self) -> Tensor | None:
        """The total since the last time; None where no layer has an index."""
        total, self.total = self.total, None
        return total


class Sequence(Protocol):
    """Questions that a module may ask about its sequence. All collectives, if any, happen inside these methods."""

    positions: Tensor  # [B, T] int64, position within the document; 0 starts one
    documents: Tensor  # [B, T] int64, index of the token's document in the packed sequence
    num_documents: int
    counted: Tensor  # [B, T] bool, False for a token that only fills a place: no statistic may count it
    identities: list[DocumentKey] | None  # of each document, in training; None where nothing is to be random
    firsts: tuple[int, ...] | None  # the document of each span's first token, where the host knows it
    shapes: tuple[tuple[int, int], ...]  # (B, T) of every device that computes at the same time; () where it is alone
    index_losses: IndexLosses

    @property
    def decoding(self) -> bool:
        """True for one token a row, the next of a text: `before` has nothing of others, nothing is differentiated."""
        ...

    @property
    def pieces(self) -> list[list[Piece]]:
        """For each span, its runs of tokens of one document."""
        ...

    @property
    def starts(self) -> Tensor:
        """[B, T] bool: a document starts here."""
        ...

    def before(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        """The last `width` inputs before each span, [B, T, D] -> [B, width, D]; zeros before the sequence.

        They may belong to another document: who uses them masks by `positions`.
        """
        ...

    def scan(self, recurrence: Recurrence | Serial, *xs: Tensor, slot: str) -> Tensor:
        """Runs `recurrence` over the whole sequence; every x is [B, T, ...], so is the result."""
        ...

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
        """Causal softmax attention in documents: q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] -> [B,T,H,V], G divides H.

        A token sees the last `window` tokens of its document, itself included (None: all), and the first `sinks`.
        softcap: c that makes the scores s c·tanh(s / c). sink_logits [H]: a score a head that takes part in each
        softmax and has no value. values_in_keys: says that `v` is the first V channels of `k`, so that one of the two
        need not travel; a promise, of which nothing else depends.
        """
        ...

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        """Causal softmax attention in documents to the keys that an index selects: q, k, v as for `attend`. See
        `models.kernels.indexed_attention`."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Per-document sums over the whole sequence, [B, T, ...] -> [num_documents, ...], the same on every rank.

        The transpose sums the gradients of all ranks: whoever builds a loss from it must count that loss once.
        """
        ...


@dataclass
class DocumentSums:
    """Per-document sums of spans in time, in the order in which a span asks for them.

    A first pass over the spans adds them up. Once they are `known`, every span gets the sums of the whole sequence;
    before that, those of the spans so far. `asked` counts within a span: whoever begins one sets it to 0.
    """

    totals: list[Tensor] = field(default_factory=list)
    known: bool = False
    asked: int = 0

    def __call__(self, part: Callable[[], Tensor]) -> Tensor:
        """The next sum; `part` is this span's. Raises NotImplementedError for one with a gradient: what follows from
        the whole sequence's sum is not here when a span of it is differentiated."""
        index, self.asked = self.asked, self.asked + 1
        if self.known:
            return self.totals[index]
        own = part()
        if own.requires_grad:
            raise NotImplementedError("a per-document sum with a gradient cannot be taken over spans in time")
        if index == len(self.totals):
            self.totals.append(own)
        else:
            self.totals[index] = self.totals[index] + own
        return self.totals[index]


def counting(seq: Sequence, counted: Tensor) -> Sequence:
    """The same sequence, with the same memory, of which statistics count these tokens [B, T] bool."""
    other = copy.copy(seq)
    other.counted = counted
    return other


class Memory:
    """State that a span leaves to the next one, by slot: recurrent states, convolution tails, keys and values.

    Reads see what the previous span left until `advance()`, so that running a layer again (activation checkpointing)
    reads the same state; what it writes then is not kept. `last`: no span follows, and nothing is left. `sums`: those
    over documents, of all spans together; None where each span's are its own.

    No dataclass: FSDP copies those that hold tensors with gradients, and what a layer writes to a copy is lost.
    """

    def __init__(self, entering: dict[str, Any] | None = None, *, last: bool = False, sums: DocumentSums | None = None):
        self.entering, self.last, self.sums = entering or {}, last, sums
        self.leaving: dict[str, Any] = {}

    def advance(self) -> None:
        self.entering, self.leaving = self.leaving, {}


@dataclass(kw_only=True)
class Tokens:
    """Places of this device's tokens in their documents."""

    positions: Tensor
    documents: Tensor
    num_documents: int
    counted: Tensor
    identities: list[DocumentKey] | None = None
    memory: Memory | None = None
    firsts: tuple[int, ...] | None = None
    shapes: tuple[tuple[int, int], ...] = ()
    index_losses: IndexLosses = field(default_factory=IndexLosses)

    decoding: ClassVar[bool] = False  # `models.decoding` answers then

    @cached_property
    def starts(self) -> Tensor:
        starts, pieces = self.positions == 0, known(self.positions)
        return starts if pieces is None else know(starts, pieces)

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """For each span, its runs of tokens of one document."""
        return pieces_of(self.positions)

    def local_sum(self, x: Tensor) -> Tensor:
        total = x.new_zeros((self.num_documents, *x.shape[2:]))
        return total.index_add(0, self.documents.flatten(), x.flatten(0, 1))

    def summed(self, part: Callable[[], Tensor]) -> Tensor:
        """A sum over documents: this span's own, or with those of other spans in time."""
        return part() if self.memory is None or self.memory.sums is None else self.memory.sums(part)

    def recall(self, slot: str) -> Any:
        """Returns the state that the span before this one in time left there; None without one."""
        return None if self.memory is None else self.memory.entering.get(slot)

    def leave(self, slot: str, value: Callable[[], Any]) -> None:
        """Leaves `value()` to the next span in time, if there is one."""
        if self.memory is not None and not self.memory.last:
            self.memory.leaving.setdefault(slot, value())


@dataclass(kw_only=True)
class Whole(Tokens):
    """One device holds the whole sequence, or receives it span after span with a `memory`."""

    @classmethod
    def of(cls, positions: Tensor, *, memory: Memory | None = None) -> "Whole":
        """Builds it from [B, T] positions alone: documents are numbered from their starts and every token counts."""
        flat = (positions == 0).flatten()
        documents = (flat.cumsum(0) - flat[0].long()).view_as(positions)
        return cls(
            positions=positions,
            documents=documents,
            num_documents=int(documents[-1, -1]) + 1,
            counted=torch.ones_like(positions, dtype=torch.bool),
            memory=memory,
        )

    def before(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        tail = self.recall(f"{slot}/before")
        if tail is None:
            tail = x.new_zeros((x.shape[0], width, *x.shape[2:]))
        # Only as much of x as is left of it: a view of all would hold all.
        self.leave(f"{slot}/before", lambda: torch.cat((tail, x[:, max(0, x.shape[1] - width) :]), dim=1)[:, -width:])
        return tail

    def scan(self, recurrence: Recurrence | Serial, *xs: Tensor, slot: str) -> Tensor:
        state = self.recall(slot)
        if isinstance(recurrence, Serial):
            out, left = recurrence.begin(*xs, positions=self.positions, state=state)
            self.leave(slot, lambda: left)
            return out
        begun = recurrence.begin(*xs, starts=self.starts)
        self.leave(slot, lambda: recurrence.act(begun.effect, state))
        return begun.finish(state)

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
        past = self.recall(slot) or KVCache(k[:, :0], v[:, :0])
        firsts = past.firsts(self.pieces)
        held = past.joined(k, v)
        self.leave(slot, lambda: held.kept(self.pieces, firsts, window, sinks))
        offsets = [past.k.shape[1]] * q.shape[0]
        return attend_pieces(
            q,
            held.k,
            held.v,
            self.pieces,
            offsets,
            window=window,
            sinks=sinks,
            firsts=firsts,
            softcap=softcap,
            sink_logits=sink_logits,
        )

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        keys, values = packed(k, v, index.k)
        past = self.recall(slot) or KVCache(keys[:, :0], values[:, :0])
        held = past.joined(keys, values)
        self.leave(slot, lambda: held.kept(self.pieces, None, None, 0))
        return attend_selected(q, held.k, held.v, index, *causal(self.positions, past.k.shape[1]))

    def sum(self, x: Tensor) -> Tensor:
        return self.summed(lambda: self.local_sum(x))
