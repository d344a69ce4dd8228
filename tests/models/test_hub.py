"""The tables of `models.hub` by themselves, and the files that tensors lie in. tests/train/test_hub.py holds them to
`transformers`."""

import json
import math
import os

import pytest
import torch

from models.hub import ARCHITECTURES, of_config, of_model, positions, tensors
from models.hub.architecture import fold, node, ratio
from models.hub.rows import ABOUT_ZERO, ParameterSource, PublishedRows, experts, joined, parts, published, whole
from models.mixers.attention import Attention
from models.positions import Interpolated, Llama3, NTKAware, RoPE, Truncated, YaRN


def test_rows_of_a_span_are_found_in_the_pieces_that_make_it_up():
    pieces = (PublishedRows("a", 4, 3), PublishedRows("b", 0, 2), PublishedRows("a", 0, 4))
    assert parts(pieces, 0, 9) == list(pieces)
    assert parts(pieces, 2, 6) == [PublishedRows("a", 6, 1), PublishedRows("b", 0, 2), PublishedRows("a", 0, 1)]
    assert parts(pieces, 4, 5) == [PublishedRows("b", 1, 1)]


def test_a_table_read_backwards_says_where_each_published_row_lies():
    entries = {
        "kv": ParameterSource(
            (PublishedRows("k", 0, 2), PublishedRows("v", 0, 2), PublishedRows("k", 2, 2), PublishedRows("v", 2, 2))
        ),
        "experts": joined(("w0", 6), ("w1", 6), form=experts(6)),
    }
    found = published(entries, {"kv": (8, 5), "experts": (2, 5, 6)})
    assert found["k"][0] == (4, 5) and [place[1:] for place in found["k"][1]] == [(0, 2), (4, 2)]
    assert found["w1"] == ((6, 5), (("experts", 6, 6),))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"a": whole("x", 3)}, "a: has 4 rows, its table 3"),
        (
            {"a": ParameterSource((PublishedRows("x", 0, 2), PublishedRows("x", 3, 2)))},
            "x: row 2 is named twice or never",
        ),
        (
            {"a": ParameterSource((PublishedRows("x", 0, 3), PublishedRows("x", 2, 1)))},
            "x: row 2 is named twice or never",
        ),
        ({}, "a: has no table"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(entries, why):
    with pytest.raises(ValueError, match=why):
        published(entries, {"a": (4, 2)})


def test_experts_lie_transposed():
    ours = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    form = experts(4)
    rows = form.there(ours)
    torch.testing.assert_close(rows[4:8], ours[1].T)
    torch.testing.assert_close(form.here(rows), ours)


def test_patterns_and_widths():
    assert fold(["a", "a", "b", "a", "a", "b"]) == ["a", "a", "b"] and fold(["a", "b", "b"]) == ["a", "b", "b"]
    for dim in (7, 49, 2048, 2880):
        for width in (1, 3, 29, 4097):
            assert int(dim * ratio(width, dim)) == width


RULES = {
    "default": (RoPE, {}),
    "linear": (Interpolated, {"factor": 3.0}),
    "yarn": (YaRN, {"factor": 4.0, "trained_length": 128, "beta_fast": 16.0, "attention_factor": 1.2}),
    "llama3": (Llama3, {"factor": 8.0, "trained_length": 64, "low": 2.0, "high": 5.0}),
}


@pytest.mark.parametrize("kind", RULES)
def test_positions_come_back(kind):
    rule, values = RULES[kind]
    section = node(rule, partial=False, base=5e5, fraction=0.5, **values)
    rope = positions.write("m", section, "them", partial=True)
    assert rope["rope_type"] == kind and rope["rope_theta"] == 5e5 and rope["partial_rotary_factor"] == 0.5
    config = {"rope_parameters": rope, "max_position_embeddings": 512}
    assert positions.read(config, 64, 0.25) == section
    with pytest.raises(ValueError, match="m.positions.fraction=0.5: must be 1: them rotates whole heads"):
        positions.write("m", section, "them", partial=False)
    with pytest.raises(
        ValueError, match="config.json: partial_rotary_factor=0.5: must be 1: this architecture rotates"
    ):
        positions.read(config, 64)


def test_positions_as_they_were_written_before_version_5():
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 256}
    found = positions.read(old | {"original_max_position_embeddings": 64}, 16)
    assert found["_target_"] == "models.positions.YaRN" and (found["base"], found["trained_length"]) == (1e6, 64)
    with pytest.raises(ValueError, match="rope_type=longrope: must be one of default, linear, yarn, llama3"):
        positions.read({"rope_scaling": {"rope_type": "longrope"}}, 16)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    assert positions.read({"rope_parameters": yarn}, 16)["truncate"] is False
    with pytest.raises(ValueError, match="config.json: original_max_position_embeddings=1: must be the tokens"):
        positions.read(old | {"original_max_position_embeddings": 1}, 16)
    scaled = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1}
    found = positions.read({"rope_parameters": scaled, "max_position_embeddings": 256}, 16)
    assert found["attention_factor"] == pytest.approx((0.07 * math.log(4) + 1) / (0.11 * math.log(4) + 1))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            f"config.json: architectures=GPT2LMHeadModel: must be one of the {len(ARCHITECTURES)} that `farspan import",
        ),
        ({"attention_bias": True}, "config.json: attention_bias=true: must be false"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act=gelu: must be silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "config.json: rope_type=dynamic: must be one of"),
    ],
)
def test_a_config_json_that_is_not_ours_is_refused(change, line):
    config = LLAMA | change
    with pytest.raises(ValueError) as refused:
        of_config(config).read(config)
    assert str(refused.value).startswith(line)


MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    **{"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    ("config", "change", "line"),
    [
        (LLAMA, {"hidden_size": "64"}, "config.json: hidden_size=64: must be a whole number of at least 1"),
        (LLAMA, {"hidden_size": 64.0}, "config.json: hidden_size=64.0: must be a whole number of at least 1"),
        (LLAMA, {"num_hidden_layers": [2]}, "config.json: num_hidden_layers=[2]: must be a whole number of at least 1"),
        (LLAMA, {"num_hidden_layers": True}, "config.json: num_hidden_layers=true: must be a whole number"),
        (
            LLAMA,
            {"num_hidden_layers": 10**5000},
            "config.json: num_hidden_layers=a number of more than 40 digits: must",
        ),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "config.json: rms_norm_eps=1e-5: must be a number above 0"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps=nan: must be a number above 0"),
        (LLAMA, {"rope_parameters": [1]}, "config.json: rope_parameters=[1]: must be a table, or null"),
        (LLAMA, {"rope_scaling": "yarn"}, "config.json: rope_scaling=yarn: must be a table, or null"),
        (LLAMA, {"rope_parameters": {"rope_type": 1}}, "config.json: rope_parameters.rope_type=1: must be a word"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            "config.json: rope_parameters.factor=2: must",
        ),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "config.json: rope_parameters.full_attention: must be no"),
        (LLAMA, {"rope_parameters": {"rope_theta": 0.5}}, "config.json: rope_theta=0.5: must be above 1"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor=0.5: must be 1: this architecture"),
        (
            LLAMA,
            {"max_position_embeddings": -1},
            "config.json: max_position_embeddings=-1: must be a whole number of at",
        ),
        (LLAMA, {"tie_word_embeddings": "yes"}, "config.json: tie_word_embeddings=yes: must be true or false"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "config.json: quantization_config: must be absent"),
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "config.json: architectures=LlamaForCausalLM: must be one of"),
        (
            LLAMA,
            {"architectures": [["x"]]},
            f"config.json: architectures=['x']: must be one of the {len(ARCHITECTURES)} that",
        ),
        (LLAMA, {"model_type": "mistral"}, "config.json: model_type=mistral: must be llama, that of LlamaForCausalLM"),
        (LLAMA, {"num_key_value_heads": 3}, "config.json: num_key_value_heads=3: must divide num_attention_heads=4"),
        (LLAMA, {"num_attention_heads": 5}, "config.json: num_attention_heads=5: must divide hidden_size=32"),
        (LLAMA, {"head_dim": 7}, "config.json: head_dim=7: must have pairs to rotate"),
        (MOE, {"num_experts_per_tok": 5}, "config.json: num_experts_per_tok=5: must be at most num_experts=4"),
        (
            MOE,
            {"num_experts_per_tok": 1, "norm_topk_prob": True},
            "config.json: norm_topk_prob=true: must be false with num_experts_per_tok=1",
        ),
        (
            MOE,
            {"mlp_only_layers": [0.5]},
            "config.json: mlp_only_layers=[0.5]: must be a list of whole numbers, or null",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused_in_the_words_of_the_file(config, change, line):
    with pytest.raises(ValueError) as refused:
        of_config(config | change).read(config | change)
    assert str(refused.value).startswith(line)


def test_values_that_change_no_logits_are_no_reason_to_refuse():
    same = {
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "hidden_act": "swish",
        "dtype": "bfloat16",
        "use_cache": False,
    }
    assert of_config(LLAMA).read(LLAMA | same) == of_config(LLAMA).read(LLAMA)


def test_what_is_all_dense_is_exported():
    """In, and out again; but not Qwen3-Next without attention, which transformers has no cache for."""
    next_ = MOE | {"architectures": ["Qwen3NextForCausalLM"], "shared_expert_intermediate_size": 8}
    next_ |= {"layer_types": ["linear_attention", "full_attention"]}
    for config, change in (
        (MOE, {"num_experts": 0}),
        (MOE, {"mlp_only_layers": [0, 1]}),
        (MOE, {"rms_norm_eps": 1e-5}),
        (next_, {"num_experts": 0}),
        (next_, {"layer_types": ["full_attention"] * 2, "num_experts": 0}),
    ):
        model = of_config(config).read(config | change)
        architecture, again = of_model(model)
        assert architecture is of_config(config) and architecture.read(again) == model
    with pytest.raises(ValueError, match=r"model.pattern=.gdn.: must have a layer of attention for Qwen3Next"):
        of_model(of_config(next_).read(next_ | {"layer_types": ["linear_attention"] * 2}))


def test_a_config_json_without_a_size_is_refused():
    config = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="config.json: hidden_size: missing"):
        of_config(config).read(config)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"window": 8, "sinks": 2}, "model.blocks.attn.mixer.sinks=2: must be 0, as in LlamaForCausalLM"),
        ({"gate": True}, "model.blocks.attn.mixer.gate=true: must be false, as in LlamaForCausalLM"),
        (
            {"positions": node(NTKAware, partial=False, factor=2.0)},
            "model.blocks.attn.mixer.positions=NTKAware: must be one of RoPE",
        ),
        (
            {"positions": node(Truncated, partial=False, high=1.0, low=0.1, middle=0.5)},
            "model.blocks.attn.mixer.positions=Truncated: must be one of RoPE, Interpolated, YaRN, Llama3 for Llama",
        ),
        ({"_target_": "models.mixers.KimiDeltaAttention"}, "model.pattern=[attn]: none of LlamaForCausalLM, "),
    ],
)
def test_a_model_that_nobody_has_is_refused_with_what_stands_in_the_way(change, line):
    model = of_config(LLAMA).read(LLAMA)
    block = model["blocks"]["attn"]
    model["blocks"] = {"attn": {**block, "mixer": {**block["mixer"], **change}}}
    with pytest.raises(ValueError) as refused:
        of_model(model)
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"window": 8}, "MistralForCausalLM"),
        ({"positions": {"_target_": "models.positions.NoPE"}}, "SmolLM3ForCausalLM"),
        ({"positions": node(RoPE, partial=False, fraction=0.5)}, "Phi3ForCausalLM"),
        ({}, "LlamaForCausalLM"),
    ],
)
def test_a_model_is_what_the_first_that_can_say_it_says(change, name):
    model = of_config(LLAMA).read(LLAMA)
    block = model["blocks"]["attn"]
    model["blocks"] = {"attn": {**block, "mixer": {**block["mixer"], **change}}}
    assert of_model(model)[0].name == name
    assert of_model(model, "Ernie4_5ForCausalLM")[0].name == (name if change else "Ernie4_5ForCausalLM")


def test_layers_that_differ_where_an_architecture_has_one_value_are_refused():
    model = of_config(LLAMA).read(LLAMA)
    other = {**model["blocks"]["attn"], "mixer": node(Attention, heads=8, head_dim=4)}
    two = {**model, "pattern": ["attn", "other"], "blocks": {**model["blocks"], "other": other}}
    with pytest.raises(ValueError, match="model.blocks.other.mixer=.*: must be .* as model.blocks.attn.mixer: Llama"):
        of_model(two)


def _write(folder, names=("a", "b")):
    values = {name: torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    told = {name: ((5, 3), torch.float32) for name in names}
    tensors.write(folder / tensors.SINGLE, told, iter(values.values()))
    return values


def test_rows_are_read_from_where_they_were_written(tmp_path):
    values = _write(tmp_path)
    stored = tensors.folder(tmp_path)
    assert torch.equal(tensors.rows(stored["b"], 1, 3), values["b"][1:4])


def test_another_reader_and_another_writer_agree(tmp_path):
    theirs = pytest.importorskip("safetensors.torch")
    values = _write(tmp_path)
    found = theirs.load_file(tmp_path / tensors.SINGLE)
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)
    kinds = {str(kind): torch.randn(4, 2).to(kind) for kind in tensors.NAMES}
    theirs.save_file(kinds, tmp_path / tensors.SINGLE)
    stored = tensors.folder(tmp_path)
    assert all(torch.equal(tensors.rows(stored[name], 0, 4), value) for name, value in kinds.items())


def _cut(folder):
    _write(folder)
    whole = (folder / tensors.SINGLE).read_bytes()
    (folder / tensors.SINGLE).write_bytes(whole[:-7])


def _header(entry):
    def damage(folder):
        text = json.dumps({"a": entry}).encode()
        (folder / tensors.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(60))

    return damage


def _entries(**entries):
    """A file of 60 bytes with a header of these entries of F32."""

    def damage(folder):
        told = {name: {"dtype": "F32", "shape": s, "data_offsets": at} for name, (s, at) in entries.items()}
        text = json.dumps(told).encode()
        (folder / tensors.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(60))

    return damage


def _raw(text):
    return lambda f: (f / tensors.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)


def _index(weight_map):
    def damage(folder):
        _write(folder)
        (folder / tensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_cut, r"model.safetensors: is cut short: it has \d+ of \d+ bytes"),
        (lambda f: (f / tensors.SINGLE).write_bytes(b"abc"), "is cut short, or no safetensors file"),
        (lambda f: (f / tensors.SINGLE).write_bytes((9).to_bytes(8, "little") + b"{" * 9), "its header is not JSON"),
        (_header({"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 40]}), "a: its shape and its bytes do not fit"),
        (
            _header({"dtype": "F32", "shape": [-5, -3], "data_offsets": [0, 60]}),
            "a: its shape and its bytes do not fit",
        ),
        (_header({"dtype": "I8", "shape": [60], "data_offsets": [0, 60]}), "a: dtype I8 must be one of F64, F32"),
        (_header({"dtype": "F32"}), "a: its entry in the header is not whole"),
        (_header([1, 2]), "a: its entry in the header is not whole"),
        (_header({"dtype": ["F32"], "shape": [15], "data_offsets": [0, 60]}), "a: dtype .* must be one of F64, F32"),
        (_header({"dtype": "F32", "shape": [True, 15], "data_offsets": [0, 60]}), "a: its shape and its bytes do not"),
        (_header({"dtype": "F32", "shape": [0, 1 << 70], "data_offsets": [0, 0]}), "a: its shape and its bytes do not"),
        (_entries(a=([5], [0, 20]), b=([5], [0, 20])), "model.safetensors: b: lies over a"),
        (_entries(a=([5], [0, 20]), b=([5], [16, 36])), "model.safetensors: b: lies over a"),
        (_entries(a=([5], [0, 20]), b=([5], [40, 60])), "model.safetensors: b: leaves a gap behind a"),
        (_entries(a=([5], [4, 24])), "model.safetensors: a: leaves a gap behind the header"),
        (_raw(b"[1, 2]"), "its header is not JSON"),
        (_raw(b"[" * 100_000), "its header is not JSON"),
        (_raw(b'{"a": 1' + b"0" * 5000 + b"}"), "its header is not JSON"),
        (lambda f: os.mkfifo(f / tensors.SINGLE), "model.safetensors: is no regular file"),
        (lambda f: os.mkfifo(f / tensors.INDEX), "model.safetensors.index.json: is no regular file"),
        (lambda f: (f / tensors.SINGLE).symlink_to("/dev/zero"), "model.safetensors: is no regular file"),
        (_index(["a"]), "model.safetensors.index.json: cannot be read"),
        (_index({"a": 1}), "model.safetensors.index.json: cannot be read"),
        (_index({"a": "x\0.safetensors"}), "must be a safetensors file of the folder"),
        (_index({"a": "../other.safetensors"}), "must be a safetensors file of the folder"),
        (_index({"a": "pytorch_model.bin"}), "pytorch_model.bin: must be a safetensors file of the folder"),
        (_index({"z": tensors.SINGLE}), "model.safetensors: z: missing"),
        (_index({"a": "other.safetensors"}), "other.safetensors: missing"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80"), "pytorch_model.bin: is pickled, and may run code"),
        (lambda f: None, "model.safetensors: missing"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(damage, line, tmp_path):
    damage(tmp_path)
    with pytest.raises(ValueError, match=line):
        tensors.folder(tmp_path)


def test_shards_hold_what_fits():
    assert tensors.shards({"a": 4, "b": 4, "c": 9, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]


def test_a_norm_about_zero_stays_in_fp64() -> None:
    found = ABOUT_ZERO.here(torch.tensor([1e-12], dtype=torch.float64))
    assert found.dtype == torch.float64 and found.item() - 1 == pytest.approx(1e-12, rel=1e-3)
    assert ABOUT_ZERO.here(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32
