"""engine=megatron without a GPU: Megatron-core's own wrapper and distributed optimizer behind stand-ins for CUDA.

    python -m tests.megatron_on_cpu [STEPS]

Unchanged, both stop at `torch.cuda.current_device()`. Here that is the CPU, a tensor made on "cuda" is made there, and
a tensor's type is called one of CUDA's; all else is Megatron-core's code, and farspan's. It shows that gradients are
summed, clipped and applied right on gloo, and that checkpoints change hands; nothing of streams, overlap or NCCL.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests import engines
from tests.engines import Layout, Run, Runs, apart


def behind_stand_ins(job: dict[str, Any], steps: int, save: int | None = None) -> list[float]:
    """`tests.engines.losses`, with a CPU in the place of CUDA."""
    kind, made = torch.Tensor.type, {name: getattr(torch, name) for name in ("tensor", "zeros")}

    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = kind(tensor, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.") if isinstance(name, str) else name

    def here(name: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            return made[name](*args, **{**kwargs, **({"device": "cpu"} if kwargs.get("device") == "cuda" else {})})

        return make

    with (
        mock.patch("torch.cuda.current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.Tensor, "type", named),
        mock.patch("torch.tensor", here("tensor")),
        mock.patch("torch.zeros", here("zeros")),
    ):
        return engines.losses(job, steps, save)


def compare(runs: Runs) -> Iterator[tuple[str, float]]:
    """Yields what was compared, and by how much it differs."""
    one, two = Layout(1, 1), Layout(2, 2, ("scheduler.tokens_per_rank=96",))
    keys = ("engine=megatron",)
    losses = runs.run(two, Run("fsdp"), Run("megatron", keys, entry=behind_stand_ins))
    plain = losses["fsdp"][0]
    yield f"megatron, {two}", apart(losses["megatron"], plain)
    on = Run("on", keys, resume=runs.checkpoint("fsdp"), entry=behind_stand_ins)
    going_on = runs.run(one, Run("from", resume=runs.checkpoint("megatron")), on)
    half = plain[runs.steps // 2 :]
    yield f"fsdp on {one} from megatron on {two}", apart(going_on["from"], half)
    yield f"megatron on {one} from fsdp on {two}", apart(going_on["on"], half)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        for what, error in compare(Runs(Path(folder), steps)):
            print(f"{error:9.1e}  {what}{'  WRONG' if error > engines.TOLERANCE else ''}", flush=True)
