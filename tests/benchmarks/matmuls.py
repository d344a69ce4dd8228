"""The matrix products of a step, each timed alone: the least time that the step's arithmetic takes on this machine."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_grouped_mm")
ATTENTION = "_scaled_dot_product"
SECONDS = 0.02  # that one product is repeated for, at least


class Like(NamedTuple):
    """What a tensor's speed in a product depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Product(NamedTuple):
    """A call of an operator: its arguments, tensors as `Like`."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.operator._schema.name.partition("::")[2]

    @property
    def kind(self) -> str:
        """attention, recurrence (products of many small matrices) or weights."""
        if self.name.startswith(ATTENTION):
            return "attention"
        return "recurrence" if "bmm" in self.name else "weights"


class Products(TorchDispatchMode):
    """Counts the products that are run while it is entered, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in PRODUCTS or name.startswith(ATTENTION):
            like = tree_map(_like, (args, kwargs))
            self.counts[Product(func, _frozen(like[0]), tuple(sorted(like[1].items())))] += 1
        return func(*args, **kwargs)


def seconds(counts: Counter[Product], rounds: int = 5) -> dict[str, float]:
    """CPU seconds by kind: the sum over products of the best time of each, alone, with its operands in cache or not as
    they come."""
    total: Counter[str] = Counter()
    for product, count in counts.items():
        args, kwargs = tree_map(_make, (product.args, dict(product.kwargs)), is_leaf=lambda x: isinstance(x, Like))
        total[product.kind] += count * _best(lambda: product.operator(*args, **kwargs), rounds)  # noqa: B023
    return dict(total)


def _best(run: Callable[[], Any], rounds: int) -> float:
    run()
    began = time.process_time()
    run()
    once = max(time.process_time() - began, 1e-7)
    repeats, found = max(1, int(SECONDS / rounds / once)), []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(repeats):
            run()
        found.append((time.process_time() - began) / repeats)
    return min(found)


def _like(x: Any) -> Any:
    return Like(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _make(x: Any) -> Any:
    if not isinstance(x, Like):
        return x
    # Filled as a row: of an expanded operand several elements are one, and in-place operators refuse it.
    row = torch.empty(1 + sum((size - 1) * step for size, step in zip(x.shape, x.strides, strict=True) if size))
    row = row.normal_().to(x.dtype) if x.dtype.is_floating_point else torch.zeros(len(row), dtype=x.dtype)
    return row.as_strided(x.shape, x.strides)


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, list | tuple) and not isinstance(x, Like) else x
