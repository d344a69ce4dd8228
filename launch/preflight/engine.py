"""Refusals of an engine that cannot do a run, or does not work on this machine."""

from launch.doctor.doctor import failure
from parallel.schedule.mesh import Mesh
from train.run_config import RunConfig


def check_engine(config: RunConfig, mesh: Mesh, device: str) -> None:
    """Raises ValueError for what the engine cannot do, and where its trial of `farspan doctor` fails here, which takes
    some seconds. device: of the workers. On a cluster, whose machines are others, nothing is tried."""
    from train.engines.refusals import PACKAGES, name_of, plain, refuse

    refuse(config, mesh, device)
    if plain(config) or config.cluster.kind == "ray":
        return
    package, _, extra = PACKAGES[config.engine.target.rpartition(".")[2]]
    if (why := failure(package)) is not None:
        raise ValueError(
            f"engine={name_of(config)}: {package} does not work here ({why}); pip install --upgrade "
            f"'farspan[{extra}]', or engine=fsdp"
        )
