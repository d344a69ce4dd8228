"""Import and export against `transformers`: logits, steps of AdamW, and greedy text, in both directions, fp32."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

from data.hf_tokenizer import card_of, files
from data.tokenizer import Bytes, Json, Untrained, from_card
from models.axes import initialise
from models.hub import of_config, tensors
from models.sequence import Whole
from train.checkpoints import checkpoint
from train.checkpoints.hf_convert import Saved, give, take
from train.checkpoints.hf_reader import Published
from train.instantiate import construct

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 40}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": ("LlamaForCausalLM", SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "rms_norm_eps": 1e-4}),
    "llama, tied, llama3": (
        "LlamaForCausalLM",
        SIZES
        | {"intermediate_size": 48, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", SIZES | EXPERTS | {"num_key_value_heads": 2, "norm_topk_prob": False}),
    "qwen3_moe, dense layers, a window, yarn": (
        "Qwen3MoeForCausalLM",
        SIZES
        | EXPERTS
        | {"num_key_value_heads": 1, "norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 2}
        | {"use_sliding_window": True, "sliding_window": 9}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        SIZES
        | EXPERTS
        | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 6}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 4},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8}
        | {"state_size": 12, "n_groups": 2, "chunk_size": 16},
    ),
}
T = 45
TOKENS = torch.randint(0, 72, (2, T), generator=torch.Generator().manual_seed(0))
SEQ = Whole.of(torch.arange(T).expand(2, T))


def theirs(name):
    """A small random model of transformers, every parameter away from where it would not be seen."""
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**sizes, **NO_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # its first weights are drawn from torch's own generator, wherever that stands
        model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def loaded(section, path):
    """Our model of a section with a checkpoint's weights."""
    model = construct(section)
    weights = model.state_dict()
    checkpoint.read({"model": weights}, path, alone=True)
    model.load_state_dict(weights)
    return model


def saved(model, section, path, **config):
    """A checkpoint of ours, and the configuration that its run would have had."""
    path.mkdir(parents=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(path), no_dist=True)
    told = {n: [list(p.shape), str(p.dtype).removeprefix("torch.")] for n, p in model.named_parameters()}
    checkpoint.seal(path, {"step": 1, "tokens": 1000, "model": told, **config.pop("facts", {})})
    return Saved(path, {"model": section, "data": {"max_length": 128}, **config})


def close(got, want, tolerance=1e-5):
    assert (got - want).norm() <= tolerance * want.norm(), ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_equal_both_ways(name, tmp_path):
    """theirs -> a folder in shards -> read as it lies, and imported -> exported, in shards -> theirs."""
    model, folder, tokens = theirs(name), tmp_path / "folder", TOKENS[:1]
    want = model(TOKENS).logits
    model.save_pretrained(folder, max_shard_size="30KB")
    assert (folder / tensors.INDEX).exists()
    found = Published(folder)
    assert not found.left_out
    close(loaded(found.model, folder)(TOKENS, SEQ).logits, want)
    step = take(found, tmp_path / "run", {}, lambda name: None)
    checkpoint.verify(step)
    ours = loaded(found.model, step)
    close(ours(TOKENS, SEQ).logits, want)
    out = Saved(step, {"model": found.model, "data": {"max_length": 77}})
    give(out, tmp_path / "back", {}, config=NO_TOKENS, longest=30_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(model)
    close(again(TOKENS).logits, want)
    mask = torch.ones_like(tokens)
    written = again.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for _ in range(6):
        following = ours(tokens, Whole.of(torch.arange(tokens.shape[1])[None])).logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, following), 1)
    assert torch.equal(written, tokens)
    for key, value in model.state_dict().items():  # every number as it was: rows are moved, not computed
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_adamw_have_equal_losses(name, tmp_path):
    """And each step moves them by much more than they may differ."""
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = loaded(Published(tmp_path).model, tmp_path)
    sides = (model, lambda t: model(t).logits), (ours, lambda t: ours(t, SEQ).logits)
    losses = []
    for module, logits in sides:
        adamw, mine = torch.optim.AdamW(module.parameters(), lr=2e-4, weight_decay=0.0), []
        for _ in range(5):
            loss = F.cross_entropy(logits(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            mine.append(loss.detach())
        losses.append(torch.stack(mine))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert (losses[0].diff() < -1e-3).all(), losses[0]


def test_a_tied_head_that_scales_its_input_is_exported_with_the_scale_in_the_last_norm(tmp_path):
    """Ours multiplies by dim^-½ unless told otherwise: nobody else does."""
    config = {"architectures": ["LlamaForCausalLM"], **MODELS["llama"][1], "tie_word_embeddings": True}
    section = of_config(config).read(config) | {"tied_scale": None}
    ours = initialise(construct(section), 0)
    give(saved(ours, section, tmp_path / "ours"), tmp_path / "out", {}, config=NO_TOKENS)
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        close(again(TOKENS).logits, ours(TOKENS, SEQ).logits)


def test_the_base_and_the_length_are_those_that_the_run_has_reached(tmp_path):
    """A curriculum's last stage begins after what the run trained on: neither its length nor its base counts."""
    config = {"architectures": ["LlamaForCausalLM"], **MODELS["llama"][1]}
    section = of_config(config).read(config)
    model = construct(section)
    stages = {"context": [[0, 64, None], [900, 128, 3e5], [2000, 512, 1e6]]}
    found = saved(model, section, tmp_path / "a", curriculum=stages, facts={"rope_theta": 3e5})
    assert found.max_length == 128 and found.config["rope_parameters"]["rope_theta"] == 3e5
    close(torch.tensor(model.layers["0"].mixer.positions.base), torch.tensor(1e4))


def test_weights_in_bf16_stay_so_and_are_written_so(tmp_path):
    model = theirs("qwen3_next").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    found = Published(tmp_path / "bf16")
    assert found.dtypes["embedding"] == torch.bfloat16
    assert found.dtypes["layers.0.mixer_norm.weight"] == torch.float32  # 1 + w has more digits than w
    step = take(found, tmp_path / "run", {}, lambda name: None)
    out = Saved(step, {"model": found.model, "data": {}})
    give(out, tmp_path / "back", {}, config=NO_TOKENS, dtype=torch.bfloat16)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=1e-7)  # (1 + w) - 1, in fp32


def test_norms_decays_and_step_sizes_keep_their_digits_in_an_export_at_a_lower_precision(tmp_path):
    model = theirs("qwen3_next")
    model.save_pretrained(tmp_path / "in")
    step = take(found := Published(tmp_path / "in"), tmp_path / "run", {}, lambda name: None)
    give(Saved(step, {"model": found.model, "data": {}}), tmp_path / "out", {}, config={}, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    stored = tensors.folder(tmp_path / "out")
    kept = {key for key, each in stored.items() if each.dtype == torch.float32}
    assert kept == {key for key in stored if key.endswith(("norm.weight", "A_log", "dt_bias"))} != stored.keys()
    for key in kept:
        want = model.state_dict()[key]
        torch.testing.assert_close(tensors.rows(stored[key], 0, len(want)), want, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_a_head_of_its_own_is_kept_whatever_the_configuration_says_of_it(tmp_path):
    """As `transformers` reads such folders: both where they differ, one where they are equal or only one is there."""
    from safetensors.torch import load_file, save_file

    theirs("llama, tied, llama3").save_pretrained(tmp_path)
    weights = load_file(tmp_path / tensors.SINGLE)
    other = torch.randn(72, 32, generator=torch.Generator().manual_seed(2))
    embedding = weights.pop("model.embed_tokens.weight")
    for heads, said in (
        ({"model.embed_tokens.weight": embedding, "lm_head.weight": other}, 1),
        ({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}, 0),
        ({"lm_head.weight": other}, 0),
    ):
        save_file(weights | heads, tmp_path / tensors.SINGLE)
        found = Published(tmp_path)
        assert len(found.said) == said and found.model["tied"] == (not said)
        want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits
        close(loaded(found.model, tmp_path)(TOKENS, SEQ).logits, want)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next"])
@torch.no_grad()
def test_experts_that_lie_stacked_are_read(name, tmp_path):
    """As current versions hold them in memory, and save them where asked to."""
    model = theirs(name)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in tensors.folder(tmp_path))
    close(loaded(Published(tmp_path).model, tmp_path)(TOKENS, SEQ).logits, model(TOKENS).logits)


def test_a_number_that_is_not_finite_is_refused_where_it_is_read(tmp_path):
    model = theirs("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: holds numbers that are not finite"):
        Published(tmp_path).verify()


@torch.no_grad()
def test_the_average_is_exported_where_it_is_asked_for_and_positions_never_shrink(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], **MODELS["llama"][1]}
    section = of_config(config).read(config)
    raw, mean = (initialise(construct(section), seed) for seed in (0, 1))
    told = {n: [list(p.shape), "float32"] for n, p in raw.named_parameters()}
    (tmp_path / "c").mkdir()
    state = {"model": raw.state_dict(), "average": {"mean": mean.state_dict()}}
    dcp.save(state, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    checkpoint.seal(tmp_path / "c", {"step": 1, "tokens": 9, "model": told, "published": {"positions": 512}})
    for average, model in ((False, raw), (True, mean)):
        found = Saved(tmp_path / "c", {"model": section, "data": {"max_length": 64}}, average=average)
        assert found.max_length == 512
        give(found, tmp_path / f"out {average}", {}, config=NO_TOKENS)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"out {average}")
        close(again(TOKENS).logits, model(TOKENS, SEQ).logits)


@torch.no_grad()
def test_rows_for_more_tokens_are_the_mean_of_the_others(tmp_path):
    model = theirs("llama")
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="vocabulary=80: folder has 72; extend_vocab=true adds rows"):
        Published(tmp_path / "folder", vocabulary=80)
    with pytest.raises(ValueError, match="vocabulary=60: must be at least 72"):
        Published(tmp_path / "folder", vocabulary=60, extend=True)
    found = Published(tmp_path / "folder", vocabulary=80, extend=True)
    ours = loaded(found.model, take(found, tmp_path / "run", {}, lambda name: None))
    assert ours.embedding.shape == (80, 32)
    torch.testing.assert_close(ours.embedding[72:], model.model.embed_tokens.weight.mean(0).expand(8, 32))
    logits = ours(TOKENS, SEQ).logits
    close(logits[..., :72], model(TOKENS).logits)
    torch.testing.assert_close(logits[..., 72:], logits[..., :72].mean(-1, keepdim=True).expand(2, T, 8))


TEXTS = ["def f(x):\n    return x  # ü ∂ 🙂", " two  blanks\t\r\n", "<|endoftext|> is text", "\x00\x7f", ""]


def _load(folder, card):
    folder.mkdir()
    for name, text in files(card, 512).items():
        (folder / name).write_text(text)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_byte_tokenizer_is_told_in_files(tmp_path):
    tokenizer = _load(tmp_path / "t", Bytes().card())
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == Bytes().encode(text.encode()).tolist(), text
        assert tokenizer(text)["input_ids"] == [Bytes.DOCUMENT, *ids]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (256, 256, 257)
    assert tokenizer.model_max_length == 512
    assert card_of(tmp_path / "t") == Bytes().card()  # it comes back as what it was
    again = from_card(Json((tmp_path / "t" / "tokenizer.json").read_text()).card())
    assert (again.DOCUMENT, again.size) == (256, 257)
    assert all(again.encode(text.encode()).tolist() == list(text.encode()) for text in TEXTS)


def test_a_trained_tokenizer_is_told_in_files(tmp_path):
    ours = Untrained(300).trained([text.encode() * 3 for text in TEXTS])
    tokenizer = _load(tmp_path / "t", ours.card())
    for text in TEXTS:
        ids = ours.encode(text.encode()).tolist()
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer(text)["input_ids"] == [ours.DOCUMENT, *ids]


def test_a_tokenizer_without_an_end_of_text_gets_one(tmp_path):
    from tokenizers import Tokenizer, models

    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str())
    card = card_of(tmp_path)
    assert card["special"]["document"] == 2
    tokenizer = _load(tmp_path / "t", card)
    assert tokenizer("ab")["input_ids"] == [2, 0, 1] and tokenizer.eos_token_id == 2


@pytest.mark.e2e
def test_an_exported_run_writes_the_same_greedy_text(tmp_path, monkeypatch, capsys):
    """As a user: train, export, generate; transformers has nothing but the folder."""
    from launch.cli import main

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} of it and so on, " * 400)
    short = ["model.dim=32", "model.layers=2", "train.steps=3", "data.max_length=64", "train.batch_tokens=256"]
    quiet = [
        "tracking=none",
        "cluster=none",
        "cluster.workers=1",
        "cluster.threads=1",
        "train.evaluate_every=null",
        "optimizer.lr=1e-2",
    ]
    data = ["data=text", f"data.path={tmp_path}", "data.store=store", "data.heldout=0.5", "data.heldout_tokens=64"]
    assert main(["train", "model=llama_tiny", "run.dir=run", *short, *quiet, *data, "precision=fp32"]) == 0
    assert main(["export", "run", "out", "max_shard=20KB"]) == 0
    prompt = "the a of"
    capsys.readouterr()
    assert main(["generate", "run", f"prompt={prompt}", "tokens=24", "temperature=0"]) == 0
    said = capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    published = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert json.loads(Path("out/config.json").read_text())["max_position_embeddings"] == 64
    written = published.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    assert text == said.removesuffix("\n") and len(text) > len(prompt)
