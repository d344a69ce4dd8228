"""The peers that one writes in an afternoon with torch alone: a Llama and its training step, and GLA's scan by chunks.

torchrun --nproc-per-node 2 -m tests.benchmarks.plain_torch     one step of that Llama under FSDP2, for its start
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 10_000.0


class PlainBlock(nn.Module):
    """x [B, T, D] -> [B, T, D]; cos, sin [T, K/2]."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int):
        super().__init__()
        self.heads, self.kv_heads, width = heads, kv_heads, dim // heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * width, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        heads = self.qkv(self.attention_norm(x)).view(B, T, self.heads + 2 * self.kv_heads, -1).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        shared = {"is_causal": True, "enable_gqa": True}
        y = F.scaled_dot_product_attention(_turned(q, cos, sin), _turned(k, cos, sin), v, **shared)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainLlama(nn.Module):
    """tokens, targets [B, T] int64 -> the mean cross-entropy."""

    def __init__(self, vocabulary: int, *, dim: int, layers: int, heads: int, kv_heads: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.half = dim // heads // 2

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        speeds = BASE ** (-torch.arange(self.half) / self.half)
        angles = torch.arange(tokens.shape[1])[:, None] * speeds
        x, cos, sin = self.embedding(tokens), angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def training_step(model: nn.Module, loss: Callable[[], Tensor], clip: float = 1.0) -> Callable[[], float]:
    """A step of clipped, fused AdamW on what `loss` returns, as a call that returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def gla_by_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int = 64) -> Tensor:
    """Gated linear attention (2312.06635, section 4) of one document, chunk after chunk: q, k, g [B, T, H, K],
    v [B, T, H, V] -> [B, T, H, V]. Inverse decays overflow where a chunk forgets more than fp32 holds."""
    q, k, v, g = (x.transpose(1, 2).unflatten(2, (-1, chunk)) for x in (q, k, v, g))
    total = g.cumsum(-2)
    into, last = q * total.exp(), total[..., -1:, :]
    inside = (into @ (k * (-total).exp()).mT).tril() @ v
    leaving = (k * (last - total).exp()).mT @ v
    kept = last.exp().mT
    state, reads = torch.zeros_like(leaving[:, :, 0]), []
    for n in range(q.shape[2]):
        reads.append(into[:, :, n] @ state)
        state = kept[:, :, n] * state + leaving[:, :, n]
    return (inside + torch.stack(reads, 2)).flatten(2, 3).transpose(1, 2)


def main() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = PlainLlama(512, dim=128, layers=4, heads=4, kv_heads=2, hidden=320)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    tokens = torch.randint(512, (1, 257))
    training_step(model, lambda: model(tokens[:, :-1], tokens[:, 1:]))()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
