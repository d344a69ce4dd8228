"""The entry point of a job on a cluster: `python -m launch.runner.job_main`, in the folder that `launch.runner.submit`
has packaged.

Ray deletes that folder when the first driver in it ends, and a run may need several: the job goes on in a copy.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from launch.cluster.package import REFUSED

_COPY = "FARSPAN_JOB_COPY"


def main() -> int:
    """Runs the job's order, in a copy of its folder. Returns 0 done or stopped, 1 failed, 2 refused."""
    if _COPY not in os.environ:
        copy = tempfile.mkdtemp(prefix="farspan-job-")
        shutil.copytree(Path.cwd(), copy, dirs_exist_ok=True)
        os.chdir(copy)
        path = os.pathsep.join(filter(None, (copy, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, _COPY: copy, "PYTHONPATH": path}
        os.execve(sys.executable, [sys.executable, "-m", "launch.runner.job_main"], environment)
    try:
        from launch.cluster import package

        if lacking := package.missing():
            print(f"{REFUSED}{lacking}", flush=True)
            return 2
        return _run()
    finally:
        shutil.rmtree(os.environ[_COPY], ignore_errors=True)


def _run() -> int:
    from rich.console import Console

    from launch import apart, terminal
    from launch.cluster import package
    from launch.config.compose import checked
    from launch.errors import UserError
    from launch.preflight.configure import configure
    from launch.run import signals
    from launch.runner.attempts import here
    from launch.runner.result import JobContext, RunResult

    with signals.interrupted():  # SIGTERM is what `farspan stop` sends
        apart.shield()
        terminal.outlive(output=True)
        order = package.read_order()
        console = Console(file=sys.stdout, highlight=False, emoji=False, soft_wrap=True, width=200)
        try:
            config = checked(order["config"]) if "config" in order else configure(order["overrides"])
            hosted = JobContext(order["job"], order["address"], order["device"], order["code"])
            ended: RunResult = here(config, console, hosted)
        except UserError as error:
            ended = RunResult(2, reason=str(error))
        if ended.code == 2:
            console.print(f"{REFUSED}{ended.reason}", markup=False)
        return ended.code


if __name__ == "__main__":
    sys.exit(main())
