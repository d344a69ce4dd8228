"""Context extension as a user meets it: a chain of stages, stopped and resumed, and mistakes that cost one line."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from launch.cli import main
from launch.preflight.check import check_run
from launch.preflight.configure import configure
from launch.run.checkpoints import checkpoint_of
from tests.jobs import overrides
from tests.launch.test_cli import finish, numbers, records, start, wait_for_step
from tests.published_folder import LLAMA, write
from train.checkpoints import checkpoint

pytestmark = pytest.mark.e2e

# A Qwen3-Next-like model, so that the last stage can be exported.
MODEL = ["model=qwen3_next_tiny", "model.dim=32", "model.layers=2", "model.pattern=[gdn,attn]"]
MODEL += ["model.blocks.gdn.ffn.num_experts=4", "model.blocks.gdn.ffn.top_k=2", "model.blocks.gdn.ffn.hidden=16"]
MODEL += ["model.blocks.gdn.ffn.shared_hidden=16", "model.blocks.attn.mixer.head_dim=16"]
MODEL += ["model.blocks.attn.mixer.positions={base: 10000, fraction: 0.5}"]
ONE = ["cluster.workers=1", "cluster.threads=1"]
STAGES = "stages=[{length: 192, tokens: 1500, positions: {base: 40000}}, {length: 384, tokens: 1920, lr: 2e-3}]"
QUICK = ["evaluate.samples=1", "evaluate.depths=2", "evaluate.tokens=1200", "evaluate.lengths=[192,384]"]


def given(place: Path) -> list[str]:
    """Of every run here but its model, which an extension has from its parent."""
    return [o for o in overrides(place) if not o.startswith("model")] + ONE


def chain(place: Path, *more: str) -> list[str]:
    return [*given(place), "experiment=extend_context", f"init_from={place / 'base'}", STAGES, *QUICK, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, and a run of three steps at 96 tokens on it."""
    place = tmp_path_factory.mktemp("extension")
    finish(start(place, "train", *given(place), *MODEL, "train.steps=3", f"run.dir={place / 'base'}"))
    return place


@pytest.fixture(scope="module")
def extended(place):
    run = place / "chain"
    said = finish(start(place, "train", *chain(place, f"run.dir={run}")))
    return run, said


def test_a_chain_is_a_run_a_stage_each_from_the_one_before(extended, place):
    run, said = extended
    saved = [OmegaConf.load(run / name / "config.yaml") for name in ("1-192", "2-384")]
    assert [c.data.max_length for c in saved] == [192, 384] and [c.stages for c in saved] == [[], []]
    assert [c.model.blocks.attn.mixer.positions.base for c in saved] == [40000.0, 40000.0]  # null: as it was before
    assert all(c.model.blocks.attn.mixer.positions.fraction == 0.5 for c in saved)
    assert Path(saved[0].init_from) == place / "base" / "checkpoints" / "step-3"
    assert Path(saved[1].init_from) == run / "1-192" / "checkpoints" / "step-4"
    assert [c.train.init_optimizer for c in saved] == ["keep", "keep"] and saved[0].seed != saved[1].seed
    assert {c.tracking.group for c in saved} == {"chain"} and saved[1].run.name == "chain/2-384"
    assert [r["tokens"] for r in records(run / "2-384")][-1] == 1920
    last = run / "2-384" / "checkpoints" / "step-5"
    assert checkpoint_of(str(run)) == last  # of generate, evaluate and export
    child = configure([*given(place), f"init_from={run}", "train.steps=1"])
    assert child.model["blocks"]["attn"]["mixer"]["positions"]["base"] == 40000
    assert check_run(child, lambda line: None).init_from == last
    assert "2 stages, all checked before the first starts" in said
    assert "1-192: the slowest pair turns by" in said and "base 10,000 becomes 40,000" in said
    assert "base 40,000 as before" in said and "exact)" in said


def test_the_learning_rate_begins_anew_in_each_stage(extended):
    rates = [[r["lr"] for r in records(extended[0] / name)] for name in ("1-192", "2-384")]
    peaks = 1e-3, 2e-3
    for found, peak in zip(rates, peaks, strict=True):
        warmed = [rate / peak for rate in found]
        assert 0.5 < max(warmed) <= 1 and warmed[-1] < 0.3  # a cosine of its own, to a tenth
    assert rates[1][0] > rates[0][-1]


def test_the_optimizers_state_is_carried_from_stage_to_stage(extended, place):
    """The second stage alone: as the chain has it where the state is kept; without, another from the second step on."""
    run, _ = extended
    alone = [f"init_from={run / '1-192'}", "data.max_length=384", "train.tokens=1920", "seed=2", "optimizer.lr=2e-3"]
    alone += ["schedule=cosine", "schedule.warmup=0.1"]
    found = {}
    for keep in ("keep", "reset"):
        finish(start(place, "train", *given(place), *alone, f"train.init_optimizer={keep}", f"run.dir={place / keep}"))
        found[keep] = numbers(place / keep)
    ours = numbers(run / "2-384")
    assert ours == found["keep"]
    assert ours[0][2] == found["reset"][0][2] and ours[1][2] != found["reset"][1][2]


def test_what_is_measured_before_and_after_each_stage(extended):
    run, said = extended
    found = json.loads((run / "extension.json").read_text())
    assert found["trained"] == 96 and found["lengths"] == [192, 384]
    assert [stage["name"] for stage in found["stages"]] == ["before", "1-192", "2-384"]
    for stage, trained in zip(found["stages"], (96, 192, 384), strict=True):
        assert stage["read"] == 384 and stage["needle"]["lengths"] == [192, 384]
        assert len(stage["needle"]["logprob"][1]) == 2 and stage["positions"][-1]["from"] == 256
        assert stage["extrapolation"]["trained"] == trained
    assert (run / "extension.png").read_bytes()[:4] == b"\x89PNG"
    assert "before" in said and "needle at 384" in said and "loss from 256 on" in said


def test_the_export_has_the_last_length_and_the_last_positions_and_the_same_logits(extended):
    transformers = pytest.importorskip("transformers", minversion="5")
    from models.sequence import Whole
    from train.instantiate import construct

    run, _ = extended
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32).eval()
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["max_position_embeddings"] == 384 and config["rope_parameters"]["rope_theta"] == 40000.0
    assert json.loads((run / "export" / "tokenizer_config.json").read_text())["model_max_length"] == 384
    path = checkpoint.newest(run / "2-384" / "checkpoints", print)
    ours = construct(OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))["model"])
    weights = ours.state_dict()
    checkpoint.read({"model": weights}, path, alone=True)
    ours.load_state_dict(weights)
    tokens = torch.randint(0, 256, (1, 384), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours.eval()(tokens, Whole.of(torch.arange(384).expand(1, 384))).logits
        expected = theirs(tokens).logits
    far = logits[:, 320:], expected[:, 320:]  # at positions that the parent never saw
    assert (far[0] - far[1]).norm() <= 1e-5 * far[1].norm()


@pytest.mark.slow
def test_a_stopped_chain_goes_on_with_the_stage_that_was_reached(extended, place):
    run = place / "stopped"
    process = start(place, "train", *chain(place, f"run.dir={run}"))
    wait_for_step(run / "2-384", 2, timeout=120)
    os.killpg(process.pid, signal.SIGINT)
    said = finish(process)
    assert f"farspan train resume={run} goes on with the stage that was reached" in said
    first = (run / "1-192" / "metrics.jsonl").read_text()
    reached = len(records(run / "2-384"))
    again = finish(start(place, "train", f"resume={run}"))
    assert "stage 2-384" in again or reached == 5
    assert "stage 1-192" not in again and (run / "1-192" / "metrics.jsonl").read_text() == first
    assert numbers(run / "2-384") == numbers(extended[0] / "2-384")
    names = [stage["name"] for stage in json.loads((run / "extension.json").read_text())["stages"]]
    assert names == ["before", "1-192", "2-384"]
    finish(start(place, "train", f"resume={run}"))  # what is done is not done again
    assert numbers(run / "2-384") == numbers(extended[0] / "2-384")


@pytest.mark.slow
def test_carried_states_of_a_stage_whose_gradients_end_at_spans(extended, place):
    """Sequences of 192 tokens, 96 at a time through the same states: the same loss at first, and other gradients."""
    run = place / "carried"
    spans = "train.span_tokens=96", "train.span_gradient=truncated"
    stage = "stages=[{length: 192, tokens: 1500, positions: {base: 40000}}]"
    finish(start(place, "train", *chain(place, stage, *spans, "evaluate.parts=[positions]", f"run.dir={run}")))
    ours, whole = records(run / "1-192"), records(extended[0] / "1-192")
    assert ours[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert ours[0]["grad_norm"] != pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    assert ours[-1]["tokens"] == whole[-1]["tokens"]


@pytest.mark.slow
def test_a_stop_while_a_stage_is_measured_and_a_stage_that_fails_say_how_to_go_on(place, capsys, monkeypatch):
    from launch.extend import chain as chains

    run, measured, trained = place / "measured", chains.measured, chains.run
    calls = []

    def stopped(config, found, *more):
        calls.append(found)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(config, found, *more)

    one = "stages=[{length: 192, tokens: 800}, {length: 192, tokens: 800}]"
    monkeypatch.setattr(chains, "measured", stopped)
    assert main(["train", *chain(place, one, "evaluate.parts=[positions]", f"run.dir={run}")]) == 0
    on = f"farspan train resume={run} goes on with the stage that was reached"
    assert on in capsys.readouterr().err and len(calls) == 2 and not (run / "2-192").exists()
    monkeypatch.setattr(chains, "run", lambda *given, **more: chains.RunResult(1, run / "2-192", False, "broke"))
    assert main(["train", f"resume={run}"]) == 1
    assert on in capsys.readouterr().err and calls[2] == calls[1]  # what was stopped, and no stage again
    monkeypatch.setattr(chains, "run", trained)
    before = (run / "1-192" / "metrics.jsonl").read_text()
    assert main(["train", f"resume={run}"]) == 0
    assert (run / "1-192" / "metrics.jsonl").read_text() == before and len(calls) == 4
    assert (run / "2-192" / "summary.json").exists() and (run / "export").exists()


@pytest.mark.slow
def test_a_folder_of_hugging_faces_is_extended_and_written_back_longer(place, tmp_path, capsys):
    write(tmp_path / "llama", LLAMA)
    yarn = "{_target_: models.positions.YaRN, factor: 2, trained_length: 512}"
    asked = [
        *given(place),
        "experiment=extend_context",
        f"init_from={tmp_path / 'llama'}",
        f"run.dir={tmp_path / 'run'}",
    ]
    asked += [
        f"stages=[{{length: 1024, tokens: 2000, positions: {yarn}}}]",
        "evaluate.samples=1",
        "evaluate.tokens=2000",
    ]
    assert "train.init_optimizer=keep: must be reset, " in refused(capsys, "train", *asked)
    assert main(["train", *asked, "train.init_optimizer=reset"]) == 0
    found = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert found["max_position_embeddings"] == 1024 and found["rope_parameters"]["rope_type"] == "yarn"
    assert found["rope_parameters"]["original_max_position_embeddings"] == 512
    measured = json.loads((tmp_path / "run" / "extension.json").read_text())
    assert [stage["needle"]["lengths"] for stage in measured["stages"]] == [[512, 1024], [512, 1024]]


def refused(capsys, verb, *arguments):
    assert main([verb, *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"farspan {verb}: ") and err.count("\n") == 1, err
    return err.removeprefix(f"farspan {verb}: ")


YARN = "_target_: models.positions.YaRN, factor: 2, trained_length: 96"
REFUSED = {
    "stages=[{length: 64, tokens: 100}]": "stages[0].length=64: must be at least 96, as those of init_from=",
    "stages=[{length: 384, tokens: 1000}, {length: 192, tokens: 1000}]": "stages[1].length=192: must be at least 384",
    "stages=[{length: 0, tokens: 100}]": "stages[0].length=0: must be above 0",
    "stages=[{length: 192}]": "stages[0].tokens: missing",
    "stages=[{length: 192, tokens: 100, rope: 1}]": "stages[0].rope: no such key",
    f"stages=[{{length: 384, tokens: 1000, positions: {{{YARN}}}}}]": "stages[0].positions=YaRN(",
    "stages=[{length: 192, tokens: 1000, positions: {_target_: models.positions.Interpolated, factor: 1.5}}]": (
        "stages[0].positions=Interpolated("
    ),
    "stages=[{length: 192, tokens: 1000, positions: {_target_: models.positions.Randomized, longest: 100}}]": (
        "stages[0].positions=Randomized("
    ),
    "stages=[{length: 192, tokens: 1000, positions: {bsae: 5}}]": (
        "stages[0]: model.blocks.attn.mixer.positions.bsae: no such key"
    ),
    "stages=[{length: 192, tokens: 1000, positions: 4}]": "stages[0].positions=4: must be an object",
    "stages=[{length: 192, tokens: 1000, weights: {text: 1}}]": "stages[0].weights: must be null, data has no sources",
    "stages=[{length: 192, tokens: 1000, batch_tokens: 200}]": "stages[0]: train.batch_tokens=200: expected a multiple",
    "init_from=null": "init_from: missing; stages extend",
    "train.tokens=500": "train.tokens=500: must not be given with stages",
    "cluster=ray": "cluster=ray: must be none or local with stages",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_extended_costs_one_line_and_writes_nothing(override, place, capsys, tmp_path):
    said = refused(capsys, "train", *chain(place, f"run.dir={tmp_path / 'run'}"), override)
    assert said.startswith(REFUSED[override])
    assert not (tmp_path / "run").exists()


def test_positions_for_a_model_without_any(place, capsys, tmp_path):
    recurrent = [
        "model=qwen3_next_tiny",
        "model.pattern=[gdn]",
        "model.dim=32",
        "train.steps=1",
        f"run.dir={tmp_path}/r",
    ]
    finish(start(tmp_path, "train", *given(place), *recurrent))
    said = refused(capsys, "train", *chain(place, f"init_from={tmp_path}/r", f"run.dir={tmp_path}/run"))
    assert said == "stages[0].positions: must be null, no layer of the model has rotary positions\n"


def test_a_chain_is_no_member_of_a_sweep_and_no_single_run_becomes_one(extended, place, capsys, tmp_path):
    sweep = chain(place, f"run.dir={tmp_path / 'sweep'}", "optimizer.lr=1e-3,2e-3")
    assert main(["sweep", *sweep]) == 2
    assert "farspan sweep: member 1 (optimizer.lr=0.001): stages: must be [] but for" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    run, _ = extended
    assert refused(capsys, "train", f"resume={run / '1-192'}", STAGES).startswith(
        "stages: must be [], it is a single run"
    )
    assert refused(capsys, "train", f"resume={run}", "stages=[]").startswith("stages: must be the stages of ")
    changed = "stages=[{length: 192, tokens: 3000}, {length: 384, tokens: 1920}]"
    assert refused(capsys, "train", f"resume={run}", changed).startswith("stages[0]: must be as it was")


def test_a_plan_of_a_chain_is_its_stages(place, capsys):
    assert main(["plan", *chain(place)]) == 0
    said = capsys.readouterr().out
    assert "trained on 96 tokens" in said and "1-192" in said and "2-384" in said and "base 10,000 becomes" in said
