"""The cost model of a model that nobody has measured, from its shapes: FLOPs, bytes, and what its layers ask of others.

FLOPs are divided by the rate that a rank reaches, given by whoever asks; that is the assumption of such a model, and
`fit.py` replaces it where times were measured. Traffic is what `comm_volume` counts for the run's transports, byte for
byte: for each size of group it is affine in the group's tokens, so two lengths tell it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from parallel.schedule.adaptive.cost import NONE, Layer, Messages, Model, Recompute
from parallel.schedule.comm_volume import Ask, AttendCall, How, Layout

_SPAN = 4096  # tokens of a span, long beside any halo or window's overhang


class Pairs(NamedTuple):
    """`layers` softmax layers: forward FLOPs a pair of a query and a key, and the window (None: all)."""

    layers: int
    flops: float
    window: int | None = None


class Shapes(NamedTuple):
    """token_flops: forward and backward of a token without its pairs. again: FLOPs a token that recomputing all layers
    adds. kept_again: bytes that a token keeps then; 0 where nothing can be computed again."""

    name: str
    token_flops: float
    pairs: tuple[Pairs, ...]
    state_bytes: float
    activation_bytes: float
    logit_bytes: float = 0.0
    resident_bytes: float = 0.0
    again: float = 0.0
    kept_again: float = 0.0


def model_of(
    shapes: Shapes,
    asks: Iterable[Ask],
    how: How,
    sizes: Sequence[int],
    *,
    rate: float,
    launch: float,
    once: float = 0.0,
    spans: int = 1,
) -> Model:
    """asks: what all layers ask, as `comm_volume.of_plan` takes them. sizes: of groups. rate: FLOP/s of a rank. launch:
    seconds of a micro-step. once: of a step beside those. spans: of a rank, one or two (zigzag), which send their
    states and halos each. Raises ValueError where a transport cannot serve one of the sizes."""
    several = Counter(ask for ask in asks if ask.in_layer)
    sent = {size: _messages(several, how, size, spans) for size in sizes if size > 1}
    layers = [Layer(each.layers, pair=3 * each.flops / rate, window=each.window) for each in shapes.pairs]
    rest = Layer(1, token=shapes.token_flops / rate, by_size=tuple(sent.items()))
    recompute = [NONE]
    if shapes.kept_again:
        recompute.append(
            Recompute(
                "full",
                activations=shapes.kept_again / shapes.activation_bytes,
                tokens=1 + shapes.again / shapes.token_flops,
                pairs=4 / 3,  # forward once more beside forward and twice that
            )
        )
    return Model(
        shapes.name,
        (*layers, rest),
        launch,
        shapes.state_bytes,
        shapes.activation_bytes,
        shapes.logit_bytes,
        shapes.resident_bytes,
        tuple(recompute),
        once=once,
    )


def fitting(asks: Iterable[Ask], how: How, sizes: Sequence[int]) -> list[int]:
    """The sizes that the transports can serve: heads are shared out to so many ranks only."""
    heads = [ask for ask in asks if isinstance(ask, AttendCall) and ask.window is None]

    def served(size: int) -> bool:
        try:
            return all(ask.split(size, how.attention) for ask in heads)
        except ValueError:
            return False

    return [size for size in sizes if served(size)]


def _messages(several: Counter[Ask], how: How, size: int, spans: int) -> Messages:
    """Messages of all layers together, for a rank in the middle, with one span a rank or two in zigzag."""
    messages = []
    for span in (_SPAN, 2 * _SPAN):
        cuts = [i * span // spans for i in range(size * spans + 1)]
        pieces = list(zip(cuts, cuts[1:], strict=False))
        layout = Layout(tuple((pieces[r], *pieces[2 * size - 1 - r :][: spans - 1]) for r in range(size)))
        total, calls = 0, 0
        for ask, times in several.items():
            for way in ask.received(layout, size // 2, how):
                total += times * sum(way.bytes.values())
                calls += times * sum(way.calls.values())
        messages.append((total, calls))
    (short, calls), (long, _) = messages
    token = (long - short) / (_SPAN * size)
    return Messages(max(0.0, short - token * _SPAN * size), token, calls)
