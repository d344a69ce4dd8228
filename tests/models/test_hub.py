"""The tables of `models.hub` by themselves, and the files that tensors lie in. tests/train/test_hub.py holds them to
`transformers`."""

import json

import pytest
import torch

from models.hub import of_config, of_model, positions, tensors
from models.hub.architecture import fold, node, ratio
from models.hub.rows import ABOUT_ZERO, Entry, Rows, experts, joined, parts, published, whole
from models.mixers.attention import Attention
from models.rope import Interpolated, Llama3, RoPE, Truncated, YaRN


def test_rows_of_a_span_are_found_in_the_pieces_that_make_it_up():
    pieces = (Rows("a", 4, 3), Rows("b", 0, 2), Rows("a", 0, 4))
    assert parts(pieces, 0, 9) == list(pieces)
    assert parts(pieces, 2, 6) == [Rows("a", 6, 1), Rows("b", 0, 2), Rows("a", 0, 1)]
    assert parts(pieces, 4, 5) == [Rows("b", 1, 1)]


def test_a_table_read_backwards_says_where_each_published_row_lies():
    entries = {
        "kv": Entry((Rows("k", 0, 2), Rows("v", 0, 2), Rows("k", 2, 2), Rows("v", 2, 2))),
        "experts": joined(("w0", 6), ("w1", 6), form=experts(6)),
    }
    found = published(entries, {"kv": (8, 5), "experts": (2, 5, 6)})
    assert found["k"][0] == (4, 5) and [place[1:] for place in found["k"][1]] == [(0, 2), (4, 2)]
    assert found["w1"] == ((6, 5), (("experts", 6, 6),))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"a": whole("x", 3)}, "a: has 4 rows, its table 3"),
        ({"a": Entry((Rows("x", 0, 2), Rows("x", 3, 2)))}, "x: row 2 is named twice or never"),
        ({"a": Entry((Rows("x", 0, 3), Rows("x", 2, 1)))}, "x: row 2 is named twice or never"),
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
    rope = positions.write("m", section, "them")
    assert rope["rope_type"] == kind and rope["rope_theta"] == 5e5 and rope["partial_rotary_factor"] == 0.5
    assert positions.read({"rope_parameters": rope, "max_position_embeddings": 512}) == section


def test_positions_as_they_were_written_before_version_5():
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 256}
    found = positions.read(old | {"original_max_position_embeddings": 64})
    assert found["_target_"] == "models.rope.YaRN" and (found["base"], found["trained_length"]) == (1e6, 64)
    with pytest.raises(ValueError, match="rope_type=longrope: must be one of default, linear, yarn, llama3"):
        positions.read({"rope_scaling": {"rope_type": "longrope"}})
    with pytest.raises(ValueError, match="config.json: truncate=false: must be true"):
        positions.read({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}})


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "config.json: architectures=GemmaForCausalLM: must be one of LlamaForCausalLM, Qwen3MoeForCausalLM, "
            "Qwen3NextForCausalLM, Mamba2ForCausalLM",
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


def test_a_config_json_without_a_size_is_refused():
    config = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="config.json: hidden_size: missing"):
        of_config(config).read(config)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"window": 8}, "model.blocks.attn.mixer.window=8: must be null, as in LlamaForCausalLM"),
        ({"qk_norm": True}, "model.blocks.attn.mixer.qk_norm=true: must be false, as in LlamaForCausalLM"),
        (
            {"positions": {"_target_": "models.rope.NoPE"}},
            "model.blocks.attn.mixer.positions=NoPE: must be one of RoPE",
        ),
        (
            {"positions": node(Truncated, partial=False, high=1.0, low=0.1, middle=0.5)},
            "model.blocks.attn.mixer.positions=Truncated: must be one of RoPE, Interpolated, YaRN, Llama3 for Llama",
        ),
        ({"_target_": "models.mixers.kda.KimiDeltaAttention"}, "model.pattern=[attn]: none of LlamaForCausalLM, "),
    ],
)
def test_a_model_that_nobody_has_is_refused_with_what_stands_in_the_way(change, line):
    model = of_config(LLAMA).read(LLAMA)
    block = model["blocks"]["attn"]
    model["blocks"] = {"attn": {**block, "mixer": {**block["mixer"], **change}}}
    with pytest.raises(ValueError) as refused:
        of_model(model)
    assert str(refused.value).startswith(line)


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
