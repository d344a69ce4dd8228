"""Softmax attention of this project over PyTorch's own: forward, and forward with backward, one thread.

    python -m tests.benchmarks.attention [rounds]

q, k, v [1, 4096, 4, 64], fp32 and bf16. One document is compared with `F.scaled_dot_product_attention(is_causal=True)`;
windows and short documents with the same, to show what they save. Times are processor time, least of the rounds, both
sides in turn.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.packed_attention import attend_pieces
from models.kernels.pieces import Piece

T, H, K = 4096, 4, 64

Attend = Callable[..., Tensor]


def documents(length: int) -> list[list[Piece]]:
    return [[Piece(begin, begin + length, 0) for begin in range(0, T, length)]]


CASES = {
    "one document": {"pieces": documents(T)},
    "window 512": {"pieces": documents(T), "window": 512},
    "window 512, 4 sinks": {"pieces": documents(T), "window": 512, "sinks": 4},
    "window 64": {"pieces": documents(T), "window": 64},
    "16 documents": {"pieces": documents(256)},
    "64 documents": {"pieces": documents(64)},
}


def ours(case: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_pieces(q, k, v, offsets=[0], **case)


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def forward(attend: Attend, xs: list[Tensor], weights: Tensor) -> None:
    with torch.no_grad():
        attend(*xs)


def both(attend: Attend, xs: list[Tensor], weights: Tensor) -> None:
    torch.autograd.grad(attend(*xs), xs, weights)


def seconds(runs: list[Callable[[], None]], rounds: int) -> list[float]:
    """The least processor time of each, taken in turn; the first round warms up."""
    times = []
    for _ in range(rounds + 1):
        for run in runs:
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
    return [min(times[i + len(runs) :: len(runs)]) for i in range(len(runs))]


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        xs = [torch.randn(1, T, H, K, dtype=dtype, requires_grad=True) for _ in range(3)]
        weights = torch.randn(1, T, H, K, dtype=dtype)
        for name, case in CASES.items():
            said = []
            for what in (forward, both):
                sides = (partial(ours, case), theirs)
                mine, other = seconds([partial(what, attend, xs, weights) for attend in sides], rounds)
                said.append(f"{what.__name__} {mine * 1e3:6.1f} ms, {other / mine:5.2f} times as fast")
            print(f"{str(dtype)[6:]:8}  {name:20} {'; '.join(said)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
