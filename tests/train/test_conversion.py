"""Softmax attention becomes a linear mixer that begins from its projections; everything else stays, to the bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from data.pack import Packed
from models.axes import initialise
from models.mixers import MIXERS
from models.mixers.attention import Attention
from models.mixers.inheritance import HeadShape
from models.sequence import Whole
from tests.published_folder import LLAMA, MOE, write
from train import conversion, layer_scores
from train.checkpoints import checkpoint
from train.checkpoints.hf_reader import Published
from train.conversion import ConvertedWeights, converted, lost, part_of, staying
from train.distill_settings import ConvertSettings
from train.inference.decode import Decoder

ABLE = sorted(name for name, kind in MIXERS.items() if getattr(kind, "INHERITS", False))


def by_hand(attention, x):
    """Queries, keys and values of each query head, [1, T, H, K], written out."""
    q = F.linear(x, attention.q.weight).view(1, len(x[0]), 4, 8)
    rows = attention.kv.weight.view(2, 2, 8, 32)  # of each of two key heads, its keys and its values
    keys, values = (torch.stack([F.linear(x, rows[head // 2, which]) for head in range(4)], dim=2) for which in (0, 1))
    return q, keys, values


def filled(name, attention, **options):
    mixer = MIXERS[name](dim=32, **MIXERS[name].like(HeadShape(32, 4, 8)), **options)
    initialise(mixer, seed=5)
    with torch.no_grad():
        for own, value in mixer.inherited(attention.projections()).items():
            mixer.get_parameter(own).copy_(value)
    return mixer


def check_projections(name):
    attention = initialise(Attention(dim=32, heads=4, kv_heads=2), seed=3)
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    mixer = filled(name, attention)
    found = mixer.project(x, Whole.of(torch.arange(7)[None]), slot="layers.0")
    bent = F.silu if name not in ("linear", "retnet") else (lambda y: y)  # their convolution's, or none
    for got, want in zip(found, by_hand(attention, x), strict=True):
        torch.testing.assert_close(got, bent(want))
    assert torch.equal(mixer.out.weight, attention.out.weight)


@pytest.mark.parametrize("name", ABLE)
def test_a_mixer_reads_with_the_projections_of_the_attention_it_replaces(name):
    check_projections(name)


def test_the_gate_of_attention_is_that_of_a_mixer_that_has_one():
    attention = initialise(Attention(dim=32, heads=4, gate=True), seed=3)
    assert torch.equal(filled("gla", attention).gate.weight, attention.gate.weight)
    assert "gate.weight" not in MIXERS["kda"](dim=32, heads=4).inherited(attention.projections())


def test_the_gate_of_kda_begins_as_one_half_everywhere():
    mixer = filled("kda", initialise(Attention(dim=32, heads=4), seed=3))
    gate = mixer.gate_out(mixer.gate_in(torch.randn(3, 32, generator=torch.Generator().manual_seed(0))))
    assert torch.equal(gate.sigmoid(), torch.full((3, 32), 0.5))


def test_a_mutation_that_repeats_key_heads_in_turns_is_seen(monkeypatch):
    honest = Attention.projections

    def in_turns(self):
        found = honest(self)
        return found._replace(k=found.k.view(4, 8, 32)[[0, 2, 1, 3]].flatten(0, 1))

    monkeypatch.setattr(Attention, "projections", in_turns)
    with pytest.raises(AssertionError):
        check_projections("gla")


def test_widths_that_no_fraction_gives_are_met():
    for dim, heads, head_dim in ((96, 4, 8), (49, 1, 10), (60, 7, 11), (1024, 3, 64)):
        mixer = MIXERS["gla"](dim=dim, **MIXERS["gla"].like(HeadShape(dim, heads, head_dim)))
        assert (mixer.keys, mixer.values) == 2 * (heads * head_dim,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hub") / "llama", LLAMA | {"num_hidden_layers": 3})


def test_a_published_model_is_converted_and_what_is_no_mixer_of_those_layers_stays(folder, tmp_path):
    before = Published(folder).model
    after, layers = converted(before, ConvertSettings(mixer="gla", every=3))
    assert layers == [0, 1] and len(after["pattern"]) == 3 and after["pattern"][0] == after["pattern"][1]
    weights = ConvertedWeights(folder, before, after, layers, seed=7)
    saved = conversion.write(weights, tmp_path / "run", {"config.yaml": "{}\n"}, lambda name: None)
    checkpoint.verify(saved)
    model = conversion.built(after).to_empty(device="cpu")
    state = model.state_dict()
    checkpoint.read({"model": state}, saved, alone=True)
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    theirs = {name: tensor for file in set(files.values()) for name, tensor in load_file(folder / file).items()}
    attn = "model.layers.{}.self_attn.{}_proj.weight"
    for i in (0, 1):
        q, k, v, o = (theirs[attn.format(i, each)] for each in "qkvo")
        k, v = (each.view(2, 8, 32).repeat_interleave(2, 0).view(32, 32) for each in (k, v))
        assert torch.equal(state[f"layers.{i}.mixer.qkv.weight"], torch.cat((q, k, v)))
        assert torch.equal(state[f"layers.{i}.mixer.out.weight"], o)
        drawn = state[f"layers.{i}.mixer.decay_in.weight"]
        assert 0.1 < drawn.std() < 0.3 and not torch.equal(drawn, state[f"layers.{1 - i}.mixer.decay_in.weight"])
    assert torch.equal(state["layers.2.mixer.q.weight"], theirs[attn.format(2, "q")])
    assert torch.equal(state["embedding"], theirs["model.embed_tokens.weight"])
    assert torch.equal(state["layers.0.ffn.down.weight"], theirs["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(checkpoint.DamagedError, match="has no tensor model.layers.0.mixer.q.weight"):
        checkpoint.read({"model": {"layers.0.mixer.q.weight": torch.empty(32, 32)}}, saved, alone=True)


def test_parameters_that_nothing_begins_from_are_named(tmp_path):
    folder = write(tmp_path / "moe", MOE | {"architectures": ["Qwen3MoeForCausalLM"]})
    before = Published(folder).model
    settings = ConvertSettings(mixer="gated_deltanet", every=2)
    after, layers = converted(before, settings)
    assert layers == [0]
    assert lost(before, layers, after, settings) == ["layers.0.mixer.q_norm.weight", "layers.0.mixer.k_norm.weight"]
    beside = replace(settings, window=4)
    assert lost(before, layers, converted(before, beside)[0], beside) == []


def logits(model, tokens):
    return model(tokens, Whole.of(torch.arange(tokens.shape[1])[None])).logits


def begun(folder, place, settings):
    """The converted model with its first weights, in fp64, and the model before it."""
    before = Published(folder).model
    after, layers = converted(before, settings)
    weights = ConvertedWeights(folder, before, after, layers, seed=7, part=part_of(settings))
    saved = conversion.write(weights, place, {"config.yaml": "{}\n"}, lambda name: None)
    models = []
    for section, path in ((after, saved), (before, folder)):
        models.append(Decoder.load(section, path).model.double())
        models[-1].compute = torch.float64
    return *models, layers


def check_it_begins_as_the_windowed_model(folder, place, settings):
    hybrid, parent, layers = begun(folder, place, settings)
    tokens = torch.randint(3, 90, (1, 23), generator=torch.Generator().manual_seed(0))
    whole = logits(parent, tokens)
    for i in layers:
        parent.layers[str(i)].mixer.window = settings.window
    torch.testing.assert_close(logits(hybrid, tokens), logits(parent, tokens), atol=1e-12, rtol=0)
    assert (whole - logits(parent, tokens)).abs().max() > 1e-3  # so that the window is seen at all
    return hybrid


@pytest.mark.parametrize("mixer", ["kda", "linear", None])
def test_a_layer_with_a_window_begins_as_its_attention_within_it(folder, tmp_path, mixer):
    settings = ConvertSettings(mixer=mixer, window=5, every=3)
    hybrid = check_it_begins_as_the_windowed_model(folder, tmp_path / "run", settings)
    assert all((hybrid.layers[i].beside is None) == (mixer is None or i == "2") for i in "012")
    if mixer is not None:
        beside, q = hybrid.layers["0"].beside, hybrid.layers["0"].mixer.q.weight
        assert beside.out.weight.abs().max() == 0 and torch.equal(beside.qkv.weight[:32], q)


def test_a_mutation_that_lets_the_mixer_beside_speak_at_once_is_seen(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "zeros_like", lambda x: x)
    with pytest.raises(AssertionError):
        check_it_begins_as_the_windowed_model(folder, tmp_path / "run", ConvertSettings(mixer="gla", window=5, every=3))


class Few:
    """Two packed sequences a step, as `data.batches.Batches` gives them."""

    def batch(self, seed, step):
        draw = np.random.default_rng([seed, step])
        tokens = draw.integers(3, 90, (2, 64))
        starts = np.arange(64)[None] % np.array([[40], [64]]) == 0
        masked = draw.random((2, 64)) < 0.1
        targets = np.where(masked, -100, np.roll(tokens, -1, axis=1))
        return [Packed(*each) for each in zip(tokens, targets, starts, strict=True)]


def test_a_score_is_what_the_window_of_one_layer_costs(folder, monkeypatch):
    monkeypatch.setattr(layer_scores, "TOKENS", 256)
    found = layer_scores.score(folder, Published(folder).model, [0, 2], 5, Few(), seed=4)
    theirs = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, attn_implementation="eager"))
    theirs.load_state_dict({n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()})

    def mean(windowed):
        nats, targets = 0.0, 0
        for s in (s for step in range(2) for s in Few().batch(4, step)):
            document = torch.from_numpy(np.cumsum(s.starts))
            seen = torch.ones(64, 64).tril().bool() & (document[:, None] == document)
            hidden = {i: torch.where(seen, 0.0, -torch.inf) for i in range(3)}
            hidden[windowed] = torch.where(seen & torch.ones(64, 64).triu(-4).bool(), 0.0, -torch.inf)
            places = torch.from_numpy(s.positions)[None]
            x = theirs.model.embed_tokens(torch.from_numpy(s.tokens)[None])
            turns = theirs.model.rotary_emb(x, places)
            for i, layer in enumerate(theirs.model.layers):
                x = layer(x, attention_mask=hidden[i][None, None], position_ids=places, position_embeddings=turns)
            out, asked = theirs.lm_head(theirs.model.norm(x))[0], torch.from_numpy(s.targets)
            nats += F.cross_entropy(out, asked, reduction="sum").item()
            targets += int((asked != -100).sum())
        return nats / targets

    with torch.no_grad():
        want = {i: mean(i) - mean(-1) for i in (0, 2)}
    assert found == pytest.approx(want, abs=2e-6) and all(abs(each) > 2e-5 for each in want.values())


def test_the_layers_that_a_window_costs_the_most_stay():
    settings = ConvertSettings(mixer="gla", every=2, by="score")
    assert staying(settings, [0, 1, 2, 5]) == [1, 5]
    assert staying(settings, [0, 1, 2, 5], [0.3, 0.1, 0.0, 0.2]) == [0, 5]


def test_layers_whose_attention_sees_no_farther_are_left_alone(folder):
    after, layers = converted(Published(folder).model, ConvertSettings(window=8, every=3))
    assert layers == [0, 1]
    with pytest.raises(ValueError, match="convert.keep=.0.: must be some of 2, the layers of attention"):
        converted(after, ConvertSettings(window=8, keep=[0]))
    assert converted(after, ConvertSettings(mixer="gla", window=4, keep=[]))[1] == [0, 1, 2]
    only, _ = converted(after, ConvertSettings(window=8, keep=[]))
    with pytest.raises(ValueError, match="convert.window=8: must be less than that of the attention in every layer"):
        converted(only, ConvertSettings(window=8))


REFUSED = [
    ({"mixer": "mamba"}, "convert.mixer=mamba: must be one of deltanet, gated_deltanet, gla, kda, linear, retnet: no"),
    ({"mixer": "attention"}, "convert.mixer=attention: must be one of"),
    ({"mixer": "gla", "every": 1}, "convert.every=1: must leave a layer to convert, of the layers 0, 1, 2"),
    ({"mixer": "gla", "keep": [0, 1, 2]}, "convert.keep=[0, 1, 2]: must leave a layer to convert"),
    ({"mixer": "gla", "keep": [3]}, "convert.keep=[3]: must be some of 0, 1, 2, the layers of attention"),
    ({"mixer": "gla", "options": {"heads": 2}}, "convert.options.heads: must not be given: it is that of the attent"),
    ({"mixer": "gla", "options": {"konv": 2}}, "convert.options.konv: no such option of gla; accepts conv, conv_bias,"),
    ({"mixer": "gla", "options": {"conv": 0}}, "convert.options.conv=0: must be at least 1"),
]


@pytest.mark.parametrize(("settings", "line"), REFUSED)
def test_a_conversion_that_cannot_be_is_one_line_with_its_key(folder, settings, line):
    with pytest.raises(ValueError) as refused:
        converted(Published(folder).model, ConvertSettings(**settings))
    assert str(refused.value).startswith(line)


def test_a_model_without_softmax_attention_is_refused(folder):
    after, _ = converted(Published(folder).model, ConvertSettings(mixer="gla", keep=[]))
    with pytest.raises(ValueError, match="convert.mixer=gla: must be null: no layer of the model is softmax attention"):
        converted(after, ConvertSettings(mixer="gla"))
    for wrong, line in (
        ({"keep": [0]}, "convert.keep=[0]: must come with convert.mixer or convert.window"),
        ({"by": "score"}, "convert.by=score: must come with convert.mixer or convert.window"),
        ({"by": "size", "window": 4}, "convert.by=size: must be one of place, score"),
        ({"options": {"conv": 2}, "window": 4}, "convert.options={'conv': 2}: must come with convert.mixer"),
        ({"window": 0}, "convert.window=0: must be at least 1"),
    ):
        with pytest.raises(ValueError) as refused:
            ConvertSettings(**wrong)
        assert str(refused.value) == line
