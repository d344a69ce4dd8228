"""A folder of Hugging Face's from elsewhere: its code and its pickles stay closed, and what is wrong is one line."""

import json
import os
import pickle
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.hub import tensors
from tests.published_folder import LLAMA, write
from tests.watched import change, inert
from train.checkpoints.hf_reader import Published, is_folder

ASKING = {
    "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    "trust_remote_code": True,
    "custom_pipelines": {"text-generation": {"impl": "evil.Evil", "pt": ["AutoModelForCausalLM"]}},
}


class Planted:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("made") / "source", LLAMA, longest=40_000)


@pytest.fixture
def source(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, "source"))


def read(source: Path) -> Published:
    """All that an import reads of the model."""
    assert is_folder(source)
    found = Published(source)
    found.verify()
    return found


def refused(source: Path) -> str:
    with inert(), pytest.raises(ValueError) as error:
        read(source)
    line = str(error.value)
    assert line and "\n" not in line and len(line) < 600
    assert not Path("ran").exists()
    return line


def test_code_and_pickles_of_a_folder_stay_closed(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **ASKING}))
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "__init__.py", "setup.py"):
        (source / name).write_text("import os; os.mkdir('ran')")
    for name in ("pytorch_model.bin", "model.pkl", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (source / name).write_bytes(pickle.dumps(Planted()))
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with inert():
        found = read(source)
    assert found.name == "LlamaForCausalLM" and not Path("ran").exists()
    for file in (*source.glob("*.safetensors"), source / tensors.INDEX):
        file.unlink()
    assert "is pickled, and may run code" in refused(source)


def test_a_pickle_by_the_name_of_safetensors_is_none(source: Path) -> None:
    file = min(source.glob("*.safetensors"))
    for content in (pickle.dumps(Planted()), pickle.dumps(Planted(), protocol=0), b"PK\x03\x04" + b"\0" * 200, b""):
        file.write_bytes(content)
        assert file.name in refused(source)


@pytest.mark.parametrize("name", ["config.json", tensors.INDEX, "safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "deep", "digits", "not UTF-8", "list"])
def test_what_is_no_such_file(source: Path, name: str, kind: str) -> None:
    texts = {"deep": b"[" * 100_000, "digits": b'{"a": ' + b"9" * 10_000 + b"}", "not UTF-8": b'{"a": "\xff"}'}
    texts["list"] = b"[]"
    file = min(source.glob("*.safetensors")) if name == "safetensors" else source / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif name == "safetensors":
        file.write_bytes(len(texts[kind]).to_bytes(8, "little") + texts[kind])
    else:
        file.write_bytes(texts[kind])
    if name == "config.json" and kind in ("pipe", "device", "folder"):
        assert not is_folder(source)
    with inert(), pytest.raises(ValueError) as error:
        Published(source).verify()
    assert "\n" not in str(error.value)


def test_files_are_those_of_the_folder(source: Path) -> None:
    """A link is followed, as in a cache of Hugging Face's; a name that leads elsewhere is refused."""
    file = min(source.glob("*.safetensors"))
    Path("blobs").mkdir()
    file.rename(Path("blobs") / file.name)
    file.symlink_to(Path("blobs").absolute() / file.name)
    with inert():
        read(source)
    index = json.loads((source / tensors.INDEX).read_text())
    first = min(index["weight_map"])
    for name in ("../blobs/" + file.name, str(Path("blobs").absolute() / file.name), "..", "", "a\0.safetensors", 5):
        told = {"weight_map": {**index["weight_map"], first: name}}
        (source / tensors.INDEX).write_text(json.dumps(told))
        assert tensors.INDEX in refused(source)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["..", "F32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MORE = {
    "num_hidden_layers": 10**9,
    "hidden_size": 10**12,
    "vocab_size": -1,
    "head_dim": 0,
    "max_position_embeddings": 0,
}


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_of_any_key_of_a_folders_json_is_read_or_refused(made, tmp_path_factory, data) -> None:
    source = Path(shutil.copytree(made, tmp_path_factory.mktemp("fuzz") / "source"))
    name = data.draw(st.sampled_from(["config.json", tensors.INDEX, "header"]))
    file = min(source.glob("*.safetensors")) if name == "header" else source / name
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little") if name == "header" else len(content)
    told = json.loads(content[8:end] if name == "header" else content)
    if name == "config.json":
        told |= deepcopy(ASKING) | {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        told |= {"rms_norm_eps": 1e-6, "head_dim": 8, "tie_word_embeddings": False, "hidden_act": "silu"}
    change(data, told, VALUES | st.sampled_from(sorted(MORE.values())))
    text = json.dumps(told).encode(errors="replace")
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:] if name == "header" else text)
    with inert():
        try:
            read(source)
        except ValueError as error:
            assert "\n" not in str(error)
