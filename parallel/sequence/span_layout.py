"""The chain of spans: which rank holds which part of a packed sequence, in the order of its tokens."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from parallel.collectives import Comm


class Link(NamedTuple):
    """A span in the chain: tokens [begin, end) of the packed sequence, held by `rank` as its row `row`."""

    begin: int
    end: int
    rank: int
    row: int

    @property
    def length(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class SpanLayout:
    """Spans of all ranks of a group; `spans[r]` are rank r's, ascending. Lengths may differ between ranks.

    `starts`: where documents begin in the packed sequence, ascending; the first is 0.
    """

    comm: Comm
    spans: tuple[tuple[tuple[int, int], ...], ...]
    starts: tuple[int, ...] = (0,)

    @cached_property
    def links(self) -> list[Link]:
        """All spans in the order of the sequence."""
        return sorted(Link(b, e, r, i) for r, held in enumerate(self.spans) for i, (b, e) in enumerate(held))

    @cached_property
    def mine(self) -> list[int]:
        """Indices of this rank's rows in `links`."""
        return [n for n, link in enumerate(self.links) if link.rank == self.comm.rank]

    def of(self, layer: str) -> "SpanLayout":
        """The same, as the slot `layer` asks for it: who waits in it can say for what."""
        return replace(self, comm=replace(self.comm, layer=layer))

    def documents_of(self, link: Link) -> list[tuple[int, int, int]]:
        """For each document with tokens in the span: where it began, and which [begin, end) of it the span holds."""
        at = bisect_right(self.starts, link.begin) - 1
        documents = []
        while at < len(self.starts) and self.starts[at] < link.end:
            ends = self.starts[at + 1] if at + 1 < len(self.starts) else link.end
            documents.append((self.starts[at], max(self.starts[at], link.begin), min(ends, link.end)))
            at += 1
        return documents

    @property
    def rows(self) -> int:
        """The most spans any rank holds."""
        return max(len(held) for held in self.spans)

    @property
    def longest(self) -> int:
        return max(link.length for link in self.links)


class Chained(Protocol):
    """States how much of a `Spread` the operators over its chain use, so that they need not import it.

    positions: int64 [B, T], of this rank's spans. recall, leave: as `models.sequence.Tokens` has them.
    """

    chain: SpanLayout
    positions: Tensor

    def recall(self, slot: str) -> Any: ...

    def leave(self, slot: str, value: Callable[[], Any]) -> None: ...
