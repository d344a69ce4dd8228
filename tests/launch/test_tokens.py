"""Published tokenizers as a user meets them: a folder is imported, prompted, measured and exported, and all of that is
what transformers makes of the folder."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from launch.cli import main

transformers = pytest.importorskip("transformers")

from tests.published_tokens import KINDS, TEXTS  # noqa: E402

PROMPT = "the words of"
RARELY = ("qwen3", "gemma", "deepseek")  # the other kinds that are measured, each some ten seconds


def published(folder: Path, kind: str) -> dict:
    """A folder with a model of random weights and a tokenizer of that kind; its special ids."""
    expected = KINDS[kind](folder)
    tokens = len(transformers.AutoTokenizer.from_pretrained(folder))
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(
        vocab_size=tokens, **sizes, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    kept = {path.name: path.read_text() for path in folder.iterdir()}
    model.save_pretrained(folder)
    for name, text in kept.items():
        (folder / name).write_text(text)
    file = folder / "config.json"
    told = {key: value for key, value in json.loads(file.read_text()).items() if not key.endswith("_token_id")}
    file.write_text(json.dumps(told | expected["ids"]))
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_prompted_and_given_back_as_transformers_has_it(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = published(tmp_path / "source", kind)
    assert main(["import", "source", "runs/x"]) == 0
    capsys.readouterr()
    assert main(["generate", "runs/x", f"prompt={PROMPT}", "tokens=16", "temperature=0"]) == 0
    said = capsys.readouterr().out.removesuffix("\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained("source")
    model = transformers.AutoModelForCausalLM.from_pretrained("source", dtype=torch.float32)
    stops = [*expected["stop"]]
    asked = dict(max_new_tokens=16, do_sample=False, temperature=None, top_p=None, eos_token_id=stops, pad_token_id=0)
    written = model.generate(**tokenizer(PROMPT, return_tensors="pt"), **asked)
    assert said == tokenizer.decode(written[0], skip_special_tokens=True) and len(said) > len(PROMPT)
    assert main(["export", "runs/x", "out"]) == 0
    for path in (tmp_path / "source").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / path.name).read_text().strip() == path.read_text().strip(), path.name
    source, out = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert out.get(key, "none") == source.get(key, "none"), key
    again = transformers.AutoTokenizer.from_pretrained("out")
    assert again.special_tokens_map == tokenizer.special_tokens_map and again.chat_template == tokenizer.chat_template
    assert main(["import", "out", "runs/y"]) == 0
    cards = [json.loads((tmp_path / f"runs/{name}/tokenizer.json").read_text()) for name in "xy"]
    assert cards[0] == cards[1]


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["llama2", "llama3", *(pytest.param(each, marks=pytest.mark.slow) for each in RARELY)])
def test_documents_cost_what_transformers_says_of_them(kind, tmp_path, monkeypatch, capsys):
    """Behind the begin that the folder puts there, and no other token; a first token without one is not scored."""
    monkeypatch.chdir(tmp_path)
    begin = published(tmp_path / "source", kind)["begin"]
    (tmp_path / "texts").mkdir()
    contents = [f"{text} {i}" for i, text in enumerate(TEXTS * 8)]
    for i, content in enumerate(contents):
        (tmp_path / "texts" / f"{i}.txt").write_text(content)
    data = ["data=text", "data.path=texts", "data.max_length=32", "data.heldout=0.5", "data.heldout_tokens=64"]
    quiet = ["cluster=none", "cluster.workers=1", "cluster.threads=1"]
    rest = [
        "tracking=none",
        "train.batch_tokens=64",
        "train.evaluate_every=null",
        "precision=fp32",
        "optimizer.lr=1e-9",
    ]
    start = ["init_from=source", "data.tokenizer=source", "train.steps=1", "run.dir=trained"]
    assert main(["train", *data, *rest, *start, *quiet]) == 0
    assert "another tokenizer" not in "".join(capsys.readouterr())
    assert main(["evaluate", "trained", "evaluate.parts=[loss]", "evaluate.tokens=100000", *quiet]) == 0
    found = json.loads((tmp_path / "trained/evaluation/step-1/results.json").read_text())["loss"]
    tokenizer = transformers.AutoTokenizer.from_pretrained("source")
    model = transformers.AutoModelForCausalLM.from_pretrained("source", dtype=torch.float32)
    nats, targets, size = 0.0, 0, 0
    for content in contents:
        if int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little") >= 1 << 63:
            continue
        ids = tokenizer(content, return_tensors="pt")["input_ids"]
        logp = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(logp.gather(1, ids[0, 1:, None]).sum())
        targets += ids.shape[1] - 1
        size += len(content.encode()) - (0 if begin else len(tokenizer.decode(ids[0, :1]).encode()))
    assert found["targets"] == targets
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert found["loss_per_byte"] == pytest.approx(nats / size, rel=1e-5)
