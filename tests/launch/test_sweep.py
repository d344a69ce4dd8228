"""`farspan sweep`: which members, in which order, under which names; what it refuses; how it ends and goes on."""

import csv
import fcntl
import json
import math
import os
import signal
import struct
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.cli import main
from launch.config.compose import composed
from launch.errors import UserError
from launch.run import rundir
from launch.run.signals import Stopping
from launch.runner.result import RunResult
from launch.sweep import jobs as sweep_jobs
from launch.sweep import members as sweep_members
from launch.sweep import plot as sweep_plot
from launch.sweep import sweep
from launch.sweep import table as sweep_table
from launch.sweep.members import CheckedMember, expand, name
from launch.sweep.record import Sweep
from tests import warm
from tests.jobs import overrides
from train.settings import ClusterSettings, RunSettings

QUICK = ["cluster.workers=1", "cluster.threads=1"]
LR = "optimizer.lr=1e-3,3e-3,1e-2"
MIXER = "mixer@model.blocks.gla.mixer=gla,gated_deltanet"


# Which members


@pytest.mark.parametrize(
    "given",
    [
        [LR],
        [LR, MIXER, "train.tokens=60_000"],
        ["train.tokens=60_000", MIXER, LR],
        ["seed=range(1,4)", "train.clip=0.5,1.0"],
        ["train.clip=range(0,1,0.25)"],
        ["seed=choice(3,1,2)", "model.pattern=[gla,attn],[gdn]"],
        ["seed=sort(3,1,2)"],
        ["parallel.data=null,1", "engine.reshard_after_forward=true,false"],
        ["run.name='a b'", "seed=1,2"],
        ["seed=7", "seed=1,2"],
        ["seed=1,2", "train.clip=1", "seed=3,4"],
        ["seed=1,1"],
        ["+seed=1,2", "++train.clip=1,2"],
        ["tracking.tags=[a,b]", "seed=1,2"],
        ["mixer@model.blocks.gla.mixer=glob(*)"],
        ["mixer@model.blocks.gla.mixer=glob(*,exclude=att*)", "seed=1,2"],
        ["schedule=glob([w*,c*])"],
    ],
)
def test_members_are_those_of_hydras_own_sweeper_in_its_order(given):
    loader = sweep_members._loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    (expected,) = BasicSweeper.split_arguments(parsed, None)
    _, members = expand(given)
    assert [member.overrides for member in members] == expected
    assert [member.number for member in members] == list(range(1, len(expected) + 1))


def test_every_member_can_be_composed():
    _, members = expand([LR, MIXER, "run.name='a b'", "~train.clip", "data=text", "data.path=a=b"])
    assert len(members) == 6
    configs = [composed(member.overrides).to_dict() for member in members]
    assert [config["optimizer"]["lr"] for config in configs] == [1e-3, 1e-3, 3e-3, 3e-3, 1e-2, 1e-2]
    targets = [config["model"]["blocks"]["gla"]["mixer"]["_target_"].rpartition(".")[2] for config in configs]
    assert targets == ["GatedLinearAttention", "GatedDeltaNet"] * 3
    assert configs[0]["run"]["name"] == "a b" and configs[0]["data"]["path"] == "a=b"


def test_folders_are_short_safe_and_say_what_differs():
    def folders(*given: str) -> list[str]:
        swept, members = expand(["data=text", "data.path=/tmp", *given])
        name(swept, members, composed(members[0].overrides).to_dict())
        return [member.folder for member in members]

    assert folders(LR, MIXER)[2] == "3-lr=0.003-gla.mixer=gla"
    assert folders("model.blocks.gla.mixer.heads=2,4")[1] == "2-gla.mixer.heads=4"  # three blocks have mixer.heads
    assert folders("train.clip=1,2") == ["1-clip=1", "2-clip=2"]
    assert folders("scheduler=static", "seed=1,1") == ["1-seed=1", "2-seed=1"]
    assert folders("model.pattern=[gla,attn],[gdn]")[0] == "1-pattern=gla_attn"
    assert folders("data=jsonl", "data.field='a/../b','c d;rm'") == ["1-field=a_.._b", "2-field=c_d_rm"]
    long = folders("data=jsonl", f"data.field={'x' * 300},{'x' * 301}")
    assert max(map(len, long)) <= 80 and len(set(long)) == 2
    for folder in folders(LR, MIXER):  # what the last line prints must work as an override
        assert composed([f"init_from=runs/a/{folder}"]).init_from == f"runs/a/{folder}"


# What it refuses

BAD = {
    "optimizer.lr=1e-3,": "optimizer.lr=1e-3,: not an override that a sweep can read",
    "optimizer.lr=choice(1,": "optimizer.lr=choice(1,: not an override that a sweep can read",
    "optimizer.lr=[1,2": "optimizer.lr=[1,2: not an override that a sweep can read",
    "optimizer.lr=interval(0,1)": "optimizer.lr=interval(0,1): a continuous range has no list of values",
    "optimizer.lr=range(3,1)": "optimizer.lr=range(3,1): no value at all",
    "optimizer.lr=range(1,3,0)": "optimizer.lr=range(1,3,0): cannot be listed: range() arg 3 must not be zero",
    "optimizer.lr=range(0,1,0.0)": "optimizer.lr=range(0,1,0.0): cannot be listed: Invalid range values",
    "seed=range(0,1000000000)": "more than 1,000 values",
    "seed=range(0,1000) train.clip=1,2": "2,000 members (1,000 of seed x 2 of train.clip): a sweep has 1,000 at most",
    "optimizer.lr=glob(*)": "optimizer.lr is no group, glob takes the options of one; accepts cluster, curriculum",
    "schedule=glob(x*)": "schedule=glob(x*): no value at all; schedule has anneal, constant, cosine",
    "optimizer.lr=3e-3": "nothing to sweep: give a key several values, for example optimizer.lr=1e-3,3e-3",
    "model.pattern=[gla,attn]": "nothing to sweep",
    "": "nothing to sweep",
    "run.dir=a,b": "run.dir=a,b: the members of a sweep have their own",
    "resume=a,b": "resume=a,b: ",
    "--verbose": "--verbose: no such option",
    "train": "train: not an override that a sweep can read; expected key=value",
    "optimizer.lrr=1,2": "member 1 (optimizer.lrr=1): optimizer.lrr: no such key; nearest: optimizer.lr",
    "optimizer.lr=1e-3,fast": "member 2 (optimizer.lr=fast): optimizer.lr=fast: expected a number",
    "schedule=wsd,cosin": "member 2 (schedule=cosin): schedule=cosin: no such option; accepts anneal, constant, cosine",
    "seed=0,1,-1": "member 3 (seed=-1): seed=-1: must not be negative",
    "model.blocks.gla.mixer.heads=2,5": "member 2 (model.blocks.gla.mixer.heads=5): model.blocks.gla.mixer.heads=5:",
    "data.path=/no/such,/nor/this": "member 1 (data.path=/no/such): data.path=/no/such: no such file or folder",
    "resume=nowhere": "resume=nowhere: no such sweep; expected the folder of one",
    "resume=nowhere optimizer.lr=1": "optimizer.lr=1: a resumed sweep takes resume=RUN and cluster keys only",
    "cluster.kind=none,ray cluster.address=http://127.0.0.1:1": "no Ray answers there",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, its store, and room for sweeps."""
    return tmp_path_factory.mktemp("sweep")


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_costs_one_line_and_no_process(place, tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.world.spawn.spawn", None)
    given = [] if mistake.startswith("resume=") else [*overrides(place), *QUICK]
    assert main(["sweep", *given, *mistake.split()]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("sweep runs")]
    assert len(said) == 1 and BAD[mistake] in said[0], said
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_taken_is_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["sweep", *overrides(place), *QUICK, "seed=1,2", "run.name=a"]
    (tmp_path / "runs/a/2-seed=2").mkdir(parents=True)
    (tmp_path / "runs/a/2-seed=2/config.yaml").touch()
    assert main(given) == 2
    assert "run.dir=runs/a/2-seed=2: already holds a run" in capsys.readouterr().err
    (tmp_path / "runs/a/sweep.json").touch()
    assert main(given) == 2
    assert "run.dir=runs/a: already holds a sweep; continue it with resume=runs/a" in capsys.readouterr().err
    assert main(["sweep", "resume=a"]) == 2
    assert "resume=runs/a: sweep.json cannot be read" in capsys.readouterr().err


# What it makes of its members


def fabricated(folder: Path, given: list[str], states: dict[int, str], steps: int = 50) -> Sweep:
    """A sweep whose runs were never trained: `states` of those members that are not done."""
    swept, members = expand(given)
    name(swept, members, {})
    found = Sweep(folder, "made", given, swept, members)
    for member in members:
        member.state = states.get(member.number, "done")
        if member.state == "failed":
            member.reason = "rank 0: FloatingPointError: loss is nan at step 20 (full trace: error.txt)"
        if member.state == "waiting":
            continue
        run = found.place(member)
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, (steps if member.state == "done" else steps // 2) + 1):
                loss = 2 + 3 * math.exp(-step / 10) + 0.01 * member.number
                record = {"step": step, "tokens": 1000 * step, "loss": loss, "attempt": 1, "tokens_per_second": 500.0}
                if step in (20, steps):
                    record["heldout_loss"] = loss + 0.1
                file.write(json.dumps(record) + "\n")
            file.write('{"step": 51, "tok')  # a crash cut it
    return found


def test_the_table_ranks_what_is_done_and_names_what_is_not(tmp_path):
    found = fabricated(tmp_path, [LR, MIXER], {2: "failed", 5: "stopped", 6: "waiting"})
    found.tabulate()
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["1", "3", "4", "2", "5", "6"]
    assert [row["state"] for row in rows] == ["done"] * 3 + ["failed", "stopped", "waiting"]
    best = rows[0]
    assert best["optimizer.lr"] == "0.001" and best["mixer@model.blocks.gla.mixer"] == "gla"
    assert float(best["loss"]) == pytest.approx(2 + 3 * math.exp(-5) + 0.01)
    assert float(best["heldout_loss"]) == pytest.approx(float(best["loss"]) + 0.1)
    assert best["tokens"] == "50000" and float(best["tokens_per_second"]) == 500
    assert best["folder"] == str(tmp_path / "1-lr=0.001-mixer=gla")
    assert rows[-1]["loss"] == rows[-1]["tokens"] == "" and "FloatingPointError" in rows[3]["reason"]
    text = (tmp_path / "table.txt").read_text().splitlines()
    assert [line for line in text if line.startswith("*  1  0.001  gla")]
    assert "* best held-out loss: 2.1302 nats per token, lr=0.001, mixer=gla, in" in text[-2]
    assert text[-1].startswith("2: failed: rank 0: FloatingPointError: loss is nan at step 20")
    assert all(line == line.rstrip() for line in text)


def test_steps_that_were_trained_again_count_once(tmp_path):
    found = fabricated(tmp_path, ["seed=1,2"], {})
    metrics = found.place(found.members[0]) / "metrics.jsonl"
    lines = metrics.read_text().splitlines()[:50]
    again = [json.dumps(json.loads(line) | {"attempt": 2, "loss": 1.0}) for line in lines[40:45]]
    metrics.write_text("\n".join([*lines, *again]) + "\n")
    result = found.results()[0]
    assert [tokens for tokens, _ in result.curve] == [1000 * step for step in range(1, 46)]
    assert result.loss == 1.0 and result.tokens == 45_000
    assert result.heldout == pytest.approx(2 + 3 * math.exp(-2) + 0.11)  # that of step 20: the end was taken back


def test_the_screen_gets_whole_cells_however_narrow(tmp_path, monkeypatch, capsys):
    found = fabricated(tmp_path, [LR, MIXER], {2: "failed"})
    for columns, with_folders in (("40", False), ("300", True)):
        monkeypatch.setenv("COLUMNS", columns)
        sweep_table.show(found.swept, found.results())
        said = capsys.readouterr().out
        assert "gated_deltanet" in said and "2.1302" in said and "…" not in said
        assert ("1-lr=0.001-mixer=gla " in said.split("best")[0]) == with_folders


PICTURES = {
    "two keys": ([LR, MIXER], {2: "failed", 5: "stopped", 6: "waiting"}),
    "a name first": ([MIXER, LR], {}),
    "no number": ([MIXER, "schedule=wsd,cosine"], {3: "failed"}),
    "sixty members": (["optimizer.lr=range(1,11)", MIXER, "seed=1,2,3"], {4: "running"}),
    "many names": ([f"tracking.project={','.join(f'p{i}' for i in range(30))}"], {}),
    "nothing yet": (["seed=1,2"], {1: "waiting", 2: "waiting"}),
    "only failures": (["seed=1,2"], {1: "failed", 2: "failed"}),
    "one value": (["seed=1,1"], {}),
}


@pytest.mark.parametrize("case", PICTURES)
def test_the_plot_is_a_picture_and_names_who_failed(tmp_path, monkeypatch, case):
    given, states = PICTURES[case]
    found = fabricated(tmp_path, given, states)
    words = []
    kept = sweep_plot._unfinished
    monkeypatch.setattr(sweep_plot, "_unfinished", lambda *a: words.append(kept(*a)) or words[-1])
    sweep_plot.draw(tmp_path / "sweep.png", "made", found.swept, found.results())
    assert picture(tmp_path / "sweep.png") >= (1600, 650)
    assert ("failed: " in words[0]) == ("failed" in states.values())
    if case == "two keys":
        assert words[0].startswith("failed: 2 (lr 0.001, gated_deltanet)\nstopped: 5 (lr 0.01, gla)")


def picture(path: Path) -> tuple[int, int]:
    """The size of a PNG that is not empty."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 15_000
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_a_loss_far_above_the_others_does_not_flatten_them():
    assert sweep_plot._top([1.7, 1.8, 1.9, 2.0, 1.75, 9.0]) == pytest.approx(2.045)
    assert sweep_plot._top([1.7, 1.8, 9.0]) == 9.0  # one of three: it belongs to the picture
    assert sweep_plot._top([1.7, 1.8]) == 1.8 and sweep_plot._top([]) == 0


def test_smoothing_keeps_length_ends_and_mean():
    import numpy as np

    values = np.arange(400.0)
    assert np.allclose(sweep_plot.smooth(values), values)
    noisy = sweep_plot.smooth(np.tile([0.0, 2.0], 200))
    assert len(noisy) == 400 and abs(noisy[50:350] - 1).max() < 0.1
    assert list(sweep_plot.smooth(np.array([3.0]))) == [3.0]


# How it runs, without training


def played(place: Path, monkeypatch, endings: dict[int, object], *given: str) -> int:
    """A sweep whose runs end as told, by number, without a process."""
    monkeypatch.chdir(place)

    def run(config, console, **rest):
        folder = Path(config.run.dir)
        ending = endings.get(int(folder.name.split("-")[0]), 0)
        if isinstance(ending, BaseException):
            raise ending
        folder.mkdir(parents=True, exist_ok=True)
        rundir.write_config(folder, config, {})
        if ending in ("signal", "late signal"):
            with Stopping(folder, lambda line: None):
                signal.raise_signal(signal.SIGTERM)
        if isinstance(ending, int):
            return RunResult(ending, folder, False, "it broke" if ending else None)
        return RunResult(0, folder, ending != "late signal")

    monkeypatch.setattr(sweep, "run", run)
    return sweep.sweep([*overrides(place), *QUICK, *given])


def test_what_one_member_raises_is_noted_and_the_others_run(place, monkeypatch, capsys):
    endings = {1: UserError("data.path=x: gone"), 2: RuntimeError("boom\nmore"), 3: 1}
    assert played(place, monkeypatch, endings, "seed=1,2,3,4", "run.name=raised") == 1
    found = Sweep.load(place / "runs/raised")
    assert [member.state for member in found.members] == ["failed", "failed", "failed", "done"]
    assert [member.reason for member in found.members] == [
        "data.path=x: gone",
        "RuntimeError: boom (full trace: runs/raised/error.txt)",
        "it broke",
        None,
    ]
    assert "member 2\nTraceback" in (place / "runs/raised/error.txt").read_text()
    said = capsys.readouterr()
    assert "[4/4] seed=4" in said.err and "1 done, 3 failed" in said.err
    assert "farspan sweep resume=runs/raised goes on" in said.err and "2: failed: RuntimeError: boom" in said.out
    assert not rundir.locked(place / "runs/raised")


def test_a_signal_ends_the_sweep_even_where_a_members_last_step_has_swallowed_it(place, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    for number, asked, states in (
        (1, "signal", ["stopped", "waiting", "waiting"]),
        (2, "late signal", ["done", "done", "waiting"]),
        (3, "farspan stop", ["done", "stopped", "done"]),  # asks that member alone
    ):
        endings = {min(number, 2): asked}
        assert played(place, monkeypatch, endings, "seed=1,2,3", f"run.name=heard-{number}") == 0
        found = Sweep.load(place / f"runs/heard-{number}")
        assert [member.state for member in found.members] == states
        assert f"farspan sweep resume=runs/heard-{number} goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


def test_a_signal_between_two_members_stops_the_sweep(place, monkeypatch):
    endings = {2: KeyboardInterrupt()}
    assert played(place, monkeypatch, endings, "seed=1,2,3", "run.name=between") == 0
    states = [member.state for member in Sweep.load(place / "runs/between").members]
    assert states[0] == "done" and states[1] == "waiting"


def test_members_share_a_group_and_are_named_after_the_sweep(place, monkeypatch):
    assert played(place, monkeypatch, {}, "seed=1,2", "run.name=grouped") == 0
    config = rundir.saved_config(place / "runs/grouped/2-seed=2")
    assert (config["run"]["name"], config["run"]["dir"]) == ("grouped/2-seed=2", "runs/grouped/2-seed=2")
    assert config["tracking"]["group"] == "grouped" and config["seed"] == 2
    assert played(place, monkeypatch, {}, "seed=1,2", "run.name=own", "tracking.group=mine") == 0
    assert rundir.saved_config(place / "runs/own/1-seed=1")["tracking"]["group"] == "mine"


# On a cluster


class Ray:
    """A Ray that holds `slots` workers: each look at a job brings it a step nearer to its end."""

    def __init__(self, slots: int, endings: dict[int, int] | None = None):
        self.slots, self.endings = slots, endings or {}
        self.running: dict[str, int] = {}
        self.codes: dict[str, int] = {}
        self.said: dict[str, str] = {}
        self.most, self.stopped, self.address = 0, [], "http://head:8265"

    def hand_over(self, config, say, elsewhere=None):
        folder = Path(config.run.dir)
        number = int(folder.name.split("-")[0])
        job = f"job-{number}"
        self.running[job] = 3
        self.most = max(self.most, len(self.running))
        self.codes[job] = self.endings.get(number, 0)
        self.said[job] = "checks passed: all\n" + ("failed: it broke\n" if self.codes[job] else "")
        return SimpleNamespace(cluster=self, job=job)

    def ended(self, job):
        place = list(self.running).index(job) if job in self.running else -1
        if 0 <= place < self.slots:
            self.running[job] -= 1
            if self.running[job] <= 0:
                del self.running[job]
        return job not in self.running

    def stop(self, job):
        self.stopped.append(job)
        self.said[job] += "stopped at step 3\n"
        self.running[job] = 1

    def exit_code(self, job):
        return self.codes[job]

    def logs(self, job):
        return self.said[job]

    def message(self, job):
        return ""


def handed_over(tmp_path, monkeypatch, ray: Ray, members: int) -> Sweep:
    swept, found = expand([f"seed=range(0,{members})"])
    name(swept, found, {})
    record = Sweep(tmp_path, "jobs", [], swept, found)
    monkeypatch.setattr(sweep_jobs, "POLL_S", 0.001)
    monkeypatch.setattr(sweep_jobs.submit, "hand_over", ray.hand_over)
    monkeypatch.setattr(sweep_jobs.nodes, "room", lambda *_: [SimpleNamespace(slots=ray.slots)])
    ready = []
    for member in found:
        run, workers = RunSettings(dir=str(record.place(member))), ClusterSettings(kind="ray", workers=1)
        config: Any = SimpleNamespace(run=run, cluster=workers)
        ready.append(CheckedMember(member, config, "cpu"))
    lines: list[str] = []
    sweep_jobs.run(record, ready, [], lines.append)
    record.lines = lines  # type: ignore[attr-defined]
    return record


def test_as_many_jobs_as_fit_and_one_that_waits(tmp_path, monkeypatch):
    ray = Ray(slots=2, endings={3: 1})
    found = handed_over(tmp_path, monkeypatch, ray, 6)
    assert ray.most == 3
    assert [member.state for member in found.members] == ["done", "done", "failed", "done", "done", "done"]
    assert found.members[2].reason == "it broke"
    assert "[3/6] seed=2: failed, it broke" in found.lines and "[4/6] seed=3: running, job job-4" in found.lines
    assert all("cannot be seen from here" in line for line in sweep_table.notes(found.swept, found.results())[1:2])


def test_a_signal_stops_the_jobs_and_a_second_one_leaves_them(tmp_path, monkeypatch):
    ray = Ray(slots=1)
    kept = ray.ended

    def ended(job):
        if not ray.stopped and job == "job-2":
            signal.raise_signal(signal.SIGINT)
        return bool(ray.stopped) and kept(job)

    ray.ended = ended
    found = handed_over(tmp_path / "once", monkeypatch, made(ray, tmp_path / "once"), 4)
    assert ray.stopped == ["job-1", "job-2"]
    assert [member.state for member in found.members] == ["stopped", "stopped", "waiting", "waiting"]
    ray = Ray(slots=1)
    ray.ended = lambda job: signal.raise_signal(signal.SIGINT) is not None
    found = handed_over(tmp_path / "twice", monkeypatch, made(ray, tmp_path / "twice"), 4)
    assert [member.state for member in found.members] == ["running", "running", "waiting", "waiting"]
    assert f"farspan sweep resume={tmp_path / 'twice'} takes it up again" in found.lines[-1]


def made(ray: Ray, folder: Path) -> Ray:
    folder.mkdir()
    return ray


# As a user would


def start(place: Path, *arguments: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*warm.command(), "sweep", *arguments],
        cwd=place,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 200) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.e2e
def test_two_rates_and_two_mixers_from_one_command(place, monkeypatch, capsys):
    out, err = finish(
        start(place, *overrides(place), *QUICK, "optimizer.lr=1e-3,1e-2", MIXER, "train.steps=3", "run.name=rates")
    )
    folder = place / "runs/rates"
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {row["state"] for row in rows} == {"done"}
    losses = [float(row["heldout_loss"]) for row in rows]
    assert losses == sorted(losses) and rows[0]["optimizer.lr"] == "0.01"
    assert {(row["optimizer.lr"], row["mixer@model.blocks.gla.mixer"]) for row in rows} == {
        (lr, mixer) for lr in ("0.001", "0.01") for mixer in ("gla", "gated_deltanet")
    }
    for row in rows:
        run = place / row["folder"]
        assert steps(run) == [1, 2, 3] and [p.name for p in (run / "checkpoints").iterdir()] == ["step-3"]
    assert picture(folder / "sweep.png") == (1760, 704)
    assert [line.rstrip() for line in out.splitlines()] == [
        line for line in (folder / "table.txt").read_text().splitlines() if line
    ]
    assert err.startswith("sweep runs/rates: 4 members (2 of optimizer.lr x 2 of model.blocks.gla.mixer)")
    assert "[4/4] optimizer.lr=0.01 mixer@model.blocks.gla.mixer=gated_deltanet" in err and "4 done" in err
    assert "Traceback" not in err
    monkeypatch.chdir(place)
    assert main(["sweep", "resume=rates"]) == 0  # nothing is left: the same table again
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 6 and "[" not in said.err and "4 done" in said.err


@pytest.mark.e2e
@pytest.mark.slow
def test_a_failed_member_does_not_end_the_others_and_is_resumed(place):
    """One diverges, one finds its folder in use; the sweep is resumed when that is free again."""
    folder = place / "runs/broken"
    (folder / "3-lr=0.02").mkdir(parents=True)
    with (folder / "3-lr=0.02/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        given = [*overrides(place), *QUICK, "optimizer.lr=1e30,1e-2,2e-2", "train.steps=3", "run.name=broken"]
        out, err = finish(start(place, *given), 1)
    found = Sweep.load(folder)
    assert [member.state for member in found.members] == ["failed", "done", "failed"]
    assert "batches were passed over" in (found.members[0].reason or "")
    assert "in use by another run" in (found.members[2].reason or "")
    assert "1 done, 2 failed" in err and "1: failed: rank 0" in out and "3: failed: run.dir=" in out
    before = (folder / "2-lr=0.01/metrics.jsonl").stat().st_mtime_ns
    out, err = finish(start(place, "resume=broken"), 1)
    assert [member.state for member in Sweep.load(folder).members] == ["failed", "done", "done"]
    assert (folder / "2-lr=0.01/metrics.jsonl").stat().st_mtime_ns == before
    assert steps(folder / "3-lr=0.02") == [1, 2, 3] and "[2/3]" not in err


@pytest.mark.e2e
@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(place):
    folder = place / "runs/interrupted"
    given = [*overrides(place), *QUICK, "train.steps=2,40,3", "run.name=interrupted"]
    process = start(place, *given)
    second = folder / "2-steps=40"
    deadline = time.monotonic() + 120
    while not steps(second) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, 0)
    assert [member.state for member in Sweep.load(folder).members] == ["done", "stopped", "waiting"]
    assert "stopping after this step" in err and "farspan sweep resume=runs/interrupted goes on" in err
    assert "stopped" in out and picture(folder / "sweep.png")
    reached = len(steps(second))
    assert 1 <= reached < 40 and [p.name for p in (second / "checkpoints").iterdir()] == [f"step-{reached}"]
    _, err = finish(start(place, "resume=runs/interrupted"))
    assert [member.state for member in Sweep.load(folder).members] == ["done", "done", "done"]
    assert steps(second) == list(range(1, 41)) and len(steps(folder / "3-steps=3")) == 3
    assert f"step-{reached}" in err and "[1/3]" not in err and "3 done" in err
