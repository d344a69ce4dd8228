"""Refusals of an engine that cannot do a run, or does not work on this machine."""

import os
import subprocess
import sys
from pathlib import Path

from parallel.schedule.mesh import Mesh
from train.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60.0  # seconds that a trial may take; it takes ten, most of them imports


def check_engine(config: RunConfig, mesh: Mesh, device: str) -> None:
    """Raises ValueError for what the engine cannot do, and where one step of two parameters fails here, which takes
    some seconds. device: of the workers. On a cluster, whose machines are others, nothing is tried."""
    from train.engines.refusals import PACKAGES, name_of, plain, refuse

    refuse(config, mesh, device)
    if plain(config) or config.cluster.kind == "ray":
        return
    package, _, extra = PACKAGES[config.engine.target.rpartition(".")[2]]
    if (why := failure(name_of(config))) is not None:
        raise ValueError(
            f"engine={name_of(config)}: {package} does not work here ({why}); pip install --upgrade "
            f"'farspan[{extra}]', or engine=fsdp"
        )


def failure(engine: str) -> str | None:
    """Returns why an engine's trial fails here, in one line; None where it passes, and where it does not end in
    time."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        trial = subprocess.run(
            [sys.executable, "-c", f"from train.engines.trial import step; step({engine!r})"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return None
    return (trial.stderr.strip().splitlines() or ["no word"])[-1][:200] if trial.returncode else None
