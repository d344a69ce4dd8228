"""`farspan plan cost.profile=true`: measures what steps of the model cost on this machine, and stores it."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from launch.errors import UserError
from launch.preflight.check import device_of
from launch.preflight.checked import cores
from launch.preflight.refusals import refusals
from launch.world import spawn
from train.run_config import RunConfig

ENTRY = "train.measure_costs:run"


def measured(config: RunConfig) -> int:
    """Measures in as many processes as the run has workers here, and prints the constants. Raises UserError."""
    from train.cost_profile import CostProfile, machine_name, order_of, profile_path

    cluster = config.cluster
    if cluster.kind == "ray":
        raise UserError("cost.profile=true: measures this machine; must come with cluster=none or cluster=local")
    with refusals(config):
        device = device_of(cluster)
        config.model.build()
    most = cores() if device == "cpu" else cluster.workers
    workers = min(cluster.workers, max(most, 2))
    threads = cluster.threads or max(1, cores() // cluster.workers)
    path = profile_path(config, machine_name(device, threads))
    with tempfile.TemporaryDirectory(prefix="farspan-costs-") as place:
        aside = Path(place) / "costs.json"
        outcome = spawn.spawn(
            ENTRY,
            order_of(replace(config, cost=replace(config.cost, path=None)), device, aside),
            workers=workers,
            run_dir=Path(place),
            device=device,
            threads=threads,
            tick=lambda: None,
            say=lambda line: print(line, file=sys.stderr),
        )
        if not outcome.ok:
            print(f"failed: {outcome.reason}", file=sys.stderr)
            return outcome.exit_code or 1
        profile = CostProfile.read(aside)
    try:
        profile.write(path)
    except OSError as error:
        raise UserError(f"cost.path={path}: cannot be written ({error.strerror})") from None
    lines = [f"measured on {profile.machine}, {workers} at once", *profile.lines(), f"stored in {path}"]
    print("\n".join(f"{'' if i else 'costs':<12}{line}" for i, line in enumerate(lines)))
    return 0
