"""The record on disk byte by byte; W&B through the real library: offline, unreachable, hanging, answering."""

from __future__ import annotations

import http.server
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.wandb_file import history, records
from train.track import Jsonl, RunLog, Tracker, WandB

KEY = "0123456789" * 4


def record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 4096,
        "time": 1761000000.0 + step,
        "loss": 4.0 / step,
        "expert_load": {"layers.0": [0.1, 0.2, 0.3, 0.4]},
        "seconds": {"forward": 0.25},
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# metrics.jsonl


def test_a_reader_sees_whole_lines_at_once(tmp_path: Path) -> None:
    log = Jsonl(tmp_path / "run" / "metrics.jsonl")
    for step in (1, 2):
        log.log(record(step))
        assert read(tmp_path / "run" / "metrics.jsonl") == [record(s) for s in range(1, step + 1)]


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    log = Jsonl(tmp_path / "m.jsonl")
    log.log({"loss": math.nan, "grad_norm": -math.inf, "expert_load": {"layers.0": [0.5, math.nan]}, "lr": 0.1})
    log.log({"loss": 1.0})
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m.jsonl").open())
    assert first == {
        "loss": None,
        "grad_norm": None,
        "expert_load": {"layers.0": [0.5, None]},
        "lr": 0.1,
        "nonfinite": ["loss", "grad_norm", "expert_load/layers.0/1"],
    }
    assert second == {"loss": 1.0}


def test_tensors_and_arrays_are_numbers(tmp_path: Path) -> None:
    log = Jsonl(tmp_path / "m.jsonl")
    log.log({"loss": torch.tensor(0.5), "load": torch.tensor([1, 2]), "n": np.int64(3), "x": np.float32("inf")})
    assert read(tmp_path / "m.jsonl") == [{"loss": 0.5, "load": [1, 2], "n": 3, "x": None, "nonfinite": ["x"]}]


@pytest.mark.parametrize("cut", [b"{", b'{"step": 3, "loss": 1.0}', b"\0" * 5000, b"x" * 100_000])
def test_a_cut_last_line_is_removed(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + cut)
    Jsonl(path).log({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_file_of_one_cut_line_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step"')
    Jsonl(path).log({"step": 1})
    assert path.read_bytes() == b'{"step": 1}\n'


def test_keep_until_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = Jsonl(path)
    log.log({"event": "start"})
    for step in range(1, 8):
        log.log(record(step))
    assert log.keep_until(5) == 2
    assert log.keep_until(5) == 0
    log.log({"step": 6, "again": True})
    log.close()
    assert read(path) == [{"event": "start"}, *(record(s) for s in range(1, 6)), {"step": 6, "again": True}]
    assert list(tmp_path.iterdir()) == [path]


def test_keep_until_drops_lines_that_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n[]\n{"step": 2}\n')
    assert Jsonl(path).keep_until(1) == 3
    assert path.read_bytes() == b'{"step": 1}\n'


def test_run_log_appends_lines_with_the_time(tmp_path: Path) -> None:
    for line in ("first", "Größe 2"):
        log = RunLog(tmp_path / "run" / "log.txt")
        log(line)  # read before it is closed: flushed
        last = (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()[-1]
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  {line}", last)
        log.close()
    assert len((tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()) == 2


# Weights & Biases


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no setting of whoever runs the tests, and no server but this machine."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def track(run: Path, steps: range, **options: Any) -> tuple[str, list[str]]:
    """Track `steps` of a run, as the loop does, and return W&B's id and what was said."""
    said: list[str] = []
    wandb = WandB(**options)
    run_id = wandb.start(run, "a name", {"seed": 7, "model": {"width": 64}}, None, said.append)
    tracker = Tracker(Jsonl(run / "metrics.jsonl"), wandb)
    for step in steps:
        tracker.log(record(step))
    tracker.finish({"loss": 0.5})
    assert read(run / "metrics.jsonl")[-len(steps) :] == [record(step) for step in steps]
    return run_id, said


def offline_files(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


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

    (run,) = (r.run for r in records(path) if r.HasField("run"))
    assert (run.run_id, run.display_name, run.project, run.run_group) == (run_id, "a name", "a-project", "g")
    assert list(run.tags) == ["t"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["seed"], config["model"]) == (7, {"width": 64})
    metrics = [r.metric for r in records(path) if r.HasField("metric")]
    assert ("*", "tokens") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    summary = {i.key: i.value_json for r in records(path) if r.HasField("summary") for i in r.summary.update}
    assert summary["loss"] == "0.5"

    assert said == [f"W&B is offline: `wandb sync {path.parent}` uploads the run"]
    assert capfd.readouterr() == ("", "")  # wandb itself says nothing


def test_the_id_is_kept_across_a_restart(tmp_path: Path) -> None:
    first, _ = track(tmp_path, range(1, 4), mode="offline")
    second, _ = track(tmp_path, range(4, 6), mode="offline")
    assert first == second == (tmp_path / "wandb-id").read_text().strip()
    held = [step["step"] for path in offline_files(tmp_path) for step in history(path)]
    assert sorted(held) == [1, 2, 3, 4, 5]
    assert {r.run.run_id for p in offline_files(tmp_path) for r in records(p) if r.HasField("run")} == {first}


def test_a_given_id_is_used_and_kept(tmp_path: Path) -> None:
    wandb = WandB(mode="offline")
    assert wandb.start(tmp_path, "n", {}, "given-id", lambda line: None) == "given-id"
    wandb.finish()
    assert (tmp_path / "wandb-id").read_text().strip() == "given-id"
    assert offline_files(tmp_path)[0].name == "run-given-id.wandb"


def test_an_unreachable_server_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    start = time.monotonic()
    _, said = track(tmp_path, range(1, 6), mode="online", timeout=4)
    assert time.monotonic() - start < 8
    (path,) = offline_files(tmp_path)
    assert said == [f"W&B is offline (no answer from 127.0.0.1): `wandb sync {path.parent}` uploads the run"]
    assert_holds(path, range(1, 6))
    assert capfd.readouterr() == ("", "")
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def test_a_name_that_never_resolves_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("train.track.socket.create_connection", lambda *_: time.sleep(30))
    start = time.monotonic()
    _, (line,) = track(tmp_path, range(1, 3), timeout=0.5)
    assert time.monotonic() - start < 8
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


class Server(http.server.ThreadingHTTPServer):
    """As much of a W&B server as a run needs; `silent` makes it accept requests and not answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.silent = threading.Event()
        self.steps: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.silent.is_set():
            time.sleep(60)
        reply = {}
        if self.path == "/graphql":
            reply = {"data": self.data(json.loads(body)["variables"])}
        elif self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.steps += map(json.loads, lines)
        text = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def data(self, asked: dict[str, Any]) -> dict[str, Any]:
        project = {"name": "p", "entity": {"name": "e"}}
        return {
            "upsertBucket": {"bucket": {"id": "", "name": asked.get("name"), "config": "{}", "project": project}},
            "createRunFiles": {"runID": "", "uploadHeaders": [], "files": []},
            "model": None,
        }

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


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
    assert said == [f"W&B: http://127.0.0.1:{server.server_address[1]}/e/p/runs/{run_id}"]
    assert [(s["step"], s["tokens"], s["loss"]) for s in server.steps] == [(s, s * 4096, 4.0 / s) for s in range(1, 6)]
    assert capfd.readouterr() == ("", "")
    assert not [f for f in run.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


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
    start = time.monotonic()
    _, (line,) = track(tmp_path, range(1, 6), timeout=1)
    assert time.monotonic() - start < 8  # two seconds of work, one of patience, two of wandb's own shutdown
    assert line.startswith("W&B is offline (")
    assert_holds(offline_files(tmp_path)[0], range(1, 6))


def test_a_server_that_hangs_at_the_end_is_left_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    wandb = WandB(timeout=1)
    wandb.start(tmp_path, "n", {}, None, said.append)
    wandb.log(record(1))
    server.silent.set()
    start = time.monotonic()
    wandb.finish()
    assert time.monotonic() - start < 5
    (path,) = tmp_path.glob("wandb/run-*/run-*.wandb")
    why = "Timed out finishing run."
    assert said[1:] == [f"W&B did not end cleanly ({why}): `wandb sync {path.parent}` uploads the rest"]
    assert_holds(path, range(1, 2))


def test_a_failure_of_log_is_said_once_and_the_record_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    wandb = WandB(mode="offline")
    wandb.start(tmp_path, "n", {}, None, said.append)
    tracker = Tracker(Jsonl(tmp_path / "metrics.jsonl"), wandb)
    tracker.log(record(1))
    attempts: list[int] = []

    def fail(data: dict[str, Any]) -> None:
        attempts.append(data["step"])
        raise RuntimeError("the service is gone\nand more")

    wandb._run.log = fail
    for step in (2, 3):
        tracker.log(record(step))
    tracker.finish({})
    assert said[1:] == ["W&B stopped taking metrics, metrics.jsonl goes on: the service is gone"]
    assert attempts == [2]
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_failed_run_is_marked(tmp_path: Path) -> None:
    wandb = WandB(mode="offline")
    wandb.start(tmp_path, "n", {}, None, lambda line: None)
    Tracker(Jsonl(tmp_path / "m"), wandb).finish({}, exit_code=1)
    assert [r.exit.exit_code for r in records(offline_files(tmp_path)[0]) if r.HasField("exit")] == [1]


def test_without_wandb_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, (line,) = track(tmp_path, range(1, 3))
    assert line.startswith("W&B is off for this run: ") and "wandb" in line


def test_wandb_is_not_imported_until_it_starts() -> None:
    code = "import sys, train.track as t; w = t.WandB(mode='disabled'); w.start('.', 'n', {}, None, print); w.log({})"
    subprocess.run([sys.executable, "-c", code + "; w.finish(); assert 'wandb' not in sys.modules"], check=True)


@pytest.mark.parametrize("options", [{"mode": "onlin"}, {"timeout": 0}, {"timeout": "soon"}])
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    ((key, value),) = options.items()
    with pytest.raises(ValueError, match=rf"tracking\.{key}: got {value!r}, accepts "):
        WandB(**options)
