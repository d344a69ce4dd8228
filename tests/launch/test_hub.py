"""`farspan import` and `farspan export` as a user meets them: what they write, and what they refuse in one line."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from data.hf_tokenizer import card_of, differ, files
from data.tokenizer import Bytes, Json, from_card
from launch.cli import main
from launch.errors import UserError
from launch.preflight.configure import configure
from launch.preflight.init_from import same_tokens, sound
from models.hub import ARCHITECTURES, tensors
from tests import published_folder
from tests.published_folder import LLAMA
from train.checkpoints import checkpoint
from train.checkpoints.hf_reader import Published


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A place of its own, with a folder `source` in two files."""
    monkeypatch.chdir(tmp_path)
    published_folder.write(tmp_path / "source", LLAMA, longest=80_000)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) == 2
    return tmp_path


def refused(capsys, *arguments):
    """The one line that a command is refused with."""
    assert main([*map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_an_import_is_a_run_to_go_on_from(here, capsys):
    assert main(["import", "source"]) == 0
    said = capsys.readouterr().err
    assert "LlamaForCausalLM, 32,416 parameters: runs/source" in said and "init_from=runs/source" in said
    run = here / "runs" / "source"
    checkpoint.verify(run / "checkpoints" / "step-0")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"] == {"max_length": 512} and saved["model"] == Published(here / "source").model
    for given in ("source", "runs/source", "runs/source/checkpoints/step-0"):
        assert configure([f"init_from={given}"]).model.values == saved["model"]
    asked = configure(["init_from=source", "model.blocks.attn.mixer.window=64", "model.layers=2"])
    assert asked.model["blocks"]["attn"]["mixer"]["window"] == 64
    assert configure(["init_from=source", "model=mixer_study"]).model["dim"] == 64
    assert refused(capsys, "status", "source") == "farspan status: runs/source: is an import and has trained nothing"
    with pytest.raises(UserError, match="resume=runs/source: is an import and has trained nothing"):
        configure(["resume=runs/source"])


def test_other_positions_for_an_imported_model(here):
    """A longer context: another rule in place of the folder's, by its group."""
    place = "model.blocks.attn.mixer.positions"
    found = configure(
        ["init_from=source", f"positions@{place}=yarn", f"{place}.factor=8", f"{place}.trained_length=512"]
    )
    assert found.model["blocks"]["attn"]["mixer"]["positions"]["_target_"] == "models.positions.YaRN"
    assert configure(["init_from=source", f"{place}.base=1e6"]).model["blocks"]["attn"]["mixer"]["positions"] == {
        "_target_": "models.positions.RoPE",
        "base": 1e6,
        "fraction": 1.0,
    }


def _config(**change):
    def damage(folder):
        (folder / "config.json").write_text(json.dumps(LLAMA | change))

    return damage


def _wanted(change):
    """The folder again, its tensors' shapes changed."""

    def damage(folder):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        wanted = published_folder.shapes(LLAMA)
        change(wanted)
        published_folder.write(folder, LLAMA, wanted=wanted)

    return damage


def _pickled(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")


def _cut(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _nan(folder):
    """In the last tensor of the last file."""
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\xc0\x7f")


def _fifo(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


K = "model.layers.1.self_attn.k_proj.weight"
DAMAGES = {
    "architecture": (
        _config(architectures=["GPT2LMHeadModel"]),
        f"config.json: architectures=GPT2LMHeadModel: must be one of the {len(ARCHITECTURES)} that `farspan import",
    ),
    "bias": (_config(attention_bias=True), "config.json: attention_bias=true: must be false"),
    "missing": (_wanted(lambda w: w.pop(K)), f"{K} [16, 32]: missing from source"),
    "extra": (
        _wanted(lambda w: w.update({"model.extra": (3,)})),
        "model-00001-of-00001.safetensors: model.extra: no tensor of LlamaForCausalLM of this shape",
    ),
    "shape": (
        _wanted(lambda w: w.update({K: (16, 33)})),
        f"model-00001-of-00001.safetensors: {K} is [16, 33], must be [16, 32]",
    ),
    "cut": (_cut, "model-00002-of-00002.safetensors: is cut short: it has "),
    "lost": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors: missing"),
    "pickled": (_pickled, "pytorch_model.bin: is pickled, and may run code when it is opened; expected model.safe"),
    "layers": (
        _config(num_hidden_layers=1_000_000_000),
        "config.json: num_hidden_layers=1000000000: must be at most 21, the tensors here",
    ),
    "vocabulary": (
        _config(vocab_size=10**12),
        "config.json: vocab_size=1000000000000: must be at most 65536, the larg",
    ),
    "type": (_config(hidden_size="32"), "config.json: hidden_size=32: must be a whole number of at least 1"),
    "quantised": (_config(quantization_config={"bits": 4}), "config.json: quantization_config: must be absent"),
    "NaN": (
        _nan,
        "model-00002-of-00002.safetensors: model.layers.1.mlp.down_proj.weight: holds numbers that are not finite",
    ),
    "pipe": (_fifo("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors: is no regular file"),
    "json": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: is no tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_whole_is_refused_and_nothing_written(damage, here, capsys):
    break_it, line = DAMAGES[damage]
    break_it(here / "source")
    assert refused(capsys, "import", "source", "dest").startswith(f"farspan import: SOURCE=source: {line}")
    if damage != "tokenizer":
        quiet = ["cluster=none", "cluster.workers=1", "cluster.threads=1", "tracking=none", "run.dir=new"]
        assert refused(capsys, "train", "init_from=source", *quiet).startswith(
            f"farspan train: init_from=source: {line}"
        )
    assert [p.name for p in here.iterdir()] == ["source"]


def test_a_folder_is_not_taken_for_a_run_without_a_word(here, capsys):
    line = "RUN=source: is a folder of Hugging Face's; farspan import source makes a run of it"
    assert refused(capsys, "generate", "source") == f"farspan generate: {line}"
    assert refused(capsys, "export", "source", "out") == f"farspan export: {line}"
    _fifo("config.json")(here / "source")
    assert refused(capsys, "import", "source") == "farspan import: SOURCE=source: config.json: is no regular file"


def test_what_cannot_go_out_again_is_told_where_it_comes_in(here, capsys):
    config = published_folder.MOE | {"architectures": ["Qwen3NextForCausalLM"], "num_experts": 0, "hidden_size": 32}
    config |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    config |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention"] * 2, "intermediate_size": 48}
    published_folder.write(here / "linear", config)
    assert main(["import", "linear"]) == 0
    reason = "model.pattern=[gdn_dense]: must have a layer of attention for Qwen3NextForCausalLM"
    assert f"cannot be exported again as it is: {reason}" in capsys.readouterr().err
    assert refused(capsys, "export", "linear", "out").endswith(reason)
    said: list[str] = []
    for path in (here / "linear", here / "runs/linear/checkpoints/step-0"):
        sound(path, Published(here / "linear").model, said.append)
    sound(here / "source", Published(here / "source").model, said.append)
    assert said == [f"this model cannot be exported: {reason}"] * 2


def test_the_average_of_a_run_without_one_is_not_exported(here, capsys):
    assert main(["import", "source", "run"]) == 0
    capsys.readouterr()
    assert "weights=average: must be raw, run/checkpoints/step-0 holds no" in refused(
        capsys, "export", "run", "out", "weights=average"
    )
    assert "weights=mean: must be one of raw, average" in refused(capsys, "export", "run", "out", "weights=mean")


def test_what_is_there_already_is_left_alone(here, capsys):
    (here / "dest").mkdir()
    assert refused(capsys, "import", "source", "dest").startswith("farspan import: DEST=dest: is there already")
    assert refused(capsys, "import", "source", "run.dir=dest").startswith("farspan import: DEST=dest: is there already")
    assert main(["import", "source", "run"]) == 0
    capsys.readouterr()
    assert refused(capsys, "export", "run", "dest").startswith("farspan export: DEST=dest: is there already")
    assert not list((here / "dest").iterdir())


def test_the_architectures_are_listed(capsys):
    assert main(["import", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ARCHITECTURES) and all(len(line.split()) > 3 for line in lines)


def test_arguments_are_checked(here, capsys):
    assert refused(capsys, "import") == (
        "farspan import: SOURCE: missing; expected farspan import SOURCE DEST [key=value ...]"
    )
    assert refused(capsys, "export", "run").startswith("farspan export: DEST: missing")
    assert refused(capsys, "import", "a", "b", "c").startswith("farspan import: c: one too many")
    assert refused(capsys, "import", "meta/none").startswith("farspan import: SOURCE=meta/none: no such folder")
    assert "max_shard=3XB: must be a size" in refused(capsys, "export", "run", "out", "max_shard=3XB")
    assert "dtype=int8: must be one of fp32, bf16, fp16" in refused(capsys, "export", "run", "out", "dtype=int8")
    assert "extendvocab: no such key; nearest: extend_vocab" in refused(capsys, "import", "source", "extendvocab=true")
    assert "vocabulary=20000000: must be at most 16777216" in refused(
        capsys, "import", "source", "vocabulary=20000000", "extend_vocab=true"
    )
    assert "vocabulary=300: source has 264; extend_vocab=true" in refused(capsys, "import", "source", "vocabulary=300")


def _with_tokenizer(folder, size):
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(size - 1)} | {"<|endoftext|>": size - 1}
    (folder / "tokenizer.json").write_text(Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).to_str())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_or_gets_its_rows(here, capsys):
    _with_tokenizer(here / "source", 270)
    line = refused(capsys, "import", "source", "dest")
    assert "tokenizer.json has 270 tokens, the model 264: extend_vocab=true adds rows" in line
    assert main(["import", "source", "dest", "extend_vocab=true"]) == 0
    assert yaml.safe_load((here / "dest/config.yaml").read_text())["model"]["vocabulary"] == 270
    card = json.loads((here / "dest/checkpoints/step-0/tokenizer.json").read_text())
    assert card["special"] == {"begin": [], "end": 269, "stop": [269], "pad": None, "unknown": 0}
    assert main(["export", "dest", "out", "dtype=bf16"]) == 0
    config = json.loads((here / "out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["dtype"]) == (270, 269, "bfloat16")
    assert config["max_position_embeddings"] == 512
    assert json.loads((here / "out/tokenizer_config.json").read_text())["model_max_length"] == 512
    assert tensors.folder(here / "out")["model.embed_tokens.weight"].shape == (270, 32)


def test_another_tokenizer_than_that_of_the_weights_is_told(here, capsys):
    """The folder's has words, the run reads bytes."""
    _with_tokenizer(here / "source", 264)
    said: list[str] = []
    card = card_of(here / "source")
    for same in (from_card(card), Bytes()):
        same_tokens(here / "source", SimpleNamespace(tokenizer=same), said.append)
    assert said == [
        f"init_from={here / 'source'}: was trained on tokens of another tokenizer; "
        f"data.tokenizer={here / 'source'} takes that one"
    ]
    bytes_again = Json(files(Bytes().card(), None)["tokenizer.json"]).card()
    assert bytes_again != Bytes().card() and not differ(bytes_again, Bytes().card())  # another card, the same tokens


def test_a_model_that_no_architecture_expresses_is_refused(here, capsys):
    """The default one: its first layer is gated linear attention."""
    config = configure(["model.dim=32", "model.layers=1"])
    model, run = config.model.build(), here / "run"
    step = run / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(step), no_dist=True)
    shapes = {n: [list(p.shape), "float32"] for n, p in model.named_parameters()}
    for place in (run, step):
        (place / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    checkpoint.seal(step, {"step": 1, "tokens": 1, "model": shapes})
    line = refused(capsys, "export", "run", "out")
    assert line.startswith("farspan export: RUN=run: model.pattern=[gla,gdn,gla,attn]: none of LlamaForCausalLM, ")
    assert line.endswith("has layers of GatedLinearAttention") and not Path("out").exists()


def test_what_is_half_written_is_not_taken_for_whole(here, monkeypatch, capsys):
    """A write that fails in its midst leaves nothing under the name that was asked for."""
    assert main(["import", "source", "run"]) == 0
    honest, calls = tensors.rows, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return honest(*arguments)

    monkeypatch.setattr(tensors, "rows", failing)
    capsys.readouterr()
    line = refused(capsys, "import", "source", "again")
    assert line == "farspan import: DEST=again: cannot be written (No space left on device)"
    monkeypatch.setattr(tensors, "write", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "DEST=out: cannot be written" in refused(capsys, "export", "run", "out")
    assert sorted(p.name for p in here.iterdir()) == ["run", "source"]


def test_an_index_may_not_lead_out_of_its_folder(here):
    index = here / "source" / tensors.INDEX
    told = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": told | {K: "/etc/passwd"}}))
    with pytest.raises(ValueError, match="/etc/passwd: must be a safetensors file of the folder"):
        Published(here / "source")


def test_what_is_imported_and_exported_is_what_it_was(here):
    """Bit for bit, whatever the files."""
    assert main(["import", "source", "run"]) == 0
    assert main(["export", "run", "out", "max_shard=30KB"]) == 0
    before, after = tensors.folder(here / "source"), tensors.folder(here / "out")
    assert before.keys() == after.keys()
    for name, stored in before.items():
        rows = stored.shape[0]
        assert torch.equal(tensors.rows(stored, 0, rows), tensors.rows(after[name], 0, rows)), name
