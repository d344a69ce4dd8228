"""Exports and imports held to their reader: `transformers` itself, over random models.

What a table writes is no use unless the class that is named understands it: a table held to itself agrees with itself.
`pytest -m slow tests/train/test_reader.py` tries a dozen, then two hundred, each way.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from models.axes import initialise
from models.block import Block
from models.ffn import ChannelMix, SwiGLU
from models.hub import of_model
from models.hub.architecture import node
from models.lm import LM
from models.mixers.attention import Attention
from models.mixers.gated_deltanet import GatedDeltaNet
from models.mixers.gla import GatedLinearAttention
from models.mixers.mamba2 import Mamba2
from models.moe import MoE
from models.positions import Interpolated, Llama3, NoPE, NTKAware, RoPE, YaRN
from models.sequence import Whole
from tests.train.test_hub import NO_TOKENS, close, loaded, saved
from train.checkpoints.hf_convert import Saved, give, take
from train.checkpoints.hf_reader import Published
from train.instantiate import construct

transformers = pytest.importorskip("transformers", minversion="5")

T, VOCABULARY = 33, 40
TOKENS = torch.randint(0, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(0))
SEQ = Whole.of(torch.arange(T).expand(2, T))
FEW, MANY = 12, 200


def tries(number):
    """The same models each time; one that fails is shown as it is: to shrink it takes minutes."""
    slow = list(HealthCheck)
    each = {"derandomize": True, "deadline": None, "database": None, "phases": [Phase.generate]}
    return settings(max_examples=number, suppress_health_check=slow, **each)


def often(draw, usual, *others):
    """Mostly the first: a model with many strange things at once tells nothing but the first of them."""
    return draw(st.sampled_from([usual] * 14 + list(others)))


@st.composite
def rotations(draw):
    base = draw(st.sampled_from([1e4, 5e5, 300.0]))
    common = {"partial": False, "base": base, "fraction": often(draw, 1.0, 0.5, 0.25)}
    kind = draw(st.sampled_from(["plain", "plain", "linear", "yarn", "llama3", "ntk", "none"]))
    if kind == "linear":
        return node(Interpolated, factor=draw(st.sampled_from([1.0, 2.5, 8.0])), **common)
    if kind == "yarn":
        trained, sharp = draw(st.sampled_from([8, 64])), often(draw, None, 1.3)
        return node(YaRN, factor=4.0, trained_length=trained, attention_factor=sharp, **common)
    if kind == "llama3":
        return node(Llama3, trained_length=draw(st.sampled_from([8, 64])), **common)
    if kind == "ntk":
        return often(draw, node(RoPE, **common), node(NTKAware, factor=2.0, **common))
    if kind == "none":
        return often(draw, node(RoPE, **common), node(NoPE, partial=False))
    return node(RoPE, **common)


@st.composite
def sections(draw):
    """Any `model` section of ours, near those that are published."""
    family = draw(st.sampled_from(["llama", "moe", "next", "mamba2"]))
    eps = draw(st.sampled_from([1e-5, 1e-6, 1e-3]))
    other_eps = lambda: often(draw, eps, 3e-4)  # noqa: E731
    dim = 24
    gate = family == "next" if draw(st.integers(0, 7)) else draw(st.booleans())
    norm = family != "llama" if draw(st.integers(0, 7)) else draw(st.booleans())
    heads = draw(st.sampled_from([1, 2, 4]))
    attention = node(
        Attention,
        heads=often(draw, heads, 3 * heads),
        kv_heads=often(draw, None, heads),
        head_dim=draw(st.sampled_from([None, 8, 16])),
        window=often(draw, None, 7) if family == "moe" else None,
        sinks=0,
        qk_norm=norm,
        gate=gate,
        positions=draw(rotations()),
        norm_eps=other_eps(),
    )
    delta = node(
        GatedDeltaNet,
        heads=2,
        value_heads=draw(st.sampled_from([None, 2, 4])),
        expand_k=draw(st.sampled_from([1.0, 0.5, 1.5])),
        expand_v=draw(st.sampled_from([1.0, 2.0])),
        conv=often(draw, 4, 2, 1, None),
        negative_eigenvalues=often(draw, False, True),
        norm_eps=other_eps(),
    )
    mamba = node(
        Mamba2,
        heads=draw(st.sampled_from([2, 4])),
        expand=draw(st.sampled_from([1.0, 2.0, 1.5])),
        state=draw(st.sampled_from([3, 8])),
        groups=draw(st.sampled_from([1, 2])),
        conv=draw(st.sampled_from([4, 2])),
        conv_bias=often(draw, True, False),
        norm_eps=other_eps(),
    )
    shared = {"shared_hidden": 12, "shared_gate": True} if family == "next" else {}
    experts = node(
        MoE,
        num_experts=4,
        top_k=draw(st.sampled_from([1, 2, 4])),
        hidden=20,
        renormalise=draw(st.booleans()),
        scale=often(draw, 1.0, 1.0, 2.0),
        router=often(draw, "softmax", "softmax", "sigmoid"),
        **(shared if draw(st.integers(0, 7)) else {}),
    )
    if experts["top_k"] == 1:
        experts["renormalise"] = False
    dense = node(SwiGLU, hidden=draw(st.sampled_from([24, 32])))
    ffns = {"llama": [dense], "moe": [experts, dense], "next": [experts, dense], "mamba2": [None]}[family]
    mixers = {"llama": [attention], "moe": [attention], "next": [delta, attention], "mamba2": [mamba]}[family]
    stray = draw(st.integers(0, 11))
    if stray == 0:
        mixers = [*mixers, node(GatedLinearAttention, heads=2)]
    if stray == 1:
        ffns = [node(ChannelMix, hidden=16)]
    if stray == 2:
        ffns = [None, dense]
    kinds = {}
    for i in range(draw(st.integers(1, 3))):
        mixer, ffn = draw(st.sampled_from(mixers)), draw(st.sampled_from(ffns))
        kinds[f"kind{i}"] = node(Block, mixer=mixer, ffn=ffn, norm_eps=other_eps())
    tied = draw(st.booleans())
    first = draw(st.sampled_from([0, 0, 0, 1])) if family in ("moe", "next") else 0
    return node(
        LM,
        partial=False,
        vocabulary=VOCABULARY,
        dim=dim,
        layers=draw(st.integers(1, 4)),
        pattern=list(kinds),
        blocks=kinds,
        first_k_dense=first,
        dense=node(SwiGLU, hidden=dense["hidden"]) if first else None,
        tied=tied,
        tied_scale=draw(st.sampled_from([None, 1.0])) if tied else None,
        norm_eps=eps,
    )


def read_by_transformers(folder):
    found, problems = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"] and not problems["mismatched_keys"]
    return found.eval()


@torch.no_grad()
def exported(section, path):
    """Whether a section is exported, and read with the same logits; and back again."""
    try:
        model = initialise(construct(copy.deepcopy(section)), 0)
    except ValueError:  # no model at all
        reject()
    try:
        of_model(section)
    except ValueError as error:
        assert str(error).startswith("model."), error  # by a key of the user's own
        return False
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    give(saved(model, section, path / "ours"), path / "out", {}, config=NO_TOKENS)
    want = model(TOKENS, SEQ).logits
    close(read_by_transformers(path / "out")(TOKENS).logits, want)
    back = Published(path / "out")
    assert back.unpublishable is None
    close(loaded(back.model, path / "out")(TOKENS, SEQ).logits, want)
    return True


def counted(tmp_path_factory, number, drawn, verdict):
    """The verdicts on so many draws, each in a folder of its own."""
    seen = []

    @tries(number)
    @given(drawn())
    def attempt(case):
        seen.append(verdict(case, tmp_path_factory.mktemp("case")))

    attempt()
    print({str(kind): seen.count(kind) for kind in (True, False, None)})
    return seen


@pytest.mark.slow
def test_exports_are_read_as_they_were_meant_or_refused_by_key(tmp_path_factory):
    seen = counted(tmp_path_factory, FEW, sections, exported)
    assert seen.count(True) >= FEW // 4 and seen.count(False) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_exports(tmp_path_factory):
    seen = counted(tmp_path_factory, MANY, sections, exported)
    assert seen.count(True) >= MANY // 4 and seen.count(False) >= MANY // 10


@st.composite
def configs(draw):
    """A class of transformers, and values of its configuration that it takes."""
    kind = draw(st.sampled_from(["Llama", "Qwen3Moe", "Qwen3Next", "Mamba2"]))
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": draw(st.integers(1, 4)), "hidden_size": 24, **NO_TOKENS}
    sizes |= {"tie_word_embeddings": often(draw, False, True), "initializer_range": 0.1}
    if kind == "Mamba2":
        heads, expand = draw(st.sampled_from([(2, 1), (4, 2), (6, 2)]))
        more = {"expand": expand, "num_heads": heads, "head_dim": 24 * expand // heads, "chunk_size": 16}
        more |= {"state_size": draw(st.sampled_from([4, 7])), "n_groups": draw(st.sampled_from([1, 2]))}
        more |= {"use_conv_bias": draw(st.booleans()), "conv_kernel": draw(st.sampled_from([2, 4]))}
        more |= {"layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])), "use_bias": often(draw, False, True)}
        return kind, sizes | more
    heads = draw(st.sampled_from([2, 4, 6]))
    more = {"num_attention_heads": heads, "num_key_value_heads": draw(st.sampled_from([1, 2])), "intermediate_size": 28}
    more |= {"rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])), "head_dim": draw(st.sampled_from([8, 16]))}
    more |= {"max_position_embeddings": 128, "attention_bias": often(draw, False, False, True)}
    more |= {"attention_dropout": often(draw, 0.0, 0.1), "hidden_act": often(draw, "silu", "silu", "gelu")}
    rope = draw(st.sampled_from(["default", "default", "linear", "yarn", "llama3", "dynamic"]))
    rule = {"rope_type": rope, "rope_theta": draw(st.sampled_from([1e4, 5e5]))}
    rule |= {} if rope == "default" else {"factor": 4.0}
    rule |= {"original_max_position_embeddings": 16} if rope in ("yarn", "llama3") else {}
    rule |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    rule |= often(draw, {}, {"mscale": 0.7, "mscale_all_dim": 1.1}, {"truncate": False}) if rope == "yarn" else {}
    more |= {"rope_parameters": rule}
    if kind == "Llama":
        return kind, sizes | more | {"mlp_bias": often(draw, False, False, True), "pretraining_tp": often(draw, 1, 2)}
    more |= {
        "num_experts": often(draw, 4, 0),
        "num_experts_per_tok": draw(st.sampled_from([1, 2])),
        "moe_intermediate_size": 20,
    }
    more |= {"norm_topk_prob": draw(st.booleans()), "decoder_sparse_step": draw(st.sampled_from([1, 2, 9]))}
    more |= {"mlp_only_layers": draw(st.sampled_from([[], [0], [0, 1, 2, 3]]))}
    if kind == "Qwen3Moe":
        return kind, sizes | more | {"use_sliding_window": draw(st.booleans()), "sliding_window": 7}
    types = ["linear_attention", "full_attention"]
    layers = [draw(st.sampled_from(types)) for _ in range(sizes["num_hidden_layers"])]
    rule |= {"partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0]))}
    more |= {"layer_types": layers, "shared_expert_intermediate_size": 12, "linear_num_key_heads": 2}
    more |= {
        "linear_num_value_heads": draw(st.sampled_from([2, 4])),
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
    }
    return kind, sizes | more


@torch.no_grad()
def imported(drawn, path):
    """Whether a folder of transformers' own is imported, with its logits, and exported again; None where the import
    says that it cannot be."""
    kind, values = drawn
    config = getattr(transformers, f"{kind}Config")(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(path / "in")
    want = model(TOKENS, use_cache=False).logits
    try:
        found = Published(path / "in")
    except ValueError as error:
        key = str(error).removeprefix("config.json: ").partition("=")[0]
        assert str(error).startswith("config.json: ") and (key in values or key in values["rope_parameters"]), error
        return False
    step = take(found, path / "run", {}, lambda name: None)
    close(loaded(found.model, step)(TOKENS, SEQ).logits, want)
    if found.unpublishable is not None:  # which the import says
        assert set(values["layer_types"]) == {"linear_attention"}, found.unpublishable
        return None
    give(Saved(step, {"model": found.model, "data": {"max_length": 16}}), path / "back", {}, config=NO_TOKENS)
    close(read_by_transformers(path / "back")(TOKENS).logits, want)
    return True


@pytest.mark.slow
def test_folders_are_imported_and_exported_again_or_refused_by_a_key_that_they_have(tmp_path_factory):
    seen = counted(tmp_path_factory, FEW, configs, imported)
    assert seen.count(True) >= FEW // 4 and seen.count(False) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_folders(tmp_path_factory):
    seen = counted(tmp_path_factory, MANY, configs, imported)
    assert seen.count(True) >= MANY // 4 and seen.count(False) >= MANY // 10
