"""The next token of several texts as a sequence: what `Whole` does for spans, for one token a row, as cheap as can be.

A text that is written has one token to compute, and everything before it is known: a state for each recurrent layer,
the last inputs of each convolution, keys and values. So there is no effect of a span, no document starts but at the
begin of a text, and nothing is differentiated. `TextRows` holds what the texts have left, by slot, and replaces it
token by token. Modules that have a cheaper way for one token ask `seq.decoding`.

Legend: B rows, a text each, H heads, G key/value heads, R = H / G, K key width, V value width, L places of a cache.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.cross_entropy import softcapped
from models.kernels.indexed_attention import Index, Selected, attend_selected, packed
from models.kernels.pieces import Piece
from models.kv_cache import KVCache
from models.nonlinear_recurrence import Serial
from models.precision import wide
from models.recurrence import Recurrence
from models.sequence import DocumentKey, IndexLosses

T = TypeVar("T")
SPARE = 64  # places that a cache grows by, at least


class PlacedKeys:
    """Keys and values of several texts by place: k [B, G, L, K], v [B, G, L, V], of which a text fills the first.

    Softmax does not ask for an order, and keys have been rotated, so a window is a ring: the first `sinks` tokens of a
    text have places of their own, and those after them take turns in `window` more. Without a window a token's place is
    its position, and L grows by halves, so that a token does not cost a copy of all before it.
    """

    def __init__(self, k: Tensor, v: Tensor, window: int | None, sinks: int):
        self.k, self.v, self.window, self.sinks = k, v, window, sinks

    @classmethod
    def of(
        cls, caches: Sequence[KVCache | None], lengths: Sequence[int], like: tuple[Tensor, Tensor], **seen: Any
    ) -> "PlacedKeys":
        """Places what reading has left of each text, `lengths` tokens. like: a token's k [B, 1, G, K] and v."""
        window, sinks = seen["window"], seen["sinks"]
        room = max(lengths) + SPARE if window is None else min(max(lengths) + SPARE, window + sinks)
        k, v = (x.new_zeros(x.shape[0], x.shape[2], room, x.shape[3]) for x in like)
        placed = cls(k, v, window, sinks)
        for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            if cache is None or not length:
                continue
            last = min(length, cache.k.shape[1] - cache.sinks, window or length)
            early = min(cache.sinks, sinks, length - last)  # of the sinks, those that the cache has in front
            positions = [*range(early), *range(length - last, length)]
            places = torch.tensor([placed.place(p) for p in positions], device=k.device)
            for whole, held in ((k, cache.k), (v, cache.v)):
                own = torch.cat((held[0, :early], held[0, held.shape[1] - last :]))
                whole[row].index_copy_(1, places, own.transpose(0, 1))
        return placed

    def place(self, position: int) -> int:
        """The place of a text's token."""
        if self.window is None or position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % self.window

    def count(self, length: int) -> int:
        """The places that a text of so many tokens fills."""
        return length if self.window is None else min(length, self.sinks + self.window)

    def put(self, k_B1GK: Tensor, v_B1GV: Tensor, positions: Sequence[int]) -> None:
        """Puts a token of each text at its position."""
        places = [self.place(p) for p in positions]
        if max(places) >= self.k.shape[2]:
            more = max(SPARE, self.k.shape[2] // 2)
            if self.window is not None:
                more = min(more, self.sinks + self.window - self.k.shape[2])
            self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        for whole, new in ((self.k, k_B1GK), (self.v, v_B1GV)):
            if len(set(places)) == 1:
                whole.select(2, places[0]).copy_(new.select(1, 0))
            else:
                whole[torch.arange(len(places)), :, torch.tensor(places)] = new[:, 0]

    def keep(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]


class TextRows:
    """The next token of each of several texts; a `models.sequence.Sequence`.

    held: what each text has left so far, by slot: rows of one tensor, of softmax layers a list of caches, one a text
    (`models.kv_cache`). It is changed in place. lengths: tokens of each text before the one to come.
    """

    identities: list[DocumentKey] | None = None
    shapes: tuple[tuple[int, int], ...] = ()
    decoding = True
    index_losses = IndexLosses()  # nothing is added to it

    def __init__(self, held: dict[str, Any], lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.held, self.lengths = held, list(lengths)
        self.device = torch.device(device)
        self._arrange()
        if 0 in self.lengths:  # zeros are what a text that has not begun has left
            for slot, value in held.items():
                if isinstance(value, Tensor):
                    held[slot] = value.masked_fill(self.starts.view(-1, *(1,) * (value.dim() - 1)), 0.0)

    def _arrange(self) -> None:
        B = self.num_documents = len(self.lengths)
        self.firsts: tuple[int, ...] | None = tuple(range(B))
        self.positions = torch.tensor(self.lengths, device=self.device).unsqueeze(1)
        self.documents = torch.arange(B, device=self.device).unsqueeze(1)
        self.counted = torch.ones(B, 1, dtype=torch.bool, device=self.device)
        self._renew()

    def _renew(self) -> None:
        self.starts = self.positions == 0
        self._once: dict[Hashable, Any] = {}

    def advance(self) -> None:
        """Each text has one token more."""
        self.lengths = [length + 1 for length in self.lengths]
        self.positions = self.positions + 1
        self._renew()

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some of the texts."""
        index = torch.tensor(rows, device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        for slot, value in self.held.items():
            if isinstance(value, Tensor):
                self.held[slot] = value[index]
            elif isinstance(value, PlacedKeys):
                value.keep(index)
            else:
                self.held[slot] = [value[row] for row in rows]
        self._arrange()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), or what it gave for this key in another layer; asked anew for each token."""
        if key not in self._once:
            self._once[key] = make()
        value: T = self._once[key]
        return value

    @property
    def pieces(self) -> list[list[Piece]]:
        return [[Piece(0, 1, length)] for length in self.lengths]

    def before(self, x: Tensor, width: int, *, slot: str) -> Tensor:
        tail = self.held.get(f"{slot}/before")
        if tail is None:
            tail = x.new_zeros((x.shape[0], width, *x.shape[2:]))
        window = torch.cat((tail, x), dim=1)
        self.held[f"{slot}/before"] = window[:, 1:]
        return window[:, :-1]

    def scan(self, recurrence: Recurrence | Serial, *xs: Tensor, slot: str) -> Tensor:
        state = self.held.get(slot)
        if isinstance(recurrence, Serial):
            out, self.held[slot] = recurrence.begin(*xs, positions=self.positions, state=state)
        else:
            out, self.held[slot] = recurrence.step(*xs, state=state)
        return out

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
        keys = self.held.get(slot)
        if not isinstance(keys, PlacedKeys):
            caches = [None] * len(self.lengths) if keys is None else keys
            keys = PlacedKeys.of(caches, self.lengths, (k, v), window=window, sinks=sinks)
            self.held[slot] = keys
        keys.put(k, v, self.lengths)
        seen = [keys.count(length + 1) for length in self.lengths]
        longest, mask = max(seen), None
        if min(seen) < longest:
            mask = self.once(("seen", *seen), lambda: torch.arange(longest) < torch.tensor(seen)[:, None])
            mask = mask[:, None, None].to(q.device)
        # A group's queries are rows of one product: its keys are read once for all of them.
        q_BGRK = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])
        k_BGLK, v_BGLV = keys.k.narrow(2, 0, longest), keys.v.narrow(2, 0, longest)
        if softcap is None and sink_logits is None:
            o_BGRV = F.scaled_dot_product_attention(q_BGRK, k_BGLK, v_BGLV, attn_mask=mask)
        else:
            s_BGRL = wide(q_BGRK @ k_BGLK.transpose(-1, -2)) * q.shape[3] ** -0.5
            s_BGRL = softcapped(s_BGRL, softcap)
            s_BGRL = s_BGRL if mask is None else s_BGRL.masked_fill(~mask, -torch.inf)
            if sink_logits is not None:
                sink_GR1 = sink_logits.to(s_BGRL.dtype).view(k.shape[2], -1, 1)
                s_BGRL = torch.cat((s_BGRL, sink_GR1.expand(*s_BGRL.shape[:3], 1)), dim=-1)
            o_BGRV = s_BGRL.softmax(-1)[..., :longest].to(v.dtype) @ v_BGLV
        return o_BGRV.reshape(q.shape[0], 1, q.shape[2], -1)

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        new_keys, new_values = packed(k, v, index.k)
        keys = self.held.get(slot)
        if not isinstance(keys, PlacedKeys):
            caches = [None] * len(self.lengths) if keys is None else keys
            keys = PlacedKeys.of(caches, self.lengths, (new_keys, new_values), window=None, sinks=0)
            self.held[slot] = keys
        keys.put(new_keys, new_values, self.lengths)
        longest = max(self.lengths) + 1
        last_B1 = self.once("last", lambda: torch.tensor(self.lengths, device=q.device).unsqueeze(1))
        held_keys, held_values = (x.narrow(2, 0, longest).transpose(1, 2) for x in (keys.k, keys.v))
        return attend_selected(q, held_keys, held_values, index, torch.zeros_like(last_B1), last_B1)

    def sum(self, x: Tensor) -> Tensor:
        return x[:, 0]
