"""Megatron-core's DistributedDataParallel and distributed optimizer, over all data × sequence ranks.

Both ask for CUDA by name where they make their buffers: without it nothing of them runs.
"""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from models.axes import declarations
from models.lm import LM
from parallel.activation_memory import RecomputePolicy
from parallel.mesh import Meshes
from parallel.pipeline.cut import PipelineCut
from train.engines.engine import MakeOptimizer, check_activations
from train.engines.flat import FlatOptimizer, Stretch
from train.engines.fsdp import FSDP
from train.optim.build import build_optimizer


class MegatronCore:
    """Weights are whole on every rank; gradients lie end to end and are reduced and scattered after the last
    micro-step; each rank steps its part of the weights, with its part of the moments, and gathers the others'.
    recompute, tile, offload_activations: as engine=fsdp has them."""

    def __init__(
        self, *, recompute: RecomputePolicy = "none", tile: int | None = None, offload_activations: bool = False
    ):
        check_activations(recompute, tile)
        self.recompute, self.tile, self.offload_activations = recompute, tile, offload_activations

    def prepare(
        self, model: LM, meshes: Meshes, *, seed: int, dtype: torch.dtype, cut: PipelineCut | None = None
    ) -> LM:
        """Places a model for forward passes, by FSDP: Megatron-core is not needed for them."""
        plain = FSDP(recompute=self.recompute, tile=self.tile, offload_activations=self.offload_activations)
        return plain.prepare(model, meshes, seed=seed, dtype=dtype, cut=cut)

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
        """Places a model and lays its weights and gradients into Megatron-core's buffers."""
        assert cut is None and meshes.mesh.planned == meshes.mesh.world  # preflight refuses what is not data × sequence
        declared = declarations(model)
        from parallel.parallelize import parallelise  # imports torch's FSDP, for two seconds

        parallelise(
            model,
            meshes,
            seed=seed,
            dtype=dtype,
            remat=self.recompute,
            reshard_after_forward=False,
            tile=self.tile,
            offload_activations=self.offload_activations,
            sharded=False,
        )
        return wrap(model, build_optimizer(make, model, declared))


def wrap(model: nn.Module, inner: Optimizer) -> "DistributedOptimizer":
    """The distributed optimizer around a model and its AdamW, over all ranks. Collective."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():  # it names each of a dozen packages that it could use
        warnings.simplefilter("ignore")
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.transformer_config import TransformerConfig

    everyone, (alone, _) = dist.group.WORLD, dist.new_subgroups(group_size=1)
    groups = ProcessGroupCollection()
    groups.dp = groups.dp_cp = groups.expt_dp = everyone
    groups.tp = groups.pp = groups.ep = alone
    # Not for the layers, which are ours: by it gradients are summed and not averaged.
    summed = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=True)
    cut = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    buffers = DistributedDataParallel(summed, cut, model, pg_collection=groups)
    optimizer = distrib_optimizer.DistributedOptimizer(
        optimizer=inner,
        config=OptimizerConfig(use_distributed_optimizer=True, clip_grad=0.0),
        grad_scaler=None,
        init_state_fn=None,
        model_chunks=[buffers],
        per_model_buffers={0: buffers.buffers},
        data_parallel_group=everyone,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )
    return DistributedOptimizer(buffers, optimizer, model)


class DistributedOptimizer(FlatOptimizer):
    """buffers: Megatron-core's DistributedDataParallel around the model. optimizer: its own of this name."""

    def __init__(self, buffers: Any, optimizer: Any, model: nn.Module):
        self.buffers, self.distributed = buffers, optimizer
        super().__init__(model, model, optimizer.optimizer)

    def begin(self, last: bool) -> None:
        """Nothing: gradients are added up in buffers, and summed over ranks where they are clipped."""

    def backward(self, loss: Tensor) -> None:
        self.waiting = True
        loss.backward()

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        self.buffers.finish_grad_sync()
        self.distributed.prepare_grads()
        size = self.norm(next(self.placed.parameters()).device)
        factor = (largest / (size.nan_to_num(0.0, 0.0, 0.0) + 1e-6)).clamp(max=1.0)
        for gradient in self.gradients():
            gradient.mul_(factor.to(gradient.dtype))
        return size

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.distributed.step_with_ready_grads()
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.waiting:
            self.buffers.zero_grad_buffer()
            self.distributed.zero_grad()
            self.waiting = False

    def gradients(self) -> Iterator[Tensor]:
        for part in self.stretches():
            if part.stepped.grad is not None:
                yield part.stepped.grad

    def stretches(self) -> Iterator[Stretch]:
        own = self.distributed
        for parameters, parts in zip(own.model_fp32_groups, own.shard_fp32_groups, strict=True):
            for p, part in zip(parameters, parts, strict=True):
                place = own._get_model_param_range_map(p)["param"]
                yield Stretch(p, p.shape, place.start, part, 0, place.size)
