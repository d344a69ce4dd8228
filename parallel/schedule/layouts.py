"""The layouts that a run could have: all meshes of so many ranks, and in how many micro-steps each takes a step.

Nothing is left out that the product could run: what does not divide, or is refused, is for whoever asks to say
(`valid`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from parallel.schedule.mesh import DIMENSIONS, Mesh


@dataclass(frozen=True)
class LayoutChoice:
    """A mesh, the packed sequences that a group holds in a micro-step, the micro-steps of a step, and what a backward
    pass computes again."""

    mesh: Mesh
    together: int
    micro_steps: int
    recompute: str

    def tokens(self, length: int) -> int:
        """The most tokens of a rank in a micro-step, of sequences of this length."""
        return -(-self.together * length // self.mesh.sequence)

    def __str__(self) -> str:
        again = "" if self.recompute == "none" else f", recompute {self.recompute}"
        return f"{self.mesh}, {self.micro_steps} micro-step{'s' * (self.micro_steps != 1)}{again}"


def divisors(number: int) -> list[int]:
    """In ascending order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def meshes(world: int, sizes: Mapping[str, Sequence[int]], valid: Callable[[Mesh], bool]) -> Iterator[Mesh]:
    """All meshes of `world` ranks whose dimensions have one of these `sizes`; data has what they leave, where it has
    none of its own."""
    free = [name for name in DIMENSIONS if name != "data"]
    for chosen in product(*([n for n in sizes[name] if world % n == 0] for name in free)):
        size = math.prod(chosen)
        if world % size or "data" in sizes and world // size not in sizes["data"]:
            continue
        mesh = Mesh(data=world // size, **dict(zip(free, chosen, strict=True)))
        if valid(mesh):
            yield mesh


def shares(sequences: int, groups: int, limit: int | None) -> list[tuple[int, int]]:
    """The ways of a group to take its share of a step's sequences: (held together, micro-steps). limit: of the former.

    All at once, and halves of it down to one.
    """
    own = -(-sequences // groups)
    most = own if limit is None else min(own, limit)
    ways: dict[int, int] = {}
    while most >= 1:
        ways.setdefault(-(-own // most), most)
        if most == 1 or limit is not None:
            break
        most //= 2
    return [(together, steps) for steps, together in ways.items()]
