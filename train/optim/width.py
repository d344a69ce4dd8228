"""Rates that suit a model of any width, from those found at one width: muP for Adam, a spectral condition for Muon.

A step should change what a layer gives by as much in a wide model as in a narrow one. Let the model be m times as wide
as the base, which has `base_width` channels. Adam moves every element of a weight by about its rate, in directions
that add up over the inputs: a matrix whose inputs widen gets 1/m of the rate, one whose inputs do not (an embedding,
the second half of a bottleneck), a vector or a filter gets all of it (Tensor Programs V, 2203.03466, table 3). Muon's
update has the spectral norm √max(rows, columns) times a constant; the condition asks for √(outputs / inputs) times
another (2310.17813, equation 1), and the factor between the two, over the same at the base, is its rate's. Here a
matrix whose two sides widen gets m^-½, a router 1/m.

Head and router start at m^-½ of what they declare, so that their outputs at the start fall with the width as their
gradients ask (table 3 again); all other matrices declare a variance of 1 / inputs already. A bottleneck starts as it
declares: what follows may normalise it, and would take back any factor.

All of it follows from the axes that a parameter declares. `WIDE` widen with the model: heads are taken to grow in
number and to keep their width, and with them the states of linear mixers, which need no factor then.

Weight decay is divided by the factor: a step takes the same share off a weight at each width (2405.13698).
"""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

from torch import Tensor

from models.axes import Declared

TransferName = Literal["none", "width"]
WIDE = ("embed", "heads", "kv_heads", "ffn", "rank")
READ = ("vocab", "expert")  # by a head, and by a router: their outputs are few, and nothing normalises them


def base_of(transfer: str, base_width: int | None) -> int | None:
    """The base width, None for no transfer. Raises ValueError for values of the two keys that do not go together."""
    if transfer not in get_args(TransferName):
        raise ValueError(f"optimizer.transfer={transfer}: must be one of {', '.join(get_args(TransferName))}")
    shown = "null" if base_width is None else base_width
    if transfer == "none" and base_width is not None:
        raise ValueError(f"optimizer.base_width={shown}: must be null with optimizer.transfer=none")
    if transfer == "width" and (base_width is None or base_width < 1):
        raise ValueError(f"optimizer.base_width={shown}: must be the dim that lr suits with optimizer.transfer=width")
    return base_width


def never(parameter: Tensor) -> bool:
    return False


class WidthFactors:
    """Factors of the parameters of a model, or of one of its ranks' pieces. base: the base width. orthogonal: says of a
    parameter whether Muon steps it."""

    def __init__(self, parameters: Iterable[Tensor], base: int, orthogonal: Callable[[Tensor], bool] = never):
        dims = (_whole(p)[d.axes.index("embed")] for p in parameters if (d := _declared(p)) and "embed" in d.axes)
        self.widening = next(dims, base) / base
        self.orthogonal = orthogonal

    def rate(self, parameter: Tensor) -> float:
        """Returns the factor of its rate."""
        declared = _declared(parameter)
        if declared is None or not multiplies(declared):
            return 1.0
        taken, given = _sides(declared)
        wide = [declared.axes[side] in WIDE for side in (taken, given)]
        if not self.orthogonal(parameter):
            return 1 / self.widening if wide[0] else 1.0
        inputs, outputs = (_whole(parameter)[side] for side in (taken, given))
        narrow = [n / self.widening if w else n for n, w in zip((inputs, outputs), wide, strict=True)]
        return _spectral(inputs, outputs) / _spectral(*narrow)

    def start(self, parameter: Tensor) -> float:
        """Returns the factor of its first value."""
        declared = _declared(parameter)
        if declared is None or not multiplies(declared):
            return 1.0
        taken, given = (declared.axes[side] for side in _sides(declared))
        return self.widening**-0.5 if taken in WIDE and given in READ else 1.0


def multiplies(declared: Declared) -> bool:
    """Says whether it holds matrices that multiply vectors, or a table."""
    return declared.decay and declared.matrix and len(declared.axes) > 1


def _sides(declared: Declared) -> tuple[int, int]:
    """The dimensions of inputs and of outputs, both among the last two."""
    last = len(declared.axes) - 1
    return declared.inputs, 2 * last - 1 - declared.inputs


def _spectral(inputs: float, outputs: float) -> float:
    """Returns the factor that gives an orthogonal matrix times √max(inputs, outputs) the norm √(outputs / inputs)."""
    return float((outputs / inputs / max(inputs, outputs)) ** 0.5)


def _declared(parameter: Tensor) -> Declared | None:
    return getattr(parameter, "declared", None)


def _whole(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the logical parameter."""
    return tuple(getattr(parameter, "piece", parameter).shape)
