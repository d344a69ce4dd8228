"""The mesh: how the ranks of a run are divided among the kinds of parallelism, as arithmetic alone.

Six sizes multiply to the number of ranks. The order of `DIMENSIONS` is that of rank numbers, the outermost first: a
tensor group is neighbours inside a machine, a sequence group neighbours beyond that, and a pipeline's stages lie
furthest apart, for they say least to each other.

With sequence=2 and tensor=2, ranks 0 and 1 are a tensor group: they hold the same tokens, and halves of the heads. Rank
0's sequence group is (0, 2), rank 1's is (1, 3). A plan speaks of two ranks, and each tensor group plays one of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

DIMENSIONS = ("pipeline", "replicate", "data", "expert", "sequence", "tensor")
PLANNED = ("replicate", "data", "expert", "sequence")  # the dimensions that have tokens of their own


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The sizes, each at least 1; `world` is their product. `parallel.mesh` opens its process groups.

    pipeline: stages that the layers are cut into. replicate: copies of the sharded weights. data: groups with sequences
    of their own. expert: ranks that share out the experts of each layer. sequence: ranks that share each sequence.
    tensor: ranks that share the heads and widths of each layer.
    """

    pipeline: int = 1
    replicate: int = 1
    data: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"parallel.{name}={size}: must be at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        """By dimension, outermost first."""
        return {name: getattr(self, name) for name in DIMENSIONS}

    @property
    def world(self) -> int:
        return prod(self.sizes.values())

    @property
    def split(self) -> tuple[int, int]:
        """The groups that have sequences of their own, and the ranks of each: what a scheduler is given."""
        return self.replicate * self.data * self.expert, self.sequence

    @property
    def planned(self) -> int:
        """The number of ranks that a plan knows."""
        return prod(self.split)

    def __str__(self) -> str:
        """The dimensions that divide something, as `data 2 × sequence 4`."""
        return " × ".join(f"{name} {size}" for name, size in self.sizes.items() if size > 1) or "one rank"

    def coordinates(self, rank: int) -> dict[str, int]:
        """The place of a rank, by dimension."""
        places: dict[str, int] = {}
        for name in reversed(DIMENSIONS):
            rank, places[name] = divmod(rank, getattr(self, name))
        return {name: places[name] for name in DIMENSIONS}

    def rank(self, place: Mapping[str, int]) -> int:
        """The rank at a place; 0 along a dimension that is not named."""
        number = 0
        for name in DIMENSIONS:
            number = number * getattr(self, name) + place.get(name, 0)
        return number

    def groups(self, *dimensions: str) -> tuple[tuple[int, ...], ...]:
        """The ranks, in groups of those that differ along these dimensions alone, ascending in each and in all."""
        inside = [name for name in DIMENSIONS if name in dimensions]
        outside = [name for name in DIMENSIONS if name not in dimensions]

        def places(names: list[str]) -> list[dict[str, int]]:
            ranges = (range(getattr(self, name)) for name in names)
            return [dict(zip(names, place, strict=True)) for place in product(*ranges)]

        groups = (tuple(self.rank({**outer, **inner}) for inner in places(inside)) for outer in places(outside))
        return tuple(sorted(groups))

    def group(self, rank: int, *dimensions: str) -> tuple[int, ...]:
        """The one of these groups that a rank is in."""
        return next(group for group in self.groups(*dimensions) if rank in group)

    def plan_rank(self, rank: int) -> int:
        """The number by which a plan knows a rank, the same for all ranks of a tensor group and for all stages."""
        return self.group(rank, *PLANNED).index(rank)
