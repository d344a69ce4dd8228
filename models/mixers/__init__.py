"""Sequence mixers by registry key: one short file each. A mixer is `mixer(x, seq)`, [B, T, D] -> [B, T, D]."""

from torch import nn

from models.mixers.attention import Attention
from models.mixers.gated_deltanet import GatedDeltaNet
from models.mixers.gla import GatedLinearAttention

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "gated_deltanet": GatedDeltaNet,
    "gla": GatedLinearAttention,
}
