"""Sequence mixers by registry key: one short file each. A mixer is `mixer(x, seq)`, [B, T, D] -> [B, T, D]."""

from torch import nn

from models.mixers.attention import Attention
from models.mixers.deltanet import DeltaNet
from models.mixers.gated_deltanet import GatedDeltaNet
from models.mixers.gla import GatedLinearAttention
from models.mixers.hgrn2 import HGRN2
from models.mixers.kda import KimiDeltaAttention
from models.mixers.linear import LinearAttention
from models.mixers.mamba2 import Mamba2
from models.mixers.retnet import RetNet

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "gla": GatedLinearAttention,
    "hgrn2": HGRN2,
    "kda": KimiDeltaAttention,
    "linear": LinearAttention,
    "mamba2": Mamba2,
    "retnet": RetNet,
}
