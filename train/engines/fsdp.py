"""PyTorch's fully sharded data parallelism (FSDP2), over all data × sequence ranks."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from models.lm import LM
from parallel.apply import parallelise
from parallel.memory import RECOMPUTE


class FSDP:
    """recompute: what the backward pass computes again. none: nothing; full: each layer from its input, which is all
    that is then kept of it. reshard_after_forward: free a layer's gathered weights after its forward and gather them
    again for its backward: less memory, more communication."""

    def __init__(self, *, recompute: str = "none", reshard_after_forward: bool = True):
        if recompute not in RECOMPUTE:
            raise ValueError(f"engine.recompute={recompute}: must be one of {', '.join(RECOMPUTE)}")
        self.recompute, self.reshard_after_forward = recompute, reshard_after_forward

    def prepare(self, model: LM, mesh: DeviceMesh, *, seed: int, dtype: torch.dtype) -> LM:
        """The model, from the meta device to sharded and initialised."""
        return parallelise(
            model,
            mesh,
            seed=seed,
            dtype=dtype,
            remat=self.recompute,
            reshard_after_forward=self.reshard_after_forward,
        )
