"""The command line as a user meets it: jobs that run, stop, break and go on; mistakes that cost one line."""

import contextlib
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.cli import main
from tests import warm
from tests.jobs import overrides
from tests.launch.processes import wait_for
from tests.wandb_file import config, history, summary
from train import tracking
from train.checkpoints import checkpoint

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, its store, and room for run folders."""
    return tmp_path_factory.mktemp("cli")


def start(place: Path, *arguments: str, cold: bool = False) -> subprocess.Popen:
    """A `farspan`, warm; `cold`: a fresh interpreter, for what concerns start-up, signals and processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    env.pop("WANDB_API_KEY", None)
    return subprocess.Popen(
        [*(warm.COLD if cold else warm.command()), *arguments],
        cwd=place,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 150) -> str:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out + err


def train(place: Path, *more: str, code: int = 0, cold: bool = False) -> str:
    return finish(start(place, "train", *overrides(place), *more, cold=cold), code)


def records(run: Path) -> list[dict]:
    return tracking.records(run / "metrics.jsonl")


def wait_for_step(run: Path, step: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached within {timeout} s")


def numbers(run: Path) -> list[tuple]:
    """What must be the same, bit for bit, however often a run was interrupted."""
    return [(r["step"], r["tokens"], r["loss"], r["grad_norm"], r["lr"], r["expert_load"]) for r in records(run)]


STEPS = 16
TOLD = ["train.mfu=true", "tracking.mode=offline", "tracking.norms=true", "train.evaluate_every=3840"]


@pytest.fixture(scope="module")
def uninterrupted(place):
    run = place / "uninterrupted"
    said = train(place, f"run.dir={run}", f"train.steps={STEPS}", "train.checkpoint_every=1920", *TOLD)
    return run, said


def test_a_job_trains_and_leaves_a_complete_record(uninterrupted):
    run, said = uninterrupted
    logged = records(run)
    assert [r["step"] for r in logged] == list(range(1, STEPS + 1))
    assert logged[-1]["tokens"] == STEPS * 384
    assert logged[-1]["loss"] < logged[0]["loss"] - 1
    for key in (
        "balance_loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "memory_bytes",
        "expert_load",
        "seconds",
        "model_flops",
        "mfu",
    ):
        assert key in logged[3], key
    assert set(logged[3]["seconds"]) >= {"data", "plan", "forward", "backward", "optimizer", "wait", "logging"}
    for load in logged[3]["expert_load"].values():
        assert sum(load) == pytest.approx(1)
    assert "held-out loss, nats per byte" in said and "bigram" in said and f"resume={run}" in said
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-15", "step-16"]
    assert (run / "config.yaml").exists()
    assert [p.name for p in (run / "plans").iterdir()] == ["step-1.txt"]  # every step has the same


def test_every_logged_step_is_in_the_offline_wandb_file(uninterrupted):
    run, _ = uninterrupted
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = {int(row["step"]): row for row in history(file)}
    for r in records(run):
        assert float(rows[r["step"]]["loss"]) == r["loss"]
        assert int(rows[r["step"]]["tokens"]) == r["tokens"]


def test_wandb_has_what_a_pretrainer_looks_for(uninterrupted):
    run, _ = uninterrupted
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    counts, model = config(file)["parameters"], config(file)["model"]
    assert counts["total"] > counts["activated"] > counts["embedding"] == model["vocabulary"] * model["dim"]
    logged = records(run)
    for r in logged:
        squares = sum(norm**2 for norm in r["gradient_norms"].values())
        assert squares**0.5 == pytest.approx(r["grad_norm"], rel=1e-5)
        assert r["gradient_norms"].keys() == r["weight_norms"].keys() >= {"embedding", "layers.0", "layers.1", "head"}
    heldout = [r for r in logged if "heldout_loss" in r]
    best = min(heldout, key=lambda r: r["heldout_loss"])
    told = summary(file)
    assert len(heldout) > 1 and told["best/heldout_loss"] == best["heldout_loss"] and told["best/step"] == best["step"]
    for r in heldout:  # a byte a token
        assert r["heldout_bits_per_byte"] == pytest.approx(r["heldout_loss"] / math.log(2), rel=1e-12)
    (at_last,) = [row for row in history(file) if int(row["step"]) == STEPS]
    assert {"gradient_norms/layers.0", "weight_norms/head", "heldout_bits_per_byte"} <= at_last.keys()


def test_generate_continues_a_prompt(place, uninterrupted):
    run, _ = uninterrupted
    first, again = (finish(start(place, "generate", str(run), "prompt=alpha", "tokens=40", "seed=3")) for _ in range(2))
    assert first.startswith("alpha") and first == again and "Warning" not in first


@dataclass
class Interrupted:
    """A run that was broken in every way, and what was said and found each time."""

    run: Path
    in_use: list[str]  # refusals of commands beside it
    lost: str
    stopped: str
    saved: tuple[list[str], int]  # whole checkpoints then, and the steps that were logged
    damaged: str  # the name of a checkpoint
    ended: str


@pytest.fixture(scope="module")
def interrupted(place) -> Interrupted:
    """It loses a worker, is stopped by Ctrl-C, is killed, finds its newest checkpoint damaged; each time it goes on."""
    run = place / "interrupted"
    given = [*overrides(place), f"run.dir={run}", f"train.steps={STEPS}", "train.checkpoint_every=1920"]

    def further(steps: int) -> subprocess.Popen:
        """The run, so many steps after it has begun again."""
        before = logged()
        process = start(place, "train", f"resume={run}")
        wait_for_step(run, before + steps)
        return process

    def logged() -> int:
        return len((run / "metrics.jsonl").read_text().splitlines())

    def whole() -> list[str]:
        return [path.name for path in sorted(checkpoint.complete(run / "checkpoints"), key=checkpoint.step_of)]

    process = start(place, "train", *given)
    try:
        wait_for(lambda: run.exists() and (run / "checkpoints").exists() and whole() or process.poll() is not None, 90)
        workers = _workers(run)
        for each in workers:  # they would go on, at some cost, while others are refused
            os.kill(each, signal.SIGSTOP)
        in_use = []
        for more in (f"run.dir={run}", f"resume={run}"):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert main(["train", *overrides(place), more]) == 2
            in_use.append(said.getvalue())
        os.kill(max(workers), signal.SIGKILL)  # the last one started
        os.kill(min(workers), signal.SIGCONT)
        lost = finish(process, 1)
        process = further(random.randint(1, 2))
        process.send_signal(signal.SIGINT)
        stopped = finish(process, 0)
        saved = whole(), len(records(run))
        process = further(random.randint(1, 3))
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and every worker at once
        process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    newest = run / "checkpoints" / whole()[-1]
    (victim, *_) = newest.glob("*.distcp")
    with victim.open("rb+") as file:
        file.truncate(victim.stat().st_size // 2)
    (run / "checkpoints" / "step-17.partial").mkdir()
    ended = finish(start(place, "train", f"resume={run}"))
    assert victim.name in ended
    return Interrupted(run, in_use, lost, stopped, saved, newest.name, ended)


def test_a_run_folder_is_in_use_until_a_worker_that_dies_ends_the_run(interrupted):
    run, lost = interrupted.run, interrupted.lost
    assert all(f"run.dir={run}: in use by another run" in refusal for refusal in interrupted.in_use)
    assert "rank 1 was killed (SIGKILL)" in lost and f"farspan train resume={run} goes on from step-" in lost
    assert "Traceback" not in lost


def test_ctrl_c_saves_and_exits_with_zero(interrupted):
    said, (checkpoints, steps) = interrupted.stopped, interrupted.saved
    assert "stopping after this step" in said and f"resume={interrupted.run} goes on" in said
    assert 5 <= steps < STEPS and checkpoints[-1] == f"step-{steps}"


def test_a_damaged_checkpoint_is_passed_over_and_said(interrupted):
    said = interrupted.ended
    assert f"{interrupted.damaged} is damaged" in said and "step-17 was never completed" in said
    earlier = [name for name in interrupted.saved[0] if name != interrupted.damaged]
    assert any(re.search(rf", from \S*/{name}\b", said) for name in earlier), said


def test_a_run_goes_on_bit_for_bit_whatever_has_ended_it(interrupted, uninterrupted):
    run = interrupted.run
    assert numbers(run) == numbers(uninterrupted[0])
    assert _weights(run) == _weights(uninterrupted[0])
    assert [r["attempt"] for r in records(run)] == sorted(r["attempt"] for r in records(run))
    written = tracking.records(run / "metrics.jsonl", every_attempt=True)  # nothing is taken out of the record
    assert {r["attempt"] for r in written} == {1, 2, 3, 4} and len(written) > STEPS


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_begins_anew_where_it_is_told_to(place, uninterrupted):
    run = place / "anew"
    shutil.copytree(uninterrupted[0], run)
    held = sorted(path.name for path in (run / "checkpoints").iterdir())
    for path in (run / "checkpoints").iterdir():
        for victim in path.glob("*.distcp"):
            victim.write_bytes(victim.read_bytes()[:-9])
    assert "run.anew=true" in finish(start(place, "train", f"resume={run}"), 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == held
    said = finish(start(place, "train", f"resume={run}", "run.anew=true"))
    assert all(f"{name} is now {name}.aside" in said for name in held)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(
        [*held, *(f"{h}.aside" for h in held)]
    )
    assert [(r["step"], r["attempt"]) for r in records(run)] == [(step, 2) for step in range(1, STEPS + 1)]
    assert numbers(run) == numbers(uninterrupted[0])
    assert _weights(run) == _weights(uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM])
def test_a_signal_saves_and_exits_with_zero(place, uninterrupted, sent):
    run = place / sent.name
    process = start(place, "train", *overrides(place), f"run.dir={run}", f"train.steps={STEPS}")
    wait_for_step(run, 5)
    process.send_signal(sent)
    said = finish(process, 0)
    assert "stopping after this step" in said and f"resume={run} goes on" in said
    steps = len(records(run))
    assert 5 <= steps < STEPS
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{steps}"]
    finish(start(place, "train", f"resume={run}"))
    assert numbers(run) == numbers(uninterrupted[0])


@pytest.mark.slow
def test_the_default_cluster_is_a_ray_of_its_own(place, uninterrupted):
    """The same job on two Ray workers: the same numbers, nothing but our lines, nothing left behind."""
    run = place / "ray"
    said = train(
        place, f"run.dir={run}", f"train.steps={STEPS}", "cluster=local", "train.checkpoint_every=1920", cold=True
    )
    assert numbers(run) == numbers(uninterrupted[0])
    assert not [line for line in said.splitlines() if "ray" in line.lower().replace(str(run), "")], said


BAD = {
    "model.dmi=64": "model.dmi: no such key; nearest: model.dim",
    "+model.dmi=64": "model.dmi: no such key; nearest: model.dim",
    "++train.tokns=64": "train.tokns: no such key; nearest: train.tokens",
    "model=linear_moe_tny": "model=linear_moe_tny: no such option; accepts griffin_tiny, jamba_tiny,",
    "train.tokens=abc": "train.tokens=abc: expected a whole number",
    "optimizer.lr=fast": "optimizer.lr=fast: expected a number",
    "optimizer.lr=-1.0": "optimizer",
    "optimizer.no_decay=[vocb]": "optimizer.no_decay=vocb: must be one of batch, seq, embed, heads",
    "optimizer.fused=apex": "optimizer.fused=apex: NVIDIA's apex is not installed here",
    "optimizer=muon optimizer.momentum=1": "optimizer.momentum=1.0: must be at least 0 and below 1",
    "train.average=mean": "train.average=mean: must be one of none, ema, last; nearest: ema",
    "train.init_weights=average": "train.init_weights=average: must be raw without init_from",
    "train.init_optimizer=keep": "train.init_optimizer=keep: must be reset without init_from",
    "model.blocks.gla.mixer.heads=5": "model.blocks.gla.mixer.heads=5: must divide dim * expand_k=16",
    "model.blocks.attn.mixer.heads=5": "model.blocks.attn.mixer.heads=5: must divide dim=32",
    "model.blocks.gla.ffn.hidden=0": "hidden=0: must be at least 1",
    "model.blocks.gla.ffn.shared_hidden=-1": "shared_hidden=-1: must not be negative",
    "model.blocks.gla.mixer.conv=0": "model.blocks.gla.mixer.conv=0: must be at least 1",
    "model.blocks.gla.mixer.expand_k=0": "must divide dim * expand_k=0",
    "model.dim=0": "model.dim=0: must be at least 1",
    "model.vocabulary=-8": "model.vocabulary=-8: must be at least 1",
    "model.layers=0": "model.layers=0: must be at least 1",
    "seed=-1": "seed=-1: must not be negative",
    "seed=[": "seed=[: not an override that can be read",
    "model.pattern=[gla,foo]": "'foo' is not one of the blocks",
    "model.vocabulary=100": "model.vocabulary=100: the tokenizer has 257 tokens",
    "parallel.sequence=3": "parallel.sequence=3: must divide cluster.workers=2",
    "cluster.workers=25 data.max_length=24 train.batch_tokens=24": "parallel.sequence=25: must be at most 24, the "
    "tokens that such a group of ranks has to",
    "cluster.workers=6 parallel.transport.attention=ulysses": "ulysses: must share out heads=4, kv_heads=2 to 6 ranks, "
    "and cannot; gather, ring and usp can",
    "parallel.tensor=2 parallel.sequence=2": "parallel.sequence=2 × parallel.tensor=2: is 4, must be cluster.workers=2",
    "parallel.tensor=8 cluster.workers=8": "parallel.tensor=8: must divide the 2 heads of layers.0.mixer",
    "parallel.tensor=2 optimizer=muon optimizer.adamw=[]": "optimizer.adamw=[]: must have vocab with parallel.tensor=2",
    "cluster.device=cuda": "cluster.device=cuda: this machine has no CUDA device",
    "data.path=/no/such/place": "data.path=/no/such/place: no such file or folder",
    "data.max_length=100": "train.batch_tokens=384: expected a multiple of data.max_length=100",
    "resume=nowhere": "resume=nowhere: no such run",
    "init_from=nowhere": "init_from=nowhere: no such run",
    "scheduler.tokens_per_rank=10": "scheduler.tokens_per_rank=10: 2 ranks hold 20 tokens, a sequence has 96",
    "scheduler=adaptive scheduler.tokens_per_rank=40 scheduler.quantum=8 cluster.workers=2": "scheduler.tokens_per_rank"
    "=40: a sequence of 96 tokens fits no group: the largest that fits 2 ranks is 80; more ranks, more memory",
    "scheduler=adaptive scheduler.tokens_per_rank=40": "scheduler.quantum=128: must be at most",
    "engine.recompute=planned": "engine.recompute=planned: must come with scheduler=adaptive",
    "data.too_long=drop": "data.too_long=drop: must be one of split, skip, error; nearest",
    "data.too_long=error": "data.too_long=error: there are",
    "schedule.warmup=1.5": "schedule.warmup=1.5: must be a share",
    "++model._target_=os.system": "model._target_=os.system: must be a class of",
    "tracking.mode=onlin": "tracking.mode",
    "--verbose": "--verbose: no such option",
    "train": "train: expected key=value",
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_costs_one_line_and_no_process(place, tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.world.spawn.warm", lambda *modules: None)
    monkeypatch.setattr("launch.world.spawn.spawn", None)
    monkeypatch.setattr("launch.cluster.controller.fit", None)
    assert main(["train", *overrides(place), *mistake.split()]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and BAD[mistake] in said.err, said.err
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_cores_are_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *overrides(place), "cluster=local", "cluster.workers=4096"]) == 2
    assert "cluster.workers=4096: this machine has" in capsys.readouterr().err


def test_a_path_without_text_is_refused(place, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\0\1\2\3")
    assert main(["train", *overrides(place), f"data.path={tmp_path}"]) == 2
    assert f"data.path={tmp_path}: holds no text" in capsys.readouterr().err


def test_another_model_than_the_checkpoints_is_refused_by_tensor(place, uninterrupted, capsys):
    run, _ = uninterrupted
    assert main(["train", *overrides(place), f"init_from={run}", "model.blocks.gla.ffn.hidden=24"]) == 2
    said = capsys.readouterr().err
    assert "layers.0.ffn.experts.gate_up is [4, 32, 32] in the checkpoint, [4, 32, 48] in this model" in said
    assert main(["train", f"resume={run}", "model.layers=3", "train.steps=30"]) == 2
    assert "layers.2" in capsys.readouterr().err


def test_a_run_folder_that_holds_a_run_is_refused(place, uninterrupted, capsys):
    run, _ = uninterrupted
    assert main(["train", *overrides(place), f"run.dir={run}"]) == 2
    assert f"run.dir={run}: already holds a run; continue it with resume={run}" in capsys.readouterr().err


def test_ranks_that_would_idle_are_announced(place, capsys):
    assert main(["plan", *overrides(place), "train.batch_tokens=96", "parallel.data=2"]) == 0
    said = capsys.readouterr().out
    assert "a step has 1 sequences of 96 tokens for parallel.data=2 groups" in said and "idle" in said


def test_a_finished_run_is_not_resumed_by_mistake(place, uninterrupted, capsys):
    run, _ = uninterrupted
    assert main(["train", f"resume={run}"]) == 2
    assert "is complete at step 16" in capsys.readouterr().err


def test_init_from_takes_weights_and_starts_at_step_one(place, uninterrupted):
    run = place / "continued"
    train(place, f"run.dir={run}", f"init_from={uninterrupted[0]}", "train.steps=3", "cluster.workers=1")
    first = records(run)[0]
    assert first["step"] == 1 and first["loss"] < records(uninterrupted[0])[0]["loss"] - 1


def test_a_plan_of_spans_in_time_holds_one_span_and_what_lies_between(place, capsys):
    told = {}
    for name, spans in (("whole", []), ("spans", ["train.span_tokens=8"])):
        assert main(["plan", *overrides(place), *spans]) == 0
        told[name] = capsys.readouterr().out
    assert "a span in time" in told["spans"] and "spans in time\n" in told["spans"]
    activations = {name: next(x for x in out.splitlines() if "activations" in x).split() for name, out in told.items()}
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    whole, spans = (float(number) * scale[unit] for number, unit, *_ in activations.values())
    assert spans < whole / 2


def test_plan_and_help(place, capsys):
    assert (
        main(["plan", *overrides(place), "scheduler.tokens_per_rank=50", "cluster.workers=4", "parallel.data=2"]) == 0
    )
    said = capsys.readouterr().out
    for words in ("data 2 x sequence 2", "parameters", "memory", "traffic", "state gradient", "micro-step 1", "rank 3"):
        assert words in said
    for verb in ("train", "plan", "generate", "doctor"):
        assert main([verb, "--help"]) == 0
        assert verb in capsys.readouterr().out
    assert main([]) == 0 and main(["trian"]) == 2
    assert "nearest: train" in capsys.readouterr().err


def _weights(run: Path) -> dict:
    """The last checkpoint's tensors, optimizer included, as bytes."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    last = max(checkpoint.complete(run / "checkpoints"), key=checkpoint.step_of)
    dcp_to_torch_save(last, run / "whole.pt")
    state = torch.load(run / "whole.pt", weights_only=True)
    return {
        f"{kind}/{name}/{part}": value.numpy().tobytes()
        for kind, name, part, value in _flat(state)
        if isinstance(value, torch.Tensor)
    }


def _flat(state: dict):
    for name, value in state["model"].items():
        yield "model", name, "", value
    for name, parts in state["optimizer"]["state"].items():
        for part, value in parts.items():
            yield "optimizer", name, part, value


def _workers(run: Path) -> list[int]:
    """The ranks of a run (Linux): children of the fork server, a child of the launcher, whose lock names it."""
    launcher, parents = int((run / ".lock").read_text()), {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    return [pid for pid, parent in parents.items() if parents.get(parent) == launcher]
