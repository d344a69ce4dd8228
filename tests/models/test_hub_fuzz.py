"""Files of a folder from elsewhere, with anything in them: one line each time, at once."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.hub import ARCHITECTURES, of_config, of_model, tensors
from models.hub.values import USUAL

STRANGE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**9, -1, 0, 4.0, "64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_heads": 4},
    **{"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 20, "n_groups": 1},
}
ROPE = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "mscale",
)
FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def configs(draw):
    """A config.json with a few keys of any value."""
    architecture = draw(st.sampled_from(list(ARCHITECTURES.values())))
    keys = sorted({*USUAL, *architecture.kinds, *architecture.defaults, *architecture.fixed, "quantization_config"})
    config = {"architectures": [architecture.name], **SIZES}
    config |= draw(st.dictionaries(st.sampled_from(keys), STRANGE, max_size=2))
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["default", "linear", "yarn", "llama3"]))
        rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config["rope_parameters"] = rope | draw(st.dictionaries(st.sampled_from(ROPE), STRANGE, max_size=2))
    return config


@FEW
@given(configs())
def test_any_value_of_a_config_json_is_read_or_refused_in_one_line(config):
    begun = time.monotonic()
    stored = {f"t{i}": tensors.StoredTensor(None, None, (40, 16), 0) for i in range(30)}
    try:
        architecture = of_config(config)
        architecture.complete(config)
        architecture.bounded(config, stored)
        of_model(architecture.read(config))
        architecture.rows(config)
    except ValueError as error:
        assert str(error).startswith(("config.json: ", "model.")) and "\n" not in str(error) and len(str(error)) < 400
    assert time.monotonic() - begun < 10


OFFSETS = STRANGE | st.lists(st.integers(0, 99), min_size=2, max_size=2)
SHAPES = STRANGE | st.lists(st.integers(0, 9))
ENTRIES = STRANGE | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16"]) | STRANGE, "shape": SHAPES, "data_offsets": OFFSETS}
)


@FEW
@given(st.dictionaries(st.text(max_size=5), ENTRIES, max_size=3), st.binary(max_size=80))
def test_any_header_is_read_or_refused_in_one_line(tmp_path_factory, entries, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    try:
        for stored in tensors.header(path).values():
            if stored.shape and stored.shape[0]:
                tensors.rows(stored, 0, stored.shape[0])
    except ValueError as error:
        assert str(error).startswith("any.safetensors: ")


@FEW
@given(st.binary(max_size=200))
def test_any_bytes_are_no_header(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(data)
    try:
        assert tensors.header(path) == {}
    except ValueError as error:
        assert str(error).startswith("bytes.safetensors: ")


@pytest.mark.parametrize(
    "text", ["{", "[]", "1", '"x"', "null", "NaN", "[" * 100_000, '{"a": ' * 50_000, "\ufeff{}", ""]
)
def test_a_table_is_one_object_of_json(text, tmp_path):
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match="config.json: is not (a )?JSON"):
        tensors.table(tmp_path / "config.json")
