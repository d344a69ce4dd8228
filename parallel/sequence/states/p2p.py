"""Neighbours in a chain: what a span hands to the next or to the one before."""

from torch import Tensor

from parallel.liveness import Marked
from parallel.sequence.span_layout import SpanLayout


class Post:
    """Sends go out without waiting; leaving the context waits until all have been taken."""

    def __init__(self, chain: SpanLayout, purpose: str):
        self.chain, self.purpose = chain, purpose
        self._out: list[tuple[Marked, Tensor]] = []

    def __enter__(self) -> "Post":
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            for work, _ in self._out:
                work.wait()

    def send(self, n: int, x: Tensor) -> None:
        """Sends to the rank of span n, if there is such a span and it is another rank's."""
        links = self.chain.links
        if 0 <= n < len(links) and links[n].rank != self.chain.comm.rank:
            x = x.contiguous()
            self._out.append((self.chain.comm.send(x, links[n].rank, purpose=self.purpose), x))

    def receive(self, n: int, like: Tensor) -> Tensor:
        """Receives a tensor from the rank of span n."""
        return self.chain.comm.receive(like, self.chain.links[n].rank, purpose=self.purpose)
