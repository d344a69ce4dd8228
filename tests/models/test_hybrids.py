"""Published hybrids as YAML: their layers, their sizes, and that each learns, token after token as at once."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from launch.config import files
from launch.config.compose import composed
from launch.config.validate import build
from launch.errors import UserError
from models.accounting import idle
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Memory, Whole

LAYOUTS = {  # the mixer of every layer, and the layers that have experts
    "griffin_tiny": (["rglru", "rglru", "attention"] * 2, []),
    "samba_tiny": (["mamba2", "attention"] * 3, []),
    "jamba_tiny": ([*["mamba2"] * 4, "attention", *["mamba2"] * 3], [1, 3, 5, 7]),
    "qwen3_next_tiny": ([*["gated_deltanet"] * 3, "attention"], [0, 1, 2, 3]),
    "rwkv7_tiny": (["rwkv7"] * 6, []),
    "kimi_linear_tiny": ([*["kda"] * 3, "attention"], [1, 2, 3]),
}
SMALL = ["model.dim=32", "model.vocabulary=40"]
SHAPES = {  # dim, layers, width of an expert; billions of parameters activated and in all, as named
    "linear_moe_a300m_2b": (1024, 12, 896, 0.3, 2),
    "linear_moe_a1b_7b": (2048, 16, 1024, 1, 7),
}
OTHER = {  # mixers of more or less than 4 dim² weights: the least share of the published size that a token may meet
    name: 0.9
    for name in (
    "gated_deltanet", "gated_deltanet2", "gated_deltaproduct", "gateloop", "lact", "lightning", "longhorn", "lru",
    "mamba", "mamba2", "mamba3", "mingru", "retnet", "rglru", "rwkv6", "slstm", "titans",
    )
}  # fmt: skip


def model(name: str, *overrides: str) -> LM:
    """On the meta device."""
    return build(composed([f"model={name}", *overrides]))


def small(name: str) -> LM:
    built: LM = composed([f"model={name}", *SMALL]).model.build()
    built.compute = torch.float64
    return initialise(built.double(), 0)  # type: ignore[return-value]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_are_those_of_the_published_model(name):
    layers = list(model(name).layers.values())
    mixers, experts = LAYOUTS[name]
    assert [type(layer.mixer) for layer in layers] == [MIXERS[mixer] for mixer in mixers]
    assert [i for i, layer in enumerate(layers) if isinstance(layer.ffn, MoE)] == experts


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_hybrid_reads_a_text_in_spans_as_at_once_and_learns_it(name):
    hybrid = small(name)
    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (1, 48))
    at_once = hybrid(tokens, Whole.of(torch.arange(48)[None])).logits
    memory, spans, parts = Memory(), ((0, 20), (20, 21), (21, 48)), []
    with torch.no_grad():
        for begin, end in spans:
            seq = Whole.of(torch.arange(begin, end)[None], memory=memory)
            parts.append(hybrid(tokens[:, begin:end], seq).logits)
            memory.advance()
    torch.testing.assert_close(torch.cat(parts, 1), at_once, rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.AdamW(hybrid.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        logits = hybrid(tokens, Whole.of(torch.arange(48)[None])).logits
        loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in hybrid.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def placed(name: str, mixer: str) -> LM:
    """A Linear-MoE model with another mixer; some have no heads, attention wants those of its keys."""
    keys, place = files.option("mixer", mixer), "model.blocks.moe.mixer"
    more = [f"{place}.kv_heads={SHAPES[name][0] // 128}"] if "kv_heads" in keys else []
    more += [] if "heads" in keys else [f"~{place}.heads"]
    return model(name, f"mixer@{place}={mixer}", *more)


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        *(("linear_moe_a300m_2b", m) for m in ("attention", "gla")),
        *(
            pytest.param("linear_moe_a1b_7b", m, marks=[pytest.mark.slow] * (m not in ("attention", "mamba2", "mom")))
            for m in sorted(MIXERS)
        ),
    ],
)
def test_linear_moe_has_the_published_size_with_every_mixer(name, mixer):
    dim, layers, width, activated, total = SHAPES[name]
    moe = placed(name, mixer)
    parameters = sum(p.numel() for p in moe.parameters()) - 2 * 151_936 * dim
    active = parameters - idle(moe)
    in_all, on_a_token = (layers * (4 * dim**2 + dim * 64 + experts * 3 * dim * width) for experts in (64, 8))
    assert [float(f"{count / 1e9:.1g}") for count in (in_all, on_a_token)] == [total, activated]  # the name rounds
    if mixer == "mom":  # five mixers in place of one, three of which a token goes to
        one = sum(p.numel() for p in moe.layers["0"].mixer.shared.parameters())
        in_all += layers * (5 * one - 4 * dim**2)
        on_a_token += layers * (3 * one - 4 * dim**2)
    assert parameters == pytest.approx(in_all, rel=0.05)
    assert active == pytest.approx(on_a_token, rel=0.05) or mixer in OTHER and OTHER[mixer] < active / on_a_token < 1.3


def tiny(**more) -> LM:
    block = partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=partial(MoE, num_experts=4, top_k=2, hidden=8))
    return LM(vocabulary=24, dim=16, layers=3, pattern=["a"], blocks={"a": block}, **more)


def test_a_tied_head_multiplies_by_the_embedding_scaled():
    lm = initialise(tiny(tied=True), 0)
    assert lm.head is None and sum(p.numel() for p in tiny().parameters()) - sum(
        p.numel() for p in lm.parameters()
    ) == (24 * 16)
    tokens, seq = torch.randint(0, 24, (1, 9)), Whole.of(torch.arange(9)[None])
    output = lm(tokens, seq)
    x = F.embedding(tokens, lm.embedding)
    for layer in lm.layers.values():
        x, *_ = layer(x, seq)
    torch.testing.assert_close(output.logits, torch.einsum("btd,vd->btv", lm.norm(x), lm.embedding) / math.sqrt(16))
    assert 0.5 < output.logits.std() < 2
    chunked = lm(tokens, seq, tokens.roll(-1, 1)).cross_entropy
    whole = F.cross_entropy(output.logits[0], tokens[0].roll(-1), reduction="sum")
    torch.testing.assert_close(chunked, whole)
    (gradient,) = torch.autograd.grad(whole, lm.embedding)
    unseen = [t for t in range(24) if t not in tokens]
    assert gradient[unseen].abs().sum() > 0  # through the head


def test_the_first_layers_are_dense():
    lm = tiny(first_k_dense=2, dense=partial(SwiGLU, hidden=20))
    assert [type(layer.ffn) for layer in lm.layers.values()] == [SwiGLU, SwiGLU, MoE]
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"^first_k_dense={k}: must lie between 0 and layers=3$"):
            tiny(first_k_dense=k, dense=partial(SwiGLU, hidden=20))
    with pytest.raises(ValueError, match="^first_k_dense=1: must be 0 without dense"):
        tiny(first_k_dense=1)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.first_k_dense=9", "first_k_dense=9: must lie between 0 and layers=4"),
        ("model.dense=null", "first_k_dense=1: must be 0 without dense"),
        ("model.tied=3", "model.tied=3: expected true or false"),
        ("model.pattern=[kda,foo]", "'foo' is not one of the blocks kda, attn"),
    ],
)
def test_a_wrong_hybrid_is_refused_in_one_line(override, line):
    with pytest.raises((UserError, ValueError)) as refused:
        model("kimi_linear_tiny", override)
    assert line in str(refused.value) and "\n" not in str(refused.value)
