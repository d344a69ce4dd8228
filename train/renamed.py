"""Names that classes had in configurations before, so that every run made with them still resumes.

A configuration names a class by the package that hands it on (`models.LM`, `train.optim.Muon`), never by its file:
files move. Until version 0.1 it named files.
"""

from typing import Any

RENAMED = {
    "data.curriculum.Curriculum": "data.Curriculum",
    "data.loader.Data": "data.Data",
    "data.mixture.Mixture": "data.Mixture",
    "data.mixture.Portion": "data.Portion",
    "launch.templates.kuberay.KubeRay": "launch.templates.KubeRay",
    "launch.templates.ray_up.RayUp": "launch.templates.RayUp",
    "launch.templates.slurm.Slurm": "launch.templates.Slurm",
    "models.block.Block": "models.Block",
    "models.ffn.ChannelMix": "models.ChannelMix",
    "models.ffn.SwiGLU": "models.SwiGLU",
    "models.lm.LM": "models.LM",
    "models.mixers.attention.Attention": "models.mixers.Attention",
    "models.mixers.deltanet.DeltaNet": "models.mixers.DeltaNet",
    "models.mixers.gated_deltanet.GatedDeltaNet": "models.mixers.GatedDeltaNet",
    "models.mixers.gated_deltaproduct.GatedDeltaProduct": "models.mixers.GatedDeltaProduct",
    "models.mixers.gateloop.GateLoop": "models.mixers.GateLoop",
    "models.mixers.gla.GatedLinearAttention": "models.mixers.GatedLinearAttention",
    "models.mixers.hgrn.HGRN": "models.mixers.HGRN",
    "models.mixers.hgrn2.HGRN2": "models.mixers.HGRN2",
    "models.mixers.kda.KimiDeltaAttention": "models.mixers.KimiDeltaAttention",
    "models.mixers.lact.LaCT": "models.mixers.LaCT",
    "models.mixers.lightnet.LightNet": "models.mixers.LightNet",
    "models.mixers.lightning.Lightning": "models.mixers.Lightning",
    "models.mixers.linear.LinearAttention": "models.mixers.LinearAttention",
    "models.mixers.longhorn.Longhorn": "models.mixers.Longhorn",
    "models.mixers.lru.LRU": "models.mixers.LRU",
    "models.mixers.mamba.Mamba": "models.mixers.Mamba",
    "models.mixers.mamba2.Mamba2": "models.mixers.Mamba2",
    "models.mixers.mingru.MinGRU": "models.mixers.MinGRU",
    "models.mixers.minlstm.MinLSTM": "models.mixers.MinLSTM",
    "models.mixers.mlstm.MLSTM": "models.mixers.MLSTM",
    "models.mixers.mom.MixtureOfMemories": "models.mixers.MixtureOfMemories",
    "models.mixers.retnet.RetNet": "models.mixers.RetNet",
    "models.mixers.rglru.RGLRU": "models.mixers.RGLRU",
    "models.mixers.rwkv6.RWKV6": "models.mixers.RWKV6",
    "models.mixers.rwkv7.RWKV7": "models.mixers.RWKV7",
    "models.mixers.slstm.SLSTM": "models.mixers.SLSTM",
    "models.mixers.titans.Titans": "models.mixers.Titans",
    "models.moe.MoE": "models.MoE",
    "models.rope.Interpolated": "models.positions.Interpolated",
    "models.rope.Llama3": "models.positions.Llama3",
    "models.rope.LongRoPE": "models.positions.LongRoPE",
    "models.rope.NTKAware": "models.positions.NTKAware",
    "models.rope.NoPE": "models.positions.NoPE",
    "models.rope.Randomized": "models.positions.Randomized",
    "models.rope.RoPE": "models.positions.RoPE",
    "models.rope.Truncated": "models.positions.Truncated",
    "models.rope.YaRN": "models.positions.YaRN",
    "parallel.schedule.static.Static": "parallel.schedule.Static",
    "train.adamw.AdamW": "train.optim.AdamW",
    "train.engines.fsdp.FSDP": "train.engines.FSDP",
    "train.muon.Muon": "train.optim.Muon",
    "train.schedule.Anneal": "train.schedules.Anneal",
    "train.schedule.Constant": "train.schedules.Constant",
    "train.schedule.Cosine": "train.schedules.Cosine",
    "train.schedule.Infinite": "train.schedules.Infinite",
    "train.schedule.Phases": "train.schedules.Phases",
    "train.schedule.Power": "train.schedules.Power",
    "train.schedule.WSD": "train.schedules.WSD",
    "train.tracking.options.Tracking": "train.tracking.Tracking",
}


def canonical(target: Any) -> Any:
    """Today's name of a class; any other value as it is."""
    return RENAMED.get(target, target) if isinstance(target, str) else target


def with_canonical_names(node: Any) -> Any:
    """A configuration, or a part of one, with today's name in every `_target_`."""
    if isinstance(node, dict):
        return {k: canonical(v) if k == "_target_" else with_canonical_names(v) for k, v in node.items()}
    return [with_canonical_names(child) for child in node] if isinstance(node, list) else node
