"""The folder that travels to a cluster: farspan's own code and, for a job, its order."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("models", "parallel", "data", "train", "launch", "conf")
ORDER = "farspan.json"  # beside the code: what the job runs
_STOP_S = (
    3600  # seconds that Ray gives a job between `stop` and SIGKILL: a step and a checkpoint must fit; 3 by default
)

# What farspan needs wherever it runs -> how pip calls it.
NEEDS = {
    "hydra": "hydra-core",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "ray": "'ray[default,train]'",
    "rich": "rich",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "yaml": "pyyaml",
}

# Of a job's driver and of all its workers, on every machine.
JOB_ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S),
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "PYTHONUNBUFFERED": "1",
}


def missing() -> str | None:
    """Returns the line about a package that this interpreter lacks: which interpreter, what, and how it is
    installed."""
    lacking = [name for module, name in NEEDS.items() if importlib.util.find_spec(module) is None]
    if not lacking:
        return None
    return f"{sys.executable} lacks {', '.join(lacking)}; install: {sys.executable} -m pip install {' '.join(lacking)}"


def environment() -> dict[str, str]:
    """The environment variables of a job: Ray Train's and ours. Ray shows them to all: no key is sent."""
    pass

    return TRAIN_ENVIRONMENT | JOB_ENVIRONMENT


def stage(folder: Path, order: dict[str, Any] | None = None) -> Path:
    """A new folder `folder/code` with farspan's packages and, where given, the job's order. Returns it."""
    code = folder / "code"
    for room in ROOMS:
        shutil.copytree(ROOT / room, code / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    if order is not None:
        (code / ORDER).write_text(json.dumps(order, indent=1), encoding="utf-8")
    return code


def read_order() -> dict[str, Any]:
    """The order of the job that this code was packaged with."""
    return json.loads((ROOT / ORDER).read_text(encoding="utf-8"))


REFUSED = "refused: "  # opens the line of a user's mistake that only the cluster's machines could see


# Ray Train's, in the driver, the controller and the workers.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how late an end is noticed; 2 by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",  # 60 by default, too few on a busy machine
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "3600",  # a compilation may hold Python's lock for minutes
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
