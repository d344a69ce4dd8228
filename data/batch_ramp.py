"""Batch sizes that grow as a run goes on: which step has how many tokens, and the batches of those sizes.

A ramp is [(token, size), …]: steps have `size` tokens from the first one that begins at or behind `token`. The order
is cut into units, as many tokens as all sizes have in common, and a step takes as many units as its size holds, one
after another: the sequences, and their order, are those of a run whose steps are single units. So a batch stays a
function of (seed, step, skips), and costs the same wherever a run goes on.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from data.pack import Packed

MOST_TOKENS = 1 << 28  # of a step: twice what the largest published batches have
Lines = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Ramp:
    """lines: (token, size), from token 0 on. `of` raises ValueError, which opens with the key, for what is no ramp."""

    lines: Lines
    begins: list[tuple[int, int]] = field(init=False)  # (step, tokens before it) where each line takes over

    @classmethod
    def of(cls, batch_tokens: Any) -> "Ramp":
        """Reads `train.batch_tokens`: a number of tokens, or lines of [token, number]."""
        if isinstance(batch_tokens, int) and not isinstance(batch_tokens, bool):
            batch_tokens = [[0, batch_tokens]]
        try:
            lines = [(_whole(token), _whole(size)) for token, size in batch_tokens]
        except (TypeError, ValueError):
            lines = []
        tokens = [token for token, _ in lines]
        if (most := max((size for _, size in lines), default=0)) > MOST_TOKENS:
            raise ValueError(f"train.batch_tokens={most}: must be at most {MOST_TOKENS:,} tokens a step")
        if not lines or tokens[0] != 0 or tokens != sorted(set(tokens)) or min(size for _, size in lines) < 1:
            raise ValueError(
                f"train.batch_tokens={batch_tokens}: must be a number of tokens above 0, or lines of [token, number] "
                "that begin with token 0 and go on with later ones"
            )
        return cls(lines)

    def __post_init__(self) -> None:
        begins, ends = [(0, 0)], [token for token, _ in self.lines[1:]]
        for (_, size), end in zip(self.lines, ends, strict=False):
            step, reached = begins[-1]
            steps = max(-(-(end - reached) // size), 0)
            begins.append((step + steps, reached + steps * size))
        object.__setattr__(self, "begins", begins)

    @property
    def unit(self) -> int:
        return gcd(*(size for _, size in self.lines))

    @property
    def sizes(self) -> list[int]:
        """In use, the smallest first."""
        ends = [step for step, _ in self.begins[1:]]
        held = [size for i, (_, size) in enumerate(self.lines) if i == len(ends) or self.begins[i][0] < ends[i]]
        return sorted(set(held))

    def size(self, step: int) -> int:
        """Tokens of a step."""
        return self.lines[self._line(step)][1]

    def before(self, step: int) -> int:
        """Tokens of all steps before this one."""
        line = self._line(step)
        begin, reached = self.begins[line]
        return reached + (step - begin) * self.lines[line][1]

    def steps(self, tokens: int) -> int:
        """The least number of steps that have so many tokens."""
        line = max(bisect_left([reached for _, reached in self.begins], tokens) - 1, 0)
        begin, reached = self.begins[line]
        return begin + -(-(tokens - reached) // self.lines[line][1])

    def _line(self, step: int) -> int:
        return max(i for i, (begin, _) in enumerate(self.begins) if begin <= step)


class Ramped:
    """The batches of a ramp, made of those of its units. Raises ValueError for batches whose lengths change."""

    def __init__(self, units: Any, ramp: Ramp) -> None:
        ramps = [list(line) for line in ramp.lines]
        if len(units.shapes()) > 1 or len(getattr(units, "stages", ())) > 1:
            raise ValueError(
                f"train.batch_tokens={ramps}: must be one number where the lengths of sequences change from step to "
                "step: data.packing=concat or best_fit, without curriculum.context, takes a ramp"
            )
        self._units, self.ramp = units, ramp
        self.order = {**units.order, "train.batch_tokens": ramps}
        self.fingerprint = hashlib.sha256(json.dumps(self.order, sort_keys=True).encode()).hexdigest()

    def __getattr__(self, name: str) -> Any:
        if name == "_units":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._units, name)

    def _range(self, position: int) -> range:
        first = self.ramp.before(position) // self.ramp.unit
        return range(first, first + self.ramp.size(position) // self.ramp.unit)

    def tokens(self, step: int, skips: int = 0) -> int:
        """Tokens of a step."""
        return self.ramp.size(step + skips)

    def slots(self, step: int, skips: int = 0) -> list[Any]:
        """Chooses the sequences of a step."""
        return [slot for unit in self._range(step + skips) for slot in self._units.slots(unit)]

    def batch(self, seed: int, step: int, skips: int = 0) -> list[Packed]:
        """The global batch of a step, `skips` batches having been skipped before it."""
        return [packed for unit in self._range(step + skips) for packed in self._units.batch(seed, unit)]

    def drawn(self, step: int, skips: int = 0) -> dict[str, int]:
        """The tokens that each source has given before a step."""
        return self._units.drawn(self._range(step + skips).start)

    def filled(self, step: int) -> float:
        """The share of the places before a step that hold a token."""
        filled: float = self._units.filled(self._range(step).start)
        return filled

    def rope_theta(self, step: int, skips: int = 0) -> float | None:
        """The base of rotary positions, the same in all steps."""
        return self._units.rope_theta(0)

    def shapes(self) -> list[list[int]]:
        """The lengths of every kind of batch that there is."""
        (lengths,) = self._units.shapes()
        return [lengths * (size // self.ramp.unit) for size in self.ramp.sizes]

    def card(self) -> dict[str, Any]:
        """The card of the corpus that a run and its checkpoints save."""
        return {**self._units.card(), "order": self.order, "batches": self.fingerprint}


def opened(data: Any, batch_tokens: Any, curriculum: Any) -> Any:
    """The batches of a corpus or a task, of one size or of a ramp's."""
    ramp = Ramp.of(batch_tokens)
    if len(ramp.lines) == 1:
        return data.open(ramp.unit, curriculum)
    try:
        units = data.open(ramp.unit, curriculum)
    except ValueError as error:
        one, all_ = f"train.batch_tokens={ramp.unit}:", [list(line) for line in ramp.lines]
        line = str(error).replace(one, f"train.batch_tokens={all_}: what its sizes have in common, {ramp.unit},")
        raise ValueError(line.replace("expected a", "must be a")) from None
    return Ramped(units, ramp)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(value)
    return int(value)
