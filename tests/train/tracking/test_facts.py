"""What a run is told to be: its code without secrets, and the run that its weights come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.settings import RunSettings
from train.tracking import Facts, without_credentials
from train.tracking.facts import artifact_name


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://host/a/b.git", "https://host/a/b.git"),
        ("https://me:secret@host:8443/a.git", "https://host:8443/a.git"),
        ("https://secret@host/a.git", "https://host/a.git"),
        ("https://me:a@b@host/a.git?token=secret#x", "https://host/a.git"),
        ("ssh://git@host/a.git", "ssh://host/a.git"),
        ("git@host:a/b.git", "git@host:a/b.git"),
        ("me:secret@host:a/b.git", "host:a/b.git"),
        ("/srv/a.git", "/srv/a.git"),
    ],
)
def test_a_remote_has_no_credentials(url: str, clean: str) -> None:
    assert without_credentials(url) == clean


def order(run: Path, **more: Any) -> dict[str, Any]:
    run.mkdir(parents=True, exist_ok=True)
    return {"run_dir": str(run), "config": SimpleNamespace(run=RunSettings(), to_dict=dict), **more}


def test_code_comes_from_the_order_or_from_the_runs_configuration(tmp_path: Path) -> None:
    asked = order(tmp_path / "run")
    assert Facts.of(asked).code == {} and Facts.of(asked).name == "run"
    (tmp_path / "run" / "config.yaml").write_text("code:\n  commit: '0123'\n  remote: https://me:secret@host/x\n")
    assert Facts.of(asked).code == {"commit": "0123", "remote": "https://host/x"}
    given = {"commit": "4567", "remote": "https://secret@host/y"}
    assert Facts.of({**asked, "code": given}).code == {"commit": "4567", "remote": "https://host/y"}
    assert given["remote"] == "https://secret@host/y"


def parent(folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "step-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 20, "tokens": 7680}))
    (folder / "wandb-id").write_text("abcd1234\n")
    (folder / "config.yaml").write_text("run: {name: my run}\ntracking: {project: theirs, entity: us}\n")
    return checkpoint


def test_a_continued_run_remembers_its_parent(tmp_path: Path) -> None:
    checkpoint = parent(tmp_path / "old")
    found = Facts.of(order(tmp_path / "new", init_from=str(checkpoint))).lineage
    assert found == {
        "run": "old",
        "folder": str(tmp_path / "old"),
        "checkpoint": "step-20",
        "step": 20,
        "tokens": 7680,
        "wandb_id": "abcd1234",
        "project": "theirs",
        "entity": "us",
        "artifact": "my-run-checkpoint:step-20",
    }
    assert json.loads((tmp_path / "new" / "lineage.json").read_text()) == found
    shutil.rmtree(tmp_path / "old")
    assert Facts.of(order(tmp_path / "new")).lineage == found  # resumed
    assert Facts.of(order(tmp_path / "new", init_from=str(checkpoint))).lineage == found  # started again


def test_a_checkpoint_on_its_own_is_a_parent_too(tmp_path: Path) -> None:
    checkpoint = parent(tmp_path / "old").rename(tmp_path / "step-20")
    found = Facts.of(order(tmp_path / "new", init_from=str(checkpoint))).lineage
    assert (found["checkpoint"], found["step"], found["wandb_id"], found["project"]) == ("step-20", 20, None, None)


def test_a_published_folder_is_a_parent_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    found = Facts.of(order(tmp_path / "new", init_from=str(tmp_path / "qwen"))).lineage
    assert found["run"] == "qwen" and found["folder"] == str(tmp_path / "qwen") and found["checkpoint"] is None


def test_a_run_from_nothing_has_no_lineage(tmp_path: Path) -> None:
    assert Facts.of(order(tmp_path / "run", init_from=None)).lineage == {}
    assert not (tmp_path / "run" / "lineage.json").exists()


def test_artifacts_have_names_that_wandb_takes() -> None:
    assert artifact_name("a/b: ü 1") == "a-b-1-checkpoint"
    assert len(artifact_name("x" * 300)) == 128
