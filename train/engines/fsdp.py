"""PyTorch's fully sharded data parallelism (FSDP2), over all data × sequence ranks."""

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from models.axes import declarations
from models.lm import LM
from parallel.activation_memory import RecomputePolicy
from parallel.mesh import Meshes
from parallel.pipeline.cut import PipelineCut
from parallel.schedule.comm_volume import GradientFormat
from train.engines.engine import MakeOptimizer, check_activations
from train.optim.build import build_optimizer

CompileName = Literal["none", "auto", "blocks"]


class FSDP:
    """recompute: the parts that the backward pass computes again. none: nothing; full: each layer, saving its input
    alone; selective: each layer but its matmuls with weights, its attention and its messages between ranks, whose
    results are saved; planned: each layer, in the groups to which scheduler=adaptive gives more tokens for it, by
    scheduler.memory. reshard_after_forward: true frees a layer's gathered weights after its forward pass and
    gathers them again for its backward pass, in every micro-step: less memory, more communication; false gathers them
    once a step. gradients: format of gradients on their way to the rank that holds the weight, once a step. high: that
    of master weights; bf16: half of the bytes, each rank's part rounded once; parts are added up in the dtype of master
    weights, those of micro-steps before and those of ranks after. tile: tokens that a dense feed-forward and a
    recurrence take at a
    time, computing each tile again for its backward (2506.13996); null for all at once. offload_activations: true moves
    the activations that layers save to the host's memory. offload_optimizer: true holds weights, gradients and
    optimizer state in the host's memory, and steps the optimizer there. Where the device is the CPU, both offloads
    change nothing. compile: layers that torch.compile fuses for training; blocks: all; auto: those kinds
    that it makes faster here, measured at the start. cuda_graphs: true replays what is compiled from CUDA graphs, which
    pays where shapes repeat."""

    def __init__(
        self,
        *,
        recompute: RecomputePolicy = "none",
        reshard_after_forward: bool = True,
        gradients: GradientFormat = "high",
        tile: int | None = None,
        offload_activations: bool = False,
        offload_optimizer: bool = False,
        compile: CompileName = "none",
        cuda_graphs: bool = False,
    ):
        check_activations(recompute, tile)
        if gradients not in get_args(GradientFormat):
            raise ValueError(f"engine.gradients={gradients}: must be one of {', '.join(get_args(GradientFormat))}")
        if compile not in get_args(CompileName):
            raise ValueError(f"engine.compile={compile}: must be one of {', '.join(get_args(CompileName))}")
        if compile != "none" and tile is not None:
            raise ValueError(f"engine.tile={tile}: must be null with engine.compile={compile}")
        if cuda_graphs and compile == "none":
            raise ValueError("engine.cuda_graphs=true: must be false with engine.compile=none")
        self.gradients, self.compile, self.cuda_graphs = gradients, compile, cuda_graphs
        self.recompute, self.reshard_after_forward, self.tile = recompute, reshard_after_forward, tile
        self.offload_activations, self.offload_optimizer = offload_activations, offload_optimizer

    def prepare(
        self, model: LM, meshes: Meshes, *, seed: int, dtype: torch.dtype, cut: PipelineCut | None = None
    ) -> LM:
        """The model, from the meta device to sharded and initialised; of a pipeline's, this rank's layers.

        Raises ValueError where the optimizer's state goes to the host and no process group reaches tensors there.
        """
        if self.offload_optimizer and meshes.device.type != "cpu" and "gloo" not in dist.get_backend_config():
            raise ValueError(
                "engine.offload_optimizer=true: must have ranks that also communicate on the CPU, to clip gradients "
                "there (backend cpu:gloo,cuda:nccl)"
            )
        from parallel.parallelize import parallelise  # imports torch's FSDP, for two seconds

        return parallelise(
            model,
            meshes,
            seed=seed,
            dtype=dtype,
            remat=self.recompute,
            reshard_after_forward=self.reshard_after_forward,
            gradients=self.gradients,
            tile=self.tile,
            offload_activations=self.offload_activations,
            offload_optimizer=self.offload_optimizer,
            cut=cut,
        )

    def build(
        self,
        model: LM,
        meshes: Meshes,
        make: MakeOptimizer,
        *,
        seed: int,
        dtype: torch.dtype,
        cut: PipelineCut | None = None,
    ) -> Optimizer:
        """Places a model for training and returns its optimizer, a plain one of sharded parameters."""
        declared = declarations(model)
        self.prepare(model, meshes, seed=seed, dtype=dtype, cut=cut)
        return build_optimizer(make, model, declared)
