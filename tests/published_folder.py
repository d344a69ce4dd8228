"""Folders as Hugging Face has them, made on the spot without `transformers`: any architecture, random numbers."""

import json
import math
from pathlib import Path

import torch

from models.hub import of_config, tensors
from models.hub.rows import published
from train.instantiate import construct

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    **{"vocab_size": 264, "hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a folder of this configuration has."""
    architecture = of_config(config)
    with torch.device("meta"):
        model = construct(architecture.read(config))
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return {name: shape for name, (shape, _) in published(architecture.rows(config), ours).items()}


def write(folder: Path, config: dict, *, longest: int = 10**9, wanted: dict | None = None) -> Path:
    """The folder, in files of at most `longest` bytes. wanted: the tensors' shapes, where they are to be wrong."""
    folder.mkdir(parents=True)
    wanted = shapes(config) if wanted is None else wanted
    parts = tensors.shards({name: 4 * math.prod(shape) for name, shape in wanted.items()}, longest)
    where = {}
    generator = torch.Generator().manual_seed(0)
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        told = {each: (wanted[each], torch.float32) for each in part}
        tensors.write(folder / name, told, (torch.randn(wanted[each], generator=generator) * 0.1 for each in part))
        where |= dict.fromkeys(part, name)
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
