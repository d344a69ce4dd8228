"""A conversion as a user meets it: a published Transformer in, a hybrid out, and mistakes that cost one line."""

import json
import re
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from launch.cli import main
from launch.preflight.check import check_run
from launch.preflight.configure import configure
from launch.run.checkpoints import checkpoint_of
from launch.run.export import written
from models.sequence import Whole
from tests.jobs import overrides
from tests.launch.test_cli import records
from tests.published_folder import LLAMA, write
from train.checkpoints import checkpoint
from train.checkpoints.hf_reader import Published
from train.conversion import ConvertedWeights, converted
from train.conversion import write as convert
from train.distill_settings import ConvertSettings
from train.inference.decode import Decoder

pytestmark = pytest.mark.e2e

FEW = ["cluster.workers=1", "evaluate.parts=[loss]", "evaluate.tokens=1200"]
ALIGN, MATCH = "{length: 96, tokens: 1500, distill: hidden}", "{length: 96, tokens: 1100, distill: logits, lr: 1e-3}"


def given(place) -> list[str]:
    return [o for o in overrides(place) if not o.startswith("model")] + FEW


def chain(place, *more: str) -> list[str]:
    return [
        *given(place),
        "experiment=convert",
        "convert.mixer=gla",
        "convert.window=null",
        f"init_from={place / 'llama'}",
        "convert.every=2",
        *more,
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("conversion")
    write(place / "llama", LLAMA | {"max_position_embeddings": 96})
    return place


@pytest.fixture(scope="module")
def hybrid(place):
    run = place / "hybrid"
    assert main(["train", *chain(place, f"stages=[{ALIGN}, {MATCH}]", f"run.dir={run}")]) == 0
    return run


def weights(path):
    state = {name: torch.empty(shape) for name, (shape, _) in checkpoint.manifest(path)["model"].items()}
    checkpoint.read({"model": state}, path, alone=True)
    return state


def test_the_mixers_are_aligned_then_all_of_the_model_learns(hybrid):
    began, aligned, matched = (
        checkpoint.newest(hybrid / name / "checkpoints", print) for name in ("converted", "1-96", "2-96")
    )
    saved = [OmegaConf.load(path / "config.yaml") for path in (began, aligned, matched)]
    assert [list(c.model.pattern) for c in saved] == 3 * [["attn_gla", "attn"]]
    assert [c.train.distill.target for c in saved[1:]] == ["hidden", "logits"]
    assert [c.train.init_optimizer for c in saved[1:]] == ["reset", "reset"]
    assert [c.convert.mixer for c in saved[1:]] == [None, None]
    first, second, third = map(weights, (began, aligned, matched))
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved == {name for name in first if name.startswith("layers.0.mixer.")}
    assert all(not torch.equal(second[name], third[name]) for name in second)
    losses = [r["loss"] for r in records(hybrid / "1-96")]
    assert losses[-1] < losses[0] < 5 and "distill_loss" in records(hybrid / "2-96")[0]
    found = json.loads((hybrid / "extension.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == ["before", "converted", "1-96", "2-96"]
    assert all(stage["loss"]["loss"] > 0 for stage in found["stages"])


def test_what_comes_out_is_a_run_and_a_chain_that_goes_on(hybrid, place):
    child = configure([*given(place), f"init_from={hybrid}", "train.steps=1"])
    assert check_run(child, lambda line: None).init_from == checkpoint_of(str(hybrid))
    mtimes = [(hybrid / name / "metrics.jsonl").stat().st_mtime for name in ("1-96", "2-96")]
    longer = f"stages=[{ALIGN}, {MATCH}, {{length: 192, tokens: 384, positions: {{base: 40000}}}}]"
    assert main(["train", f"resume={hybrid}", longer]) == 0
    assert [(hybrid / name / "metrics.jsonl").stat().st_mtime for name in ("1-96", "2-96")] == mtimes
    saved = OmegaConf.load(hybrid / "3-192" / "config.yaml")
    assert saved.train.init_optimizer == "keep" and saved.train.distill.teacher is None
    assert saved.model.blocks.attn.mixer.positions.base == 40000


def test_a_mixer_beside_a_window_in_the_layers_that_need_it_least(place, capsys):
    run = place / "beside"
    asked = [o for o in chain(place, f"stages=[{ALIGN}]", f"run.dir={run}") if o != "convert.mixer=gla"]
    asked += ["convert.mixer=kda", "convert.window=8", "convert.by=score"]
    assert main(["train", *asked]) == 0
    out = " ".join(capsys.readouterr().err.split())
    scores = re.search(r"nats a token that the window costs, by layer: 0: (\S+), 1: (\S+)", out)
    kept = int(float(scores[2]) > float(scores[1]))
    assert f"converts layers {1 - kept} of 2: softmax attention sees 8 tokens beside KimiDeltaAttention" in out
    kind = "beside=KimiDeltaAttention: none of .* has KimiDeltaAttention beside Attention in this pattern"
    assert re.search(f"not exported: model.blocks.attn_kda.{kind}", out)
    saved = OmegaConf.load(run / "config.yaml").convert
    assert saved.by == "score" and saved.keep == [kept]
    began, aligned = (weights(checkpoint.newest(run / name / "checkpoints", print)) for name in ("converted", "1-96"))
    moved = {name for name in began if not torch.equal(began[name], aligned[name])}
    assert moved == {n for n in began if n.startswith((f"layers.{1 - kept}.mixer.", f"layers.{1 - kept}.beside."))}
    assert not began[f"layers.{1 - kept}.beside.out.weight"].any()
    assert 0 < records(run / "1-96")[0]["loss"] < 1  # a window does more than no mixer at all


def test_windows_alone_go_out_as_what_transformers_reads(place):
    run = place / "windows"
    asked = [o for o in chain(place, f"stages=[{MATCH}]", f"run.dir={run}") if o != "convert.mixer=gla"]
    assert main(["train", *asked, "convert.mixer=null", "convert.window=8"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(run / "export").eval()
    saved = checkpoint_of(str(run))
    tokens = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    ours = Decoder.load(OmegaConf.to_container(OmegaConf.load(run / "1-96" / "config.yaml").model), saved).model
    with torch.no_grad():
        found, want = ours(tokens, Whole.of(torch.arange(60)[None])).logits, theirs(tokens).logits
        ours.layers["0"].mixer.window = None
        far = ours(tokens, Whole.of(torch.arange(60)[None])).logits
    assert (found - want).norm() < 1e-5 * want.norm() < (far - want).norm()


def test_delta_layers_in_the_place_of_gated_attention_go_out_as_what_transformers_reads(tmp_path):
    sizes = LLAMA | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "head_dim": 8}
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    rest = {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "layer_types": 2 * ["full_attention"]}
    folder = write(tmp_path / "gated", sizes | heads | rest)
    before, settings = Published(folder).model, ConvertSettings(mixer="gated_deltanet", every=2)
    settings = replace(settings, options={"norm_eps": before["norm_eps"]})
    after, layers = converted(before, settings)
    weights = ConvertedWeights(folder, before, after, layers, seed=7)
    model = {"model": after, "data": {"max_length": 64}}
    saved = convert(weights, tmp_path / "run", {"config.yaml": OmegaConf.to_yaml(model)}, lambda name: None)
    written(saved, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert theirs.config.layer_types == ["linear_attention", "full_attention"]
    tokens = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Decoder.load(after, saved).model(tokens, Whole.of(torch.arange(60)[None])).logits
        want = theirs(tokens).logits
    assert (found - want).norm() < 1e-5 * want.norm()


@pytest.mark.composes
def test_the_teachers_memory_is_counted_before_a_process_starts(place, capsys):
    asked = [*overrides(place, "model=llama_tiny", "model.blocks.attn.mixer.heads=2"), "cluster.workers=1"]
    asked = [o for o in asked if not o.startswith(("model.blocks.g", "model.pattern"))]
    most = [*asked, "parallel.machine.memory=0.0135"]
    assert main(["plan", *most]) == 0, capsys.readouterr().err
    assert "teacher" not in capsys.readouterr().out
    write(place / "large", LLAMA | {"num_hidden_layers": 6, "hidden_size": 96, "intermediate_size": 1024})
    taught = f"train.distill.teacher={place / 'large'}"
    assert main(["plan", *asked, taught]) == 0
    assert re.search(r"MB  teacher$", capsys.readouterr().out, re.MULTILINE)
    assert main(["plan", *most, taught]) == 2
    assert re.search(r"a rank can hold .* of which teacher are \S+ MB; .*\n$", capsys.readouterr().err)


@pytest.mark.slow
def test_an_alignment_that_is_resumed_is_one_that_was_never_stopped(hybrid, place):
    asked = [*given(place), f"init_from={hybrid / 'converted'}", f"train.distill.teacher={place / 'llama'}"]
    asked += ["train.distill.target=hidden", "schedule=constant", "tracking=none"]
    assert main(["train", *asked, "train.steps=4", f"run.dir={place / 'whole'}"]) == 0
    assert main(["train", *asked, "train.steps=2", f"run.dir={place / 'halves'}"]) == 0
    assert main(["train", f"resume={place / 'halves'}", "train.steps=4"]) == 0
    runs = [records(place / name) for name in ("whole", "halves")]
    assert [r["loss"] for r in runs[0]] == [r["loss"] for r in runs[1]] and len(runs[0]) == 4
    one, other = (weights(checkpoint_of(str(place / name))) for name in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


REFUSED = {
    "convert.mixer=mamba2": "convert.mixer=mamba2: must be one of deltanet, gated_deltanet, gla, kda, linear, retnet",
    "convert.keep=[7]": "convert.keep=[7]: must be some of 0, 1, the layers of attention",
    "convert.every=0": "convert.every=0: must be at least 1",
    "convert.window=0": "convert.window=0: must be at least 1",
    "convert.by=size": "convert.by=size: must be one of place, score",
    "convert.options={heads: 2}": "convert.options.heads: must not be given: it is that of the attention, 4",
    "train.init_optimizer=keep": "train.init_optimizer=keep: must be reset with convert.mixer=gla",
    "stages=[{length: 96, tokens: 100, distill: both}]": "stages[0].distill=both: must be one of logits, hidden",
    "stages=[{length: 96, tokens: 500}, {length: 96, tokens: 500, distill: hidden}] train.distill.teacher=nowhere": (
        "stages[1]: train.distill.teacher=nowhere: no such run"
    ),
    "parallel.tensor=2 cluster.workers=2": "stages[0]: parallel.tensor=2: must be 1 with train.distill.teacher",
    "train.span_tokens=48": "stages[0]: train.span_tokens=48: must be null with train.distill.teacher",
    "init_from=nowhere": "init_from=nowhere: no such run",
    "stages=[] init_from=null": "convert.mixer=gla: must be null without stages",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_conversion_that_cannot_be_costs_one_line_and_writes_nothing(place, capsys, wrong):
    words = wrong.split(" ") if wrong.count("stages=[{") == 0 else wrong.replace("] train", "]\ntrain").split("\n")
    asked = chain(place, f"stages=[{ALIGN}]", f"run.dir={place / 'none'}")
    words = [wrong] if wrong.startswith("convert.options") else words
    assert main(["train", *asked, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"farspan train: {REFUSED[wrong]}") and err.count("\n") == 1, err
    assert not (place / "none").exists()
