"""A parameter of ours as rows of published tensors, one after another.

Whatever order a published tensor has its rows in (queries beside their gates, keys and values head by head), a
parameter of ours is a concatenation of ranges of such rows: `ParameterSource.pieces`. The same table read backwards
says where a published tensor's rows lie in our parameters. What else differs is the shape of a row: `Form`.

Legend: E experts, D model width, K columns, C channels, W taps.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from models.precision import wide

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """The published form of a parameter's rows.

    unit: of our shape, how many published rows make up one index of the first dimension. columns: of our shape, the
    shape of a published row. here: published rows [n·unit, *columns] to our [n, …]; there: and back. computed: whether
    numbers change on the way, which then have more digits than those that they come from.
    """

    unit: Callable[[Shape], int]
    columns: Callable[[Shape], Shape]
    here: Callable[[Tensor], Tensor]
    there: Callable[[Tensor], Tensor]
    computed: bool = False


class _Same:
    def __call__(self, x: Tensor) -> Tensor:
        return x


PLAIN = Form(lambda shape: 1, lambda shape: shape[1:], _Same(), _Same())
ABOUT_ZERO = Form(lambda shape: 1, lambda shape: shape[1:], lambda x: wide(x) + 1, lambda x: x - 1, True)  # a norm's
TAPS = Form(  # ours [C, W], the present token's first; published [C, 1, W], it last
    lambda shape: 1,
    lambda shape: (1, *shape[1:]),
    lambda x: x.squeeze(1).flip(-1),
    lambda x: x.flip(-1).unsqueeze(1),
)


def experts(columns: int) -> Form:
    """Ours [E, D, K]; published [K, D] for each, rows of all of them counted on. columns: K."""
    return Form(
        lambda shape: shape[2],
        lambda shape: shape[1:2],
        lambda x: x.unflatten(0, (-1, columns)).transpose(1, 2),
        lambda x: x.transpose(1, 2).flatten(0, 1),
    )


def scaled(form: Form, factor: float) -> Form:
    """The same rows times a factor of the published model's, which no layer of ours has."""
    if math.isclose(factor, 1, rel_tol=1e-12):
        return form
    return Form(form.unit, form.columns, lambda x: wide(form.here(x)) * factor, lambda x: form.there(x / factor), True)


def times_rows(rows: "Entries", name: str, factor: Callable[[int], float]) -> "Entries":
    """The same rows, each piece of one parameter times a factor. factor: by the piece's place."""
    pieces, form = rows[name]
    scaled_pieces = tuple(p._replace(factor=p.factor * factor(i)) for i, p in enumerate(pieces))
    return rows | {name: ParameterSource(scaled_pieces, form)}


class PublishedRows(NamedTuple):
    """`number` rows of the published tensor `source`, from `start` on. factor: of the published model's, which no layer
    of ours has; an export has it at 1."""

    source: str
    start: int
    number: int
    factor: float = 1.0


class ParameterSource(NamedTuple):
    """A parameter of ours: the published rows that make it up, in order, and their form."""

    pieces: tuple[PublishedRows, ...]
    form: Form = PLAIN


Entries = dict[str, ParameterSource]  # by our parameter's name


def whole(source: str, rows: int, form: Form = PLAIN) -> ParameterSource:
    """All rows of one published tensor."""
    return ParameterSource((PublishedRows(source, 0, rows),), form)


def joined(*sources: tuple[str, int], form: Form = PLAIN) -> ParameterSource:
    """Several published tensors end to end: (name, rows) of each."""
    return ParameterSource(tuple(PublishedRows(source, 0, rows) for source, rows in sources), form)


def parts(pieces: tuple[PublishedRows, ...], begin: int, end: int) -> list[PublishedRows]:
    """The pieces of the rows [begin, end) of what they make up together."""
    parts, at = [], 0
    for piece in pieces:
        low, high = max(begin - at, 0), min(end - at, piece.number)
        if low < high:
            parts.append(piece._replace(start=piece.start + low, number=high - low))
        at += piece.number
    return parts


class RowPlace(NamedTuple):
    """The place of `number` rows of a published tensor: in our parameter `name` from its published row `start` on."""

    name: str
    start: int
    number: int


PublishedTensors = dict[str, tuple[Shape, tuple[RowPlace, ...]]]  # by their names


def published(entries: Entries, shapes: Mapping[str, Shape]) -> PublishedTensors:
    """Maps each published tensor to its shape and to its rows in our parameters, in order. shapes: of our parameters.

    Raises ValueError where the tables do not fit the shapes, or name a row twice or never: a mistake in them.
    """
    row_places: dict[str, list[tuple[int, RowPlace]]] = {}
    columns: dict[str, Shape] = {}
    for name, entry in entries.items():
        at, shape = 0, shapes[name]
        for source, start, number, _ in entry.pieces:
            row_places.setdefault(source, []).append((start, RowPlace(name, at, number)))
            columns[source] = entry.form.columns(shape)
            at += number
        if at != shape[0] * entry.form.unit(shape):
            raise ValueError(f"{name}: has {shape[0] * entry.form.unit(shape)} rows, its table {at}")
    if missing := [name for name in shapes if name not in entries]:
        raise ValueError(f"{missing[0]}: has no table")
    result = {}
    for source, places in row_places.items():
        places.sort(key=lambda each: each[0])
        at = 0
        for start, place in places:
            if start != at:
                raise ValueError(f"{source}: row {min(start, at)} is named twice or never")
            at += place.number
        result[source] = ((at, *columns[source]), tuple(place for _, place in places))
    return result
