"""`wandb sync`, the installed command, takes what a run has spooled offline, and a server that speaks its protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tracking.common import KEY, facts, record, track
from tests.wandb_file import offline_files
from tests.wandb_server import Server
from train.tracking import Tracking


def sync(*folders: Path) -> str:
    command = [str(Path(sys.executable).parent / "wandb"), "sync", *map(str, folders)]
    env = {**os.environ, "WANDB_API_KEY": KEY}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_step_of_every_attempt_arrives(tmp_path: Path, server: Server) -> None:
    run = tmp_path / "run"
    track(run, range(1, 41), about={"code": {"commit": "c0ffee", "remote": "https://host/x.git"}}, mode="offline")
    folder = run / "checkpoints" / "step-60"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    said: list[str] = []
    tracker = Tracking(mode="offline").open(facts(run), said.append)
    for step in range(31, 61):
        tracker.log(record(step, 2))
    tracker.checkpoint(folder, {"step": 60, "tokens": 60 * 4096, "loss": 0.1})
    tracker.alert("goes on", "attempt 2 goes on from step 30")
    tracker.finish({"loss": 0.1})
    assert not server.run

    said_by_wandb = sync(*(path.parent for path in offline_files(run)))
    assert "ERROR" not in said_by_wandb and said_by_wandb.count("Finished syncing") == 2
    assert server.run["name"] == (run / "wandb-id").read_text().strip()
    assert (server.run["displayName"], server.run["jobType"]) == ("a name", "train")
    assert (server.run["commit"], server.run["repo"]) == ("c0ffee", "https://host/x.git")
    expected = [(s, 1) for s in range(1, 41)] + [(s, 2) for s in range(31, 61)]
    assert [(s["step"], s["attempt"]) for s in server.steps] == expected
    assert [s["_step"] for s in server.steps] == list(range(70))
    assert server.steps[0]["expert_load/layers.0/experts"]["_type"] == "histogram"
    assert [alert["title"] for alert in server.alerts] == ["goes on"]
    (artifact,) = server.artifacts
    assert artifact["artifactCollectionName"] == "a-name-checkpoint"
    assert {alias["alias"] for alias in artifact["aliases"]} == {"latest", "step-60"}
    (manifest,) = server.manifests
    assert manifest["contents"]["manifest.json"]["ref"] == f"{folder.as_uri()}/manifest.json"


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_spool_that_a_crash_has_cut_is_taken_as_far_as_it_goes(tmp_path: Path, server: Server, attempt: int) -> None:
    """What a SIGKILL leaves: a file without an end, with half a record or without one."""
    track(tmp_path, range(1, 201), mode="offline")
    (path,) = offline_files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 7 * attempt])
    sync(path.parent)
    arrived = [s["step"] for s in server.steps]
    assert len(arrived) > 80 and arrived == list(range(1, len(arrived) + 1))
