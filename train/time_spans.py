"""Spans in time: a sequence longer than memory is trained on span after span, through the same states.

Truncated (TBPTT: Williams & Peng 1990): each span forward and backward, the states between two spans without gradient.
Exact: forward through all spans without a graph, keeping what each leaves to the next; then from the last span to the
first, each forward again and backward, with the gradient of what it leaves, which the span after it has just given.
That is one more forward pass, as recomputing every layer is, in the memory of one span and of what lies between spans
(checkpointing in time: Gruslys et al. 2016, 1606.03401, with a checkpoint at every span).

An example: one layer, a state S of one number, decay ½, inputs 1, 2, 3, 4, the loss is the last state, spans of two
tokens. Forward without a graph: the first span leaves S = 2.5, the border keeps that, the second is not run, for
nothing follows it. Backward begins with the last span: entered with the leaf S = 2.5 it gives ½·(½·2.5 + 3) + 4 =
6.125, and its backward pass gives ∂S = ¼ at the leaf, beside the gradients of its own inputs, ½ and 1. Then the first
span runs again, with a graph; it leaves S = 2.5 as before (equal to the bit, as recomputation must be), and its
backward pass starts from ¼ at that S: ∂inputs = ⅛ and ¼. Truncated gradients would stop at the leaf: 0 and 0 for the
first span.

On two ranks each span in time is spread over both, as a chain of its own: the border holds the state after the last
rank's tokens, the same copy on all ranks, and the first rank's span of the next chain is entered with it
(`parallel/sequence/time_spans.py` sums the ranks' gradients of the copies).

What lies between is a state a recurrent layer, a few tokens a convolution, a window's keys and values. Only softmax
layers without a window leave more the longer the sequence is: every border keeps its own span's keys and values alone,
and where activations are offloaded, in the host's memory.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from models.kv_cache import KVCache
from models.sequence import DocumentSums, Memory
from train.loss import LossSums

State = dict[str, Any]  # by slot


@dataclass(frozen=True)
class Spans:
    """tokens: of a span in time, at most, on a rank. gradient: exact or truncated. on_host: whether what lies between
    spans waits in the host's memory."""

    tokens: int
    gradient: str = "exact"
    on_host: bool = False


class SpansTold:
    """Says how far a step of many spans is, every half a minute."""

    def __init__(self, say: Callable[[str], None], every: float = 30.0):
        self.say, self.every = say, every
        self._began = self._said = 0.0

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if done == 1:
            self._began = self._said = now
        elif now - self._said >= self.every:
            self._said, past = now, now - self._began
            left = past / (done - 1) * (of - done)
            self.say(f"{done / of:.0%} of a step of many spans, {past:.0f} s; some {left:.0f} s to go")


class Borders:
    """The values that each span left to the next, without their graph. Keys and values of all borders are held once: of
    those that a
    span was entered with, the next border refers to the ones before."""

    def __init__(self, on_host: bool):
        self.on_host = on_host
        self.kept: list[dict[str, tuple[Any, int]]] = []

    def add(self, leaving: State, tokens: int) -> None:
        """tokens: of the span that leaves this."""
        self.kept.append({slot: self._own(value, tokens) for slot, value in leaving.items()})

    def entering(self, border: int) -> State:
        """Returns what entered the span behind a border, as leaves that gather gradients."""
        return {slot: tree_map(_leaf, self._whole(border, slot)) for slot in self.kept[border]}

    def _own(self, value: Any, tokens: int) -> tuple[Any, int]:
        """Returns what a border keeps of a value, and how long the value is where that is not all."""
        if not isinstance(value, KVCache) or value.sinks or value.k.shape[1] <= tokens:
            return tree_map(self._hold, value), 0
        return tree_map(self._hold, KVCache(value.k[:, -tokens:], value.v[:, -tokens:])), value.k.shape[1]

    def _hold(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return _At(x.device, x.detach().to("cpu" if self.on_host else x.device, copy=True))  # not what it is a view of

    def _whole(self, border: int, slot: str) -> Any:
        value, length = self.kept[border][slot]
        pieces = [tree_map(_back, value, is_leaf=_held)]
        if not length:
            return pieces[0]
        missing = length - pieces[0].k.shape[1]
        while missing > 0:
            border -= 1
            piece = tree_map(_back, self.kept[border][slot][0], is_leaf=_held)
            pieces.insert(0, piece)
            missing -= piece.k.shape[1]
        k, v = (torch.cat(parts, dim=1)[:, -length:] for parts in zip(*(p[:2] for p in pieces), strict=True))
        return KVCache(k, v)


class _At:
    """A tensor that waits, perhaps on the host, and the device that it belongs to."""

    def __init__(self, device: torch.device, value: Tensor):
        self.device, self.value = device, value


def _held(x: Any) -> bool:
    return isinstance(x, _At)


def _back(x: Any) -> Any:
    return x.value.to(x.device) if isinstance(x, _At) else x


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


@dataclass(frozen=True)
class Passage:
    """The spans in time of one micro-step.

    forward: of the span with this index, with this memory. tokens: of each span, in the group; 0 where the group idles.
    objective: this rank's part of the loss. begin_backward: is told whether the backward pass to come is the
    micro-step's last. passed: is told after each span how much work is done, and of how much, in forward passes of a
    span; a backward pass counts as two."""

    forward: Callable[[int, Memory], LossSums]
    tokens: list[int]
    objective: Callable[[LossSums], Tensor]
    begin_backward: Callable[[bool], None]
    phase: Callable[[str], AbstractContextManager[None]]
    passed: Callable[[int, int], None] = lambda done, of: None

    def run(self, spans: Spans) -> Iterator[LossSums]:
        """Accumulates the gradients; the sums of each span as it is done."""
        return self._exact(spans.on_host) if spans.gradient == "exact" else self._truncated()

    def _truncated(self) -> Iterator[LossSums]:
        memory = Memory(sums=DocumentSums())
        for i in range(len(self.tokens)):
            self.begin_backward(i == len(self.tokens) - 1)
            part, _ = self._forward(i, memory)
            with self.phase("backward"):
                self.objective(part).backward()
            memory.advance()
            memory.entering = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, memory.entering)
            self.passed(i + 1, len(self.tokens))
            yield part

    def _exact(self, on_host: bool) -> Iterator[LossSums]:
        last, sums, borders = len(self.tokens) - 1, DocumentSums(), Borders(on_host)
        memory, count = Memory(sums=sums), 0
        with torch.no_grad():
            for i, tokens in enumerate(self.tokens):
                if i == last and not count:
                    break  # nobody waits for what is summed over the whole sequence
                memory.last = i == last
                count = self._forward(i, memory)[1]
                memory.advance()
                borders.add(memory.entering, tokens)
                self.passed(i + 1, last + 3 * len(self.tokens))
        sums.known = True
        gradients: State = {}
        for i in range(last, -1, -1):
            entering = borders.entering(i - 1) if i else {}
            memory = Memory(entering, last=i == last, sums=sums)
            self.begin_backward(i == 0)
            part, _ = self._forward(i, memory)
            with self.phase("backward"):
                _backward(self.objective(part), memory.leaving, gradients)
            gradients = tree_map(_gradient, entering)
            self.passed(last + 3 * (len(self.tokens) - i), last + 3 * len(self.tokens))
            yield part

    def _forward(self, i: int, memory: Memory) -> tuple[LossSums, int]:
        """A span's sums, and how many sums over documents it asked for: the model decides that, the same on all ranks.

        An idle span shares nothing with others."""
        if not self.tokens[i]:
            memory = Memory(last=True, sums=DocumentSums())
        assert memory.sums is not None
        memory.sums.asked = 0
        with self.phase("forward"):
            part = self.forward(i, memory)
            return part, memory.sums.asked


def _gradient(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.requires_grad:
        return x
    return torch.zeros_like(x) if x.grad is None else x.grad


def _backward(objective: Tensor, leaving: State, gradients: State) -> None:
    """Gradients from the objective and from what is left. A zero is a gradient too: every rank walks the same graph."""
    roots: list[Tensor] = [objective]
    seeds: list[Tensor | None] = [None]
    for slot, gradient in gradients.items():
        for x, g in zip(tree_leaves(leaving[slot]), tree_leaves(gradient), strict=True):
            if isinstance(x, Tensor) and x.requires_grad:
                roots.append(x)
                seeds.append(g)
    torch.autograd.backward(roots, seeds)
