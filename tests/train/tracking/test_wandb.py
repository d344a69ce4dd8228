"""W&B through the real library: offline, unreachable, hanging, answering."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.tracking.common import KEY, facts, read, record, track, until
from tests.train.tracking.conftest import closed_port
from tests.wandb_file import config, history, of_kind, offline_files, summary
from tests.wandb_server import Server
from train.tracking import JsonlWriter, Tracker, Tracking
from train.tracking.wandb import WandB, WandBOptions


def assert_holds(path: Path, steps: range) -> None:
    assert [(s["step"], s["tokens"], s["loss"]) for s in history(path)] == [(s, s * 4096, 4.0 / s) for s in steps]


def test_offline_holds_every_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_id, said = track(tmp_path, range(1, 301), project="a-project", group="g", tags=["t"])
    (path,) = offline_files(tmp_path)
    assert path.stat().st_size > 1 << 15  # more than one block of the framing
    assert_holds(path, range(1, 301))
    last = history(path)[-1]
    assert last["seconds/forward"] == 0.25
    assert (last["expert_load/layers.0/max"], last["expert_load/layers.0/min"]) == (1.6, 0.4)
    assert "expert_load/layers.0" not in last

    (run,) = of_kind(path, "run")
    assert (run.run_id, run.display_name, run.project, run.run_group) == (run_id, "a name", "a-project", "g")
    assert (list(run.tags), run.job_type) == (["t"], "train")
    told = config(path)
    assert (told["seed"], told["model"], told["lineage"]) == (7, {"width": 64}, {})
    assert ("*", "tokens") in [(metric.glob_name, metric.step_metric) for metric in of_kind(path, "metric")]
    assert summary(path)["loss"] == 0.5 and summary(path)["tracking/dropped"] == 0

    assert said == [f"W&B is offline: `wandb sync {path.parent}` uploads the run"]
    assert capfd.readouterr() == ("", "")  # wandb itself says nothing


def test_where_routers_sent_the_tokens_is_a_histogram(tmp_path: Path) -> None:
    for switch in (True, False):
        run = tmp_path / str(switch)
        tracker = Tracking(histograms=switch).open(facts(run), lambda line: None)
        tracker.log({**record(1), "documents": [[512, 3], [1024, 0], [2048, 5]]})
        tracker.log({**record(2), "expert_load": {"layers.0": [0.5, float("nan")]}, "heldout_loss": float("nan")})
        tracker.finish({})
        first, second = history(offline_files(run)[0])
        names = {name.rpartition("/")[0] for name in first if name.endswith("/_type")}
        assert names == ({"expert_load/layers.0/experts", "documents"} if switch else set())
        if switch:
            assert first["expert_load/layers.0/experts/values"] == [0.1, 0.2, 0.3, 0.4]
            assert first["expert_load/layers.0/experts/bins"] == [0, 1, 2, 3, 4]
            assert (first["documents/values"], first["documents/bins"]) == ([3, 0, 5], [256, 512, 1024, 2048])
        assert second["heldout_loss"] != second["heldout_loss"]  # not a number
        assert not [name for name in second if name.endswith("/_type")]


def test_code_and_git_are_known_without_a_search(tmp_path: Path) -> None:
    code = {"farspan": "0.1.0", "commit": "c0ffee", "branch": "main", "modified": True, "remote": "https://host/x.git"}
    track(tmp_path, range(1, 2), about={"code": code})
    (path,) = offline_files(tmp_path)
    (run,) = of_kind(path, "run")
    assert (run.git.commit, run.git.remote_url) == ("c0ffee", "https://host/x.git")
    assert config(path)["code"] == code


@pytest.mark.parametrize(("given", "expected"), [(None, "continue"), ("sweep", "sweep")])
def test_a_continued_run_says_whom_it_continues(tmp_path: Path, given: str | None, expected: str) -> None:
    lineage = {"run": "old", "checkpoint": "step-9", "wandb_id": "abc", "artifact": "old-checkpoint:step-9"}
    _, said = track(tmp_path, range(1, 2), about={"lineage": lineage}, job_type=given)
    (path,) = offline_files(tmp_path)
    assert config(path)["lineage"] == lineage and of_kind(path, "run")[0].job_type == expected
    assert len(said) == 1


def test_a_checkpoint_is_an_artifact_that_refers_to_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run 1" / "checkpoints" / "step-20"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x" * 1000)
    (folder / "__0_0.distcp").chmod(0)  # not to be opened
    said: list[str] = []
    tracker = Tracking().open(facts(tmp_path / "run 1"), said.append)
    tracker.log(record(20))
    tracker.checkpoint(folder, {"step": 20, "tokens": 81920, "loss": 0.2})
    tracker.checkpoint(folder.with_name("step-30"), {"step": 30, "tokens": 1, "loss": 0.2})  # gone already
    tracker.finish({})
    (path,) = offline_files(tmp_path / "run 1")
    (artifact,) = of_kind(path, "artifact")
    assert (artifact.type, artifact.name) == ("model", "a-name-checkpoint")
    assert "step-20" in artifact.aliases
    assert artifact.metadata == '{"step":20,"tokens":81920,"loss":0.2}'
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.ref, entry.size) == ("__0_0.distcp", f"{folder.as_uri()}/__0_0.distcp", 1000)
    assert len(said) == 1


def test_a_checkpoint_that_wandb_refuses_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no artifacts today")

    monkeypatch.setattr(wandb.Artifact, "add_reference", refuse)
    said: list[str] = []
    tracker = Tracking().open(facts(tmp_path), said.append)
    for step in (1, 2):
        tracker.checkpoint(tmp_path, {"step": step})
        tracker.log(record(step))
    tracker.finish({})
    assert said[1:] == [f"W&B did not take {tmp_path.name} as an artifact: no artifacts today"]
    assert_holds(offline_files(tmp_path)[0], range(1, 3))


def test_alerts_and_artifacts_can_be_switched_off(tmp_path: Path) -> None:
    for switch in (True, False):
        run = tmp_path / str(switch)
        tracker = Tracking(alerts=switch, artifacts=switch).open(facts(run), lambda line: None)
        tracker.alert("not finite", "loss is nan at step 3", "ERROR")
        tracker.checkpoint(tmp_path, {"step": 3})
        tracker.finish({}, exit_code=1)
        (path,) = offline_files(run)
        assert len(of_kind(path, "artifact")) == int(switch)
        alerts = [(alert.title, alert.text, alert.level) for alert in of_kind(path, "alert")]
        assert alerts == ([("not finite", "loss is nan at step 3", "ERROR")] if switch else [])


def test_the_id_is_kept_across_restarts_and_the_step_goes_on(tmp_path: Path) -> None:
    first, _ = track(tmp_path, range(1, 6), mode="offline")
    second, _ = track(tmp_path, range(4, 8), attempt=2, mode="offline")  # 4 and 5 are trained again
    assert first == second == (tmp_path / "wandb-id").read_text().strip()
    before, after = map(history, offline_files(tmp_path))
    assert [(s["step"], s["attempt"], s["_step"]) for s in before] == [(s, 1, s - 1) for s in range(1, 6)]
    assert [(s["step"], s["attempt"], s["_step"]) for s in after] == [(s, 2, s + 1) for s in range(4, 8)]
    assert {of_kind(path, "run")[0].run_id for path in offline_files(tmp_path)} == {first}
    both = [(r["step"], r["attempt"]) for r in read(tmp_path / "metrics.jsonl")]
    assert both == [(s, 1) for s in range(1, 6)] + [(s, 2) for s in range(4, 8)]


def test_a_given_id_is_used_and_kept(tmp_path: Path) -> None:
    (tmp_path / "wandb-id").write_text("given-id\n")
    assert track(tmp_path, range(1, 2), mode="offline")[0] == "given-id"
    assert offline_files(tmp_path)[0].name == "run-given-id.wandb"


def test_an_unreachable_server_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    start = time.monotonic()
    _, said = track(tmp_path, range(1, 6), mode="online", timeout=4)
    assert time.monotonic() - start < 28
    (path,) = offline_files(tmp_path)
    assert said == [f"W&B is offline (no answer from 127.0.0.1): `wandb sync {path.parent}` uploads the run"]
    assert_holds(path, range(1, 6))
    assert capfd.readouterr() == ("", "")
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def test_a_name_that_never_resolves_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("train.tracking.wandb.socket.create_connection", lambda *_: time.sleep(30))
    start = time.monotonic()
    _, (line,) = track(tmp_path, range(1, 3), timeout=0.5)
    assert time.monotonic() - start < 28
    assert line.startswith("W&B is offline (no answer from 127.0.0.1): ")


def test_behind_a_proxy_only_wandb_itself_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    _, (line,) = track(tmp_path, range(1, 3), timeout=1)
    assert line.startswith("W&B is offline (") and "no answer" not in line
    assert_holds(offline_files(tmp_path)[0], range(1, 3))


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_no_key_is_offline(tmp_path: Path, mode: str) -> None:
    _, (line,) = track(tmp_path, range(1, 3), mode=mode)
    assert ("no API key" in line) == (mode == "online")
    assert_holds(offline_files(tmp_path)[0], range(1, 3))


def in_the_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def in_netrc(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "netrc").write_text(f"default login user password {KEY}\n")


@pytest.mark.parametrize("put_key", [in_the_environment, in_netrc])
def test_auto_with_a_key_is_online(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    server: Server,
    put_key: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:
    put_key(monkeypatch, tmp_path)
    run = tmp_path / "run"
    run_id, said = track(run, range(1, 6))
    assert said == [f"W&B: {server.url}/e/p/runs/{run_id}"]
    assert [(s["step"], s["tokens"], s["loss"]) for s in server.steps] == [(s, s * 4096, 4.0 / s) for s in range(1, 6)]
    assert capfd.readouterr() == ("", "")
    assert not [f for f in run.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def test_an_online_run_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    track(tmp_path, range(1, 6))
    track(tmp_path, range(4, 8), attempt=2)
    assert [(s["step"], s["attempt"]) for s in server.steps] == [(s, 1) for s in range(1, 6)] + [
        (s, 2) for s in range(4, 8)
    ]
    # a machine died with the last lines of metrics.jsonl in its memory, which W&B had
    (tmp_path / "metrics.jsonl").write_text("")
    track(tmp_path, range(1, 3), attempt=3)
    assert [(s["step"], s["_step"]) for s in server.steps][-3:] == [(7, 8), (1, 9), (2, 10)]


def test_a_parent_that_the_server_does_not_show_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    lineage = {"wandb_id": "abc", "project": "theirs", "entity": None, "artifact": "old-checkpoint:step-9"}
    _, said = track(tmp_path, range(1, 3), about={"lineage": lineage})
    assert len(said) == 2 and said[1].startswith(
        "W&B does not show the parent's checkpoint e/theirs/old-checkpoint:step-9: "
    )
    assert [s["step"] for s in server.steps] == [1, 2]


def test_wandb_mode_is_honoured_by_auto_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    _, (line,) = track(tmp_path / "a", range(1, 3))
    assert line.startswith("W&B is offline:")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track(tmp_path / "b", range(1, 3)) == ("", [])
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, (line,) = track(tmp_path / "c", range(1, 3), mode="online")
    assert line.startswith("W&B: http")


def test_a_server_that_never_answers_is_left_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.silent.set()
    tracker = Tracking(timeout=1).open(facts(tmp_path), (said := []).append)
    for step in range(1, 6):
        tracker.log(record(step))
    assert not said  # training goes on meanwhile
    tracker.finish({})
    assert len(said) == 1 and said[0].startswith("W&B is offline (")
    assert_holds(offline_files(tmp_path)[0], range(1, 6))


def test_a_server_that_hangs_at_the_end_is_left_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    tracker = Tracking(timeout=1).open(facts(tmp_path), said.append)
    until(lambda: said)
    server.silent.set()
    tracker.log(record(1))
    tracker.finish({})
    (path,) = tmp_path.glob("wandb/run-*/run-*.wandb")
    why = "Timed out finishing run."
    assert said[1:] == [f"W&B did not end cleanly ({why}): `wandb sync {path.parent}` uploads the rest"]
    assert_holds(path, range(1, 2))


def test_a_failure_of_log_is_said_once_and_the_record_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    sink = WandB(WandBOptions(mode="offline"), facts(tmp_path), said.append)
    tracker = Tracker(JsonlWriter(tmp_path / "metrics.jsonl"), [sink], say=said.append)
    until(lambda: said)
    attempts: list[int] = []

    def fail(data: dict[str, Any], **_: Any) -> None:
        attempts.append(data["step"])
        raise RuntimeError("the service is gone\nand more")

    sink._run.log = fail
    for step in (2, 3):
        tracker.log(record(step))
    tracker.finish({})
    assert said[1:] == ["W&B stopped taking metrics, metrics.jsonl goes on: the service is gone"]
    assert attempts == [2]
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [2, 3]


def test_a_failed_run_is_marked(tmp_path: Path) -> None:
    Tracking().open(facts(tmp_path), lambda line: None).finish({"error": "why"}, exit_code=1)
    (path,) = offline_files(tmp_path)
    assert [end.exit_code for end in of_kind(path, "exit")] == [1] and summary(path)["error"] == "why"


def test_without_wandb_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, (line,) = track(tmp_path, range(1, 3))
    assert line.startswith("W&B is off for this run: ") and "wandb" in line


def test_nothing_heavy_is_imported_until_it_starts(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, train.tracking as t; "
        "f = t.Facts(run_dir=pathlib.Path(sys.argv[1]), name='n', config={}); "
        "w = t.Tracking(mode='disabled').open(f, print); w.log({'step': 1}); w.finish({}); "
        "assert not {'wandb', 'tensorboardX', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


WRONG: list[tuple[str, Any]] = [
    ("mode", "onlin"),
    ("timeout", 0),
    ("timeout", "soon"),
    ("queue", 0),
    ("queue", 1.5),
    ("artifacts", "yes"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_options_are_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"tracking\.{key}: got {value!r}, accepts "):
        Tracking(**{key: value})
