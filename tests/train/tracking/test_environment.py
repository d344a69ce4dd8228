"""W&B's own environment, obeyed where the configuration is silent; what W&B would refuse, found before the start."""

from pathlib import Path
from typing import Any

import pytest

from launch.run.rundir import reserved
from train.run_config import ObjectConfig
from train.settings import RunSettings
from train.tracking import Tracking, obey_environment
from train.tracking.wandb import mode_of

SILENT: dict[str, Any] = dict.fromkeys(("project", "entity", "group", "job_type", "tags"))


def test_the_environment_speaks_where_the_configuration_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"PROJECT": "p", "ENTITY": "e", "RUN_GROUP": "g", "JOB_TYPE": "j", "TAGS": "a, b,"}
    for name, value in told.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    silent = obey_environment(ObjectConfig(SILENT))
    expected = {"project": "p", "entity": "e", "group": "g", "job_type": "j", "tags": ["a", "b"]}
    assert silent.values == expected
    says = dict.fromkeys(SILENT, "x") | {"tags": []}
    assert obey_environment(ObjectConfig(says)).values == says


def test_without_an_environment_there_is_a_project(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "JOB_TYPE", "TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert obey_environment(ObjectConfig(SILENT)).values == SILENT | {"project": "farspan"}


def test_a_name_of_the_environment_is_a_run_s_and_not_its_folder_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_NAME", "its name")
    name, folder = reserved(RunSettings())
    assert name == "its name" and folder.name != name and folder.is_dir()
    assert reserved(RunSettings(dir="d")) == ("its name", Path("d"))
    assert reserved(RunSettings(name="mine")) == ("mine", Path("runs/mine"))


@pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
def test_disabled_is_disabled_where_the_mode_is_open(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert mode_of("auto") == "disabled" and mode_of("offline") == "offline"
    monkeypatch.setenv("WANDB_DISABLED", "false")
    assert mode_of("auto") == "auto"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"project": "a/b"}, "tracking.project=a/b: must be without /, which W&B refuses"),
        ({"project": "what?#"}, "tracking.project=what?#: must be without # ?, which W&B refuses"),
        ({"project": 129 * "p"}, "must have 1 to 128 letters"),
        ({"project": " "}, "must have 1 to 128 letters"),
        ({"tags": ["good", 65 * "t"]}, "must have 1 to 64 letters"),
        ({"tags": [""]}, "tracking.tags[0]=: must have 1 to 64 letters"),
        ({"group": 200 * "g"}, "must have 1 to 128 letters"),
    ],
)
def test_what_wandb_refuses_is_refused_first(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="tracking") as caught:
        Tracking(**options)
    assert said in str(caught.value)


def test_what_wandb_refuses_of_the_environment_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "a:b")
    with pytest.raises(ValueError, match="^WANDB_PROJECT=a:b: must be without :, which W&B refuses"):
        obey_environment(ObjectConfig(SILENT))


def test_wandb_itself_refuses_the_same() -> None:
    import wandb

    for bad in ({"project": "a/b"}, {"project": 129 * "p"}, {"run_tags": [65 * "t"]}, {"run_tags": [""]}):
        with pytest.raises((wandb.errors.UsageError, ValueError)):
            wandb.Settings(**bad)
