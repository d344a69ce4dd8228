"""Sequence mixers by registry key: one short file each. A mixer is `mixer(x, seq)`, [B, T, D] -> [B, T, D]."""

from torch import nn

from models.mixers.attention import Attention
from models.mixers.deltanet import DeltaNet
from models.mixers.dsa import DeepSeekSparseAttention
from models.mixers.gated_conv import GatedConv
from models.mixers.gated_deltanet import GatedDeltaNet
from models.mixers.gated_deltanet2 import GatedDeltaNet2
from models.mixers.gated_deltaproduct import GatedDeltaProduct
from models.mixers.gateloop import GateLoop
from models.mixers.gla import GatedLinearAttention
from models.mixers.hgrn import HGRN
from models.mixers.hgrn2 import HGRN2
from models.mixers.kda import KimiDeltaAttention
from models.mixers.lact import LaCT
from models.mixers.lightnet import LightNet
from models.mixers.lightning import Lightning
from models.mixers.linear import LinearAttention
from models.mixers.longhorn import Longhorn
from models.mixers.lru import LRU
from models.mixers.mamba import Mamba
from models.mixers.mamba2 import Mamba2
from models.mixers.mamba3 import Mamba3
from models.mixers.mingru import MinGRU
from models.mixers.minlstm import MinLSTM
from models.mixers.mla import MultiHeadLatentAttention
from models.mixers.mlstm import MLSTM
from models.mixers.mom import MixtureOfMemories
from models.mixers.retnet import RetNet
from models.mixers.rglru import RGLRU
from models.mixers.rwkv6 import RWKV6
from models.mixers.rwkv7 import RWKV7
from models.mixers.slstm import SLSTM
from models.mixers.titans import Titans

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "deltanet": DeltaNet,
    "dsa": DeepSeekSparseAttention,
    "gated_conv": GatedConv,
    "gated_deltanet": GatedDeltaNet,
    "gated_deltanet2": GatedDeltaNet2,
    "gated_deltaproduct": GatedDeltaProduct,
    "gateloop": GateLoop,
    "gla": GatedLinearAttention,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "kda": KimiDeltaAttention,
    "lact": LaCT,
    "lightnet": LightNet,
    "lightning": Lightning,
    "linear": LinearAttention,
    "longhorn": Longhorn,
    "lru": LRU,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "mingru": MinGRU,
    "minlstm": MinLSTM,
    "mla": MultiHeadLatentAttention,
    "mlstm": MLSTM,
    "mom": MixtureOfMemories,
    "retnet": RetNet,
    "rglru": RGLRU,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "slstm": SLSTM,
    "titans": Titans,
}
