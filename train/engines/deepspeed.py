"""DeepSpeed's ZeRO (1910.02054), over all data × sequence ranks."""

import logging
import os
import warnings
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from models.axes import declarations
from models.lm import LM
from parallel.activation_memory import RecomputePolicy
from parallel.mesh import Meshes
from parallel.pipeline.cut import PipelineCut
from train.engines.engine import MakeOptimizer, check_activations
from train.engines.fsdp import FSDP
from train.optim.build import build_optimizer

Offload = Literal["none", "optimizer", "weights"]
OFFLOADS = get_args(Offload)
STAGES = (1, 2, 3)


class DeepSpeed:
    """zero: the part of the training state that ranks share out. 1: moments and master weights; 2: gradients too; 3:
    weights too, which a layer gathers when it needs them. offload: the part of it that lives in the host's memory.
    none: nothing; optimizer: moments and master weights, which are stepped there; weights: all weights too, with
    zero=3. Where the device is the CPU, nothing moves, and DeepSpeed takes the way of an offload all the same.
    cpu_adam: true steps by DeepSpeed's own AdamW for CPUs, which is compiled at its first use; with an offload.
    recompute, tile, offload_activations: as engine=fsdp has them."""

    def __init__(
        self,
        *,
        zero: int = 1,
        offload: Offload = "none",
        cpu_adam: bool = False,
        recompute: RecomputePolicy = "none",
        tile: int | None = None,
        offload_activations: bool = False,
    ):
        check_activations(recompute, tile)
        if zero not in STAGES:
            raise ValueError(f"engine.zero={zero}: must be one of {', '.join(map(str, STAGES))}")
        if offload not in OFFLOADS:
            raise ValueError(f"engine.offload={offload}: must be one of {', '.join(OFFLOADS)}")
        if offload == "weights" and zero != 3:
            raise ValueError(f"engine.offload=weights: must be none or optimizer with engine.zero={zero}")
        if cpu_adam and offload == "none":
            raise ValueError("engine.cpu_adam=true: must be false with engine.offload=none")
        self.zero, self.offload, self.cpu_adam = zero, offload, cpu_adam
        self.recompute, self.tile, self.offload_activations = recompute, tile, offload_activations

    def prepare(
        self, model: LM, meshes: Meshes, *, seed: int, dtype: torch.dtype, cut: PipelineCut | None = None
    ) -> LM:
        """Places a model for forward passes, by FSDP: DeepSpeed is not needed for them."""
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
        """Places a model and hands it to DeepSpeed. Every rank has the whole model until DeepSpeed has cut it."""
        assert cut is None and meshes.mesh.planned == meshes.mesh.world  # preflight refuses what is not data × sequence
        deepspeed = load(meshes.device)
        from train.engines.zero import ZeroOptimizer

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
        optimizer = build_optimizer(make, model, declared)
        if self.cpu_adam:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            wanted = ("lr", "betas", "eps", "weight_decay")
            settings = {key: value for key, value in optimizer.defaults.items() if key in wanted}
            optimizer = DeepSpeedCPUAdam([_plain(group) for group in optimizer.param_groups], **settings)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.options(dist.get_world_size()), dist_init_required=False
        )
        return ZeroOptimizer(engine, model, self.zero)

    def options(self, world: int) -> dict[str, Any]:
        """DeepSpeed's own configuration. Weights are fp32 there, and the model computes in the dtype of the run."""
        zero: dict[str, Any] = {"stage": self.zero}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload == "weights":
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_batch_size": world,  # DeepSpeed's count of samples: the plan says what a step is
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A group of parameters, with what DeepSpeed's AdamW and the learning rate's factor need of it."""
    return {key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay", "factor") if key in group}


def load(device: torch.device) -> Any:
    """The package, set up for a device and for the process group that is open. It asks its environment for both."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of torch's older names
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import has set a level of its own
    # On a CPU it would compile shared-memory collectives at every machine's first start, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
