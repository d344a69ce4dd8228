"""The peer of the hybrid in `tests.benchmarks.gpu`: the same shapes of flash-linear-attention's own layers, in a plain
training loop: FSDP2 around every layer, bf16 products, its fused loss, clipping and torch's fused AdamW.

Attention is flash-linear-attention's where flash-attn, which it needs, is installed; else torch's variable-length
attention, on which farspan's runs, behind its rotary positions. On a CPU, where its kernels do not run, `StandInLayer`
takes the place of each, so that the loop, its shapes and its figures run there; the rows say so.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from tests.benchmarks import plain_torch
from tests.parity import Sample

BASE = 500_000.0  # of rotary positions
CHUNKS = 8  # of the loss


class Shape(NamedTuple):
    """The sizes of the model. heads, kv_heads: of attention; delta_heads: of Gated DeltaNet. pattern: its layers."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    delta_heads: int
    hidden: int
    pattern: tuple[str, ...]


class Layers(NamedTuple):
    """How layers are made, with flash-linear-attention's arguments, and what the rows call them."""

    delta: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    name: str


class StandInLayer(nn.Module):
    """A product in place of a layer: hidden states [1, T, D] -> ([1, T, D],), as mixers return it."""

    def __init__(self, hidden_size: int, **shape: Any):
        super().__init__()
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor]:
        assert hidden_states.shape[1] == cu_seqlens[-1]
        return (self.o_proj(hidden_states),)


class StandInMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class VarlenAttention(nn.Module):
    """`fla.layers.Attention` without flash-attn: its projections and rotary positions, torch's kernel."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, rope_theta: float):
        super().__init__()
        from fla.modules import RotaryEmbedding

        self.head_dim = hidden_size // num_heads
        width = num_kv_heads * self.head_dim
        self.q_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden_size, width, bias=False) for _ in range(2))
        self.rotary = RotaryEmbedding(dim=self.head_dim, base=rope_theta)

    def forward(self, hidden_states: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        T = hidden_states.shape[1]
        projected = (
            p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = projected
        q, k = self.rotary(q, k, seqlen_offset=0, max_seqlen=T, cu_seqlens=cu_seqlens)
        bounds = cu_seqlens.to(torch.int32)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        out = varlen_attn(q[0], k[0], v[0], bounds, bounds, T, T, window_size=(-1, 0))
        return (self.o_proj(out.flatten(1).unsqueeze(0)),)


def stand_ins() -> Layers:
    """Layers for a device without flash-linear-attention's kernels."""

    def loss(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), targets)

    return Layers(StandInLayer, StandInLayer, StandInMLP, nn.RMSNorm, loss, "stand-ins")


def of_fla() -> Layers:
    """flash-linear-attention's. Raises ImportError where it is not installed."""
    from fla.layers import Attention, GatedDeltaNet
    from fla.modules import FusedLinearCrossEntropyLoss, GatedMLP, RMSNorm

    loss, name, attention = FusedLinearCrossEntropyLoss(num_chunks=CHUNKS), "flash-linear-attention's layers", Attention
    try:
        Attention(hidden_size=64, num_heads=1)
    except ImportError:
        attention, name = VarlenAttention, f"{name}, torch's attention"
    return Layers(GatedDeltaNet, attention, GatedMLP, RMSNorm, loss, name)


class PeerBlock(nn.Module):
    """x [1, T, D] -> [1, T, D]."""

    def __init__(self, kind: str, shape: Shape, layers: Layers):
        super().__init__()
        dim = shape.dim
        self.mixer_norm, self.ffn_norm = layers.norm(dim), layers.norm(dim)
        if kind == "delta":
            width = dim // shape.delta_heads
            self.mixer = layers.delta(hidden_size=dim, expand_v=1.0, head_dim=width, num_heads=shape.delta_heads)
        else:
            heads: dict[str, Any] = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads, "rope_theta": BASE}
            self.mixer = layers.attention(hidden_size=dim, **heads)
        self.ffn = layers.mlp(hidden_size=dim, intermediate_size=shape.hidden)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), cu_seqlens=cu_seqlens)[0]
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y


class PeerHybrid(nn.Module):
    """tokens, targets [1, T] int64, cu_seqlens [N + 1] -> the mean cross-entropy. again: layers run again backward."""

    def __init__(self, shape: Shape, layers: Layers, *, again: bool):
        super().__init__()
        kinds = [shape.pattern[i % len(shape.pattern)] for i in range(shape.layers)]
        self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(PeerBlock(kind, shape, layers) for kind in kinds)
        self.norm, self.loss, self.again = layers.norm(shape.dim), layers.loss, again

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, cu_seqlens, use_reentrant=False) if self.again else block(x, cu_seqlens)
        return self.loss(self.norm(x).flatten(0, 1), targets.flatten(), self.embedding.weight.to(x.dtype))


class PeerSteps:
    """Training steps of the peer, whose call takes packed sequences as `tests.benchmarks.gpu.Steps` does."""

    def __init__(self, shape: Shape, layers: Layers, device: str, *, again: bool):
        half = torch.float32 if device == "cpu" else torch.bfloat16
        with torch.device(device):
            self.model = PeerHybrid(shape, layers, again=again)
        mesh, policy = (
            init_device_mesh(device, (1,)),
            MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
        )
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.device, self.batch = device, Sample((2,))
        self.step = plain_torch.training_step(self.model, self._loss)

    def _loss(self) -> Tensor:
        bounds = [0, *accumulate(self.batch.documents)]
        tokens, targets = (torch.from_numpy(x)[None].to(self.device) for x in (self.batch.tokens, self.batch.targets))
        loss: Tensor = self.model(tokens, targets, torch.tensor(bounds, device=self.device))
        return loss

    def __call__(self, batch: list[Sample]) -> float:
        """One step. Returns the loss a target."""
        (self.batch,) = batch
        return self.step()
