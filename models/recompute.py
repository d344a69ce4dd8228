"""Results that a layer keeps when it is computed again for its backward pass, so that only the cheap rest is.

Whoever computes something dear asks `kept` for it, inside an autograd function: what is kept has no graph, and the
second pass makes that anew. Asking costs a call for each such result. A policy that is asked for every operator, as
torch's own (`torch.utils.checkpoint.create_selective_checkpoint_contexts`), costs a CPU as much as it saves: a layer
runs thousands of operators, and keeps a dozen.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, tuple[Tensor, ...], list[Tensor])


@dataclass
class Tape:
    """Results saved by one pass of a layer, in the order of their computation; each is handed out once."""

    results: deque[tuple[bool, tuple[Tensor, ...], tuple[int, ...]]] = field(default_factory=deque)
    replaying: bool = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        with using(self):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        self.replaying = True
        with using(self):
            yield

    def result(self, compute: Callable[[], T]) -> T:
        """Raises RuntimeError where the second pass differs from the first, or a result was changed in between."""
        if not self.replaying:
            with using(None):  # what it asks for in turn is part of it
                result = compute()
            several = (result,) if isinstance(result, Tensor) else tuple(result)
            tensors = tuple(x.detach() for x in several)
            self.results.append((isinstance(result, Tensor), tensors, tuple(x._version for x in tensors)))
            return result
        if not self.results:
            raise RuntimeError("a layer that is computed again asks for more than it kept, or a second time")
        one, tensors, versions = self.results.popleft()
        if versions != tuple(x._version for x in tensors):
            raise RuntimeError("what a layer kept was changed in place before its backward pass")
        return tensors[0] if one else tensors  # type: ignore[return-value]

    @property
    def bytes(self) -> int:
        """Bytes of all saved results."""
        return sum(x.numel() * x.itemsize for _, tensors, _ in self.results for x in tensors)


_current: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextmanager
def using(tape: Tape | None) -> Iterator[None]:
    """Has `tape` keep results, or hand them out; None: nothing is kept."""
    token = _current.set(tape)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Tape | None:
    """The tape on which results are saved, or that hands them out; None without one."""
    return _current.get()


def keeping() -> bool:
    """True where results are saved or handed out; never in compiled code, which is computed again as a whole."""
    return not torch.compiler.is_compiling() and _current.get() is not None


def kept(compute: Callable[[], T]) -> T:
    """compute(), or what it gave in the layer's first pass. New tensors, without a graph, that nobody changes."""
    tape = _current.get()
    return compute() if tape is None else tape.result(compute)


def unkept(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), nothing in which is kept: it has its own way to be computed again."""
    with using(None):
        return function(x)
