"""Engines: who shards the model and steps the optimizer."""

from train.engines.fsdp import FSDP

ENGINES: dict[str, type] = {"fsdp": FSDP}
