"""The folder of a run that may be known to a cluster alone."""

from pathlib import Path

from launch.cluster import jobs
from launch.run import rundir
from train.settings import ClusterSettings


def run_folder(key: str, value: str, cluster: ClusterSettings) -> Path:
    """The folder of a run given as a path, a name under runs/, or the id of a job. Raises UserError.

    An id is looked for in the runs here, then, with cluster=ray, among the cluster's jobs.
    """
    folder = rundir.run_here(key, value)
    if folder is not None:
        return folder
    if cluster.kind == "ray" and "/" not in value:
        return jobs.folder_of(value, cluster.address, key)
    raise rundir.no_such_run(key, value)
