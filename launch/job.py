"""The entry point of a job on a cluster: `python -m launch.job`, in the folder that `launch.submit` has packaged.

Ray deletes that folder when the first driver in it ends, and a run may need several: the job goes on in a copy.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

REFUSED = "refused: "  # opens the line of a user's mistake that only the cluster's machines could see
_COPY = "FARSPAN_JOB_COPY"


def main() -> int:
    """Runs the job's order, in a copy of its folder. Returns 0 done or stopped, 1 failed, 2 refused."""
    if _COPY not in os.environ:
        copy = tempfile.mkdtemp(prefix="farspan-job-")
        shutil.copytree(Path.cwd(), copy, dirs_exist_ok=True)
        os.chdir(copy)
        path = os.pathsep.join(filter(None, (copy, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, _COPY: copy, "PYTHONPATH": path}
        os.execve(sys.executable, [sys.executable, "-m", "launch.job"], environment)
    try:
        from launch import package

        if lacking := package.missing():
            print(f"{REFUSED}{lacking}", flush=True)
            return 2
        return _run()
    finally:
        shutil.rmtree(os.environ[_COPY], ignore_errors=True)


def _run() -> int:
    from rich.console import Console

    from launch import apart, package, preflight, stopping, terminal
    from launch.config.compose import checked
    from launch.train import Ended, Hosted, here
    from launch.user import UserError

    for number in stopping.signals():  # SIGTERM is what `farspan stop` sends
        signal.signal(number, stopping.interrupt)
    apart.shield()
    terminal.outlive(output=True)
    order = package.read_order()
    console = Console(file=sys.stdout, highlight=False, emoji=False, soft_wrap=True, width=200)
    try:
        config = checked(order["config"]) if "config" in order else preflight.configure(order["overrides"])
        hosted = Hosted(order["job"], order["address"], order["device"], order["code"])
        ended: Ended = here(config, console, hosted)
    except UserError as error:
        ended = Ended(2, reason=str(error))
    if ended.code == 2:
        console.print(f"{REFUSED}{ended.reason}", markup=False)
    return ended.code


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is decided
    sys.exit(code)
