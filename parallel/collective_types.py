"""The types of the collectives inside a graph, as plain data: how a value lies over the ranks of a group, and how each
autograd function changes that. `python -m tests.spmd` holds a step to this table; nothing here runs in training.

The letters are those of SPMD types (github.com/meta-pytorch/spmd_types). R: every rank has the same value, and the
gradients that arise on ranks are parts of a sum. I: every rank has the same value, and the same gradient. V: each rank
has its own. P: the value is the sum of what ranks have. The gradient of a value has a type of its own (`GRADIENT`), so
the steps of a forward pass decide what the backward pass must send: `transposed`.
"""

from collections.abc import Mapping
from typing import NamedTuple

GRADIENT = {"R": "P", "I": "I", "V": "V", "P": "R"}
TRANSPOSED = {"all-gather": "reduce-scatter", "reduce-scatter": "all-gather"}  # each other step is its own transpose


class TypeStep(NamedTuple):
    """A change of type. kind: of the collective, or `reinterpret` (each rank's own use of its value begins or ends) or
    `convert` (the value stays, its gradient is counted another way), which send nothing."""

    kind: str
    before: str
    after: str

    @property
    def sends(self) -> bool:
        return self.kind not in ("reinterpret", "convert")

    @property
    def transposed(self) -> "TypeStep":
        """The step that the gradient takes."""
        return TypeStep(TRANSPOSED.get(self.kind, self.kind), GRADIENT[self.after], GRADIENT[self.before])


class FunctionType(NamedTuple):
    """The type of an autograd function of `parallel/` along one axis of the mesh.

    steps: of the tensor `of`, or of every tensor that it takes. others: the type of each other tensor that has one.
    backward: kinds of collectives there, where they are not those of the transposed steps; `why` says why not.
    again: the forward collectives run once more in the backward pass.
    """

    axis: str
    steps: tuple[TypeStep, ...]
    of: str | None = None
    others: Mapping[str, str] = {}
    backward: tuple[str, ...] | None = None
    again: bool = False
    why: str = ""

    @property
    def sent(self) -> tuple[str, ...]:
        """The kinds of collectives of a forward pass."""
        return tuple(step.kind for step in self.steps if step.sends)

    @property
    def returned(self) -> tuple[str, ...]:
        """Those of a backward pass."""
        if self.backward is not None:
            return self.backward
        transposed = tuple(step.transposed for step in reversed(self.steps))
        return (self.sent if self.again else ()) + tuple(step.kind for step in transposed if step.sends)


GATHER = TypeStep("all-gather", "V", "R")
SCATTER = TypeStep("reduce-scatter", "P", "V")
SUM = TypeStep("all-reduce", "P", "R")
EXCHANGE = TypeStep("all-to-all", "V", "V")
OWN_USE = TypeStep("reinterpret", "R", "V")
COUNTED_ONCE = TypeStep("convert", "R", "I")

FUNCTIONS: dict[str, FunctionType] = {
    "parallel.tensor._Enter": FunctionType("tensor", (GATHER,)),
    "parallel.tensor._Leave": FunctionType("tensor", (SCATTER,)),
    "parallel.tensor._Alike": FunctionType("tensor", (COUNTED_ONCE,)),
    "parallel.tensor_loss._CrossEntropy": FunctionType(
        "tensor",
        (OWN_USE, GATHER, COUNTED_ONCE),
        of="x_ND",
        others={"weight_VD": "V", "targets_N": "R"},
        backward=(),
        why="the gradient is written down, not derived: a rank's logits need no other rank's",
    ),
    "parallel.collectives._Sum": FunctionType("any", (SUM,)),
    "parallel.collectives._Gathered": FunctionType("sequence", (GATHER, OWN_USE)),
    "parallel.collectives._Exchanged": FunctionType("any", (EXCHANGE,)),
    "parallel.expert._Depart": FunctionType(
        "expert", (EXCHANGE,), backward=(), why="`_Arrive` sends the gradients, which travel beside other work"
    ),
    "parallel.expert._Arrive": FunctionType("expert", (), backward=("all-to-all",), why="see `_Depart`"),
    "parallel.sequence.attention.all_gather._Gathered": FunctionType(
        "sequence", (GATHER, OWN_USE), of="kv", others={"q": "V"}, again=True
    ),
    "parallel.sequence.attention.few_bits._Rounded": FunctionType("sequence", (), why="a rank rounds its own keys"),
}

UNTYPED: dict[str, str] = {
    "parallel.sequence.states.transport._Depart": "an exclusive scan of affine maps: no sum, and not commutative",
    "parallel.sequence.states.transport._Arrive": "the other half of that scan",
    "parallel.sequence.nonlinear._Passed": "a chain of sends: the state of a span goes to the next one alone",
    "parallel.sequence.attention.ring_ulysses._Attended": "sends and receives between neighbours",
    "parallel.sequence.attention.window_fetch._Fetch": "sends and receives between spans that see each other",
}
"""Functions that no type describes, with the reason: what comes in and what goes out is V, whatever they do."""
