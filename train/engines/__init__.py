"""Engines: who shards the model and steps the optimizer."""

from train.engines.deepspeed import DeepSpeed
from train.engines.fsdp import FSDP
from train.engines.megatron import MegatronCore

ENGINES: dict[str, type] = {"deepspeed": DeepSpeed, "fsdp": FSDP, "megatron": MegatronCore}
