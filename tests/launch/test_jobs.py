"""Jobs on a Ray that runs already: submitted, followed, stopped, lost, resumed, refused.

A machine is a `ray start` with ports and a folder of its own, and a token, as on a cluster of several users. Slow tests
have two of one core each. Without them one of two cores will do: how ranks of two machines meet is in test_rendezvous.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

from launch.cli import main
from launch.cluster import nodes
from launch.cluster.inspection import Sight, _folder, difference
from launch.errors import UserError
from tests import warm
from tests.jobs import overrides
from tests.launch.processes import ROOT, wait_for
from train.checkpoints import checkpoint

needs_namespace = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0, reason="needs a mount namespace"
)
RAY = str(Path(sys.executable).parent / "ray")
STEPS = 100  # of a run that is stopped on its way
FEW, MORE = 4, 16  # of one that ends; of one that loses a worker behind a checkpoint, and ends


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Cluster:
    """Ray nodes of `cores` CPUs each; `place` is the folder that all share."""

    place: Path
    cores: int = 1
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"cluster.address=http://127.0.0.1:{self.dashboard}"

    @cached_property
    def farspan(self) -> list[str]:
        """A warm command that has imported what asks Ray, with this Ray's token."""
        return warm.command("ray.job_submission", "ray.util.state", environment=tuple(self.env.items()))

    @property
    def env(self) -> dict[str, str]:
        ours = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.place / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # else the tests on the other cores go first
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(self.wrong()), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
        }
        dropped = ("RAY_ADDRESS", "WANDB_API_KEY", "RAY_AUTH_TOKEN")
        return {k: v for k, v in os.environ.items() if k not in dropped} | ours

    def wrong(self) -> Path:
        """A folder first on the path, whose `python` is not the one that runs Ray."""
        folder = self.place / "wrong"
        folder.mkdir(exist_ok=True)
        for name in ("python", "python3"):
            (folder / name).write_text("#!/bin/sh\necho this is not the Python of Ray >&2\nexit 9\n")
            (folder / name).chmod(0o755)
        return folder

    def start(self, *before: str, **more: str) -> subprocess.Popen:
        """A node: the head first. `before` runs it inside another command, `more` is in its environment."""
        which = (
            ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1"]
            + [f"--ray-client-server-port={free_port()}", f"--temp-dir={self.place / 'ray'}"]
            if not self.nodes
            else [f"--address=127.0.0.1:{self.port}"]
        )
        sizes = [f"--num-cpus={self.cores}", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"]
        # Nobody reads the workers' lines that Ray's log monitor hands to drivers; it looks for them all the time.
        ports = [f"--dashboard-agent-listen-port={free_port()}", "--include-log-monitor=false"]
        with (self.place / f"node-{len(self.nodes)}.log").open("w") as log:
            node = subprocess.Popen(
                [*before, sys.executable, RAY, "start", "--block", "--disable-usage-stats", *which, *sizes, *ports],
                env=self.env | more,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def alive(self) -> int:
        """Counts the machines that Ray says are alive. Nothing of Ray asks: pytest may hold the token of an earlier
        one."""
        token = (self.place / "token").read_text()
        address = f"http://127.0.0.1:{self.dashboard}/api/v0/nodes"
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                found = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.answer = repr(error)
            return 0
        self.answer = str(found)
        return sum(node["state"] == "ALIVE" for node in found)

    def wait_for(self, machines: int) -> None:
        """Wait until Ray has so many machines; fails with the last answer and with what its nodes printed."""
        try:
            wait_for(lambda: self.alive() == machines, 120)
        except AssertionError as error:
            logs = "\n".join(each.read_text() for each in sorted(self.place.glob("node-*.log")))
            raise AssertionError(f"{error}\n{self.answer}\n{logs}") from None

    def end(self, node: subprocess.Popen) -> None:
        node.terminate()
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            pass
        with_session(node.pid, signal.SIGKILL)
        node.wait(10)


def with_session(session: int, number: int) -> None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                os.kill(int(stat.parent.name), number)
        except (OSError, ValueError):
            continue


def in_session(session: int, words: str) -> list[int]:
    """The processes of a session whose command has `words` in it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (stat.parent / "cmdline").read_bytes().decode(errors="replace")
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session and words in command:
                found.append(int(stat.parent.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.fixture(scope="module")
def cluster(request) -> Iterator[Cluster]:
    machines = 2 if any(item.get_closest_marker("slow") for item in request.session.items) else 1
    place = Path(tempfile.gettempdir()) / f"fs-{secrets.token_hex(4)}"  # Ray's sockets need a short path
    place.mkdir(mode=0o700)
    (place / "token").write_text(secrets.token_hex(32))
    (place / "token").chmod(0o600)
    ray = Cluster(place, cores=2 // machines)
    before = {k: os.environ.get(k) for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    os.environ.update({k: ray.env[k] for k in before})
    try:
        for number in range(machines):
            ray.start()
            ray.wait_for(number + 1)
        yield ray
    finally:
        for node in ray.nodes:
            with_session(node.pid, signal.SIGKILL)
            node.wait(10)
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        shutil.rmtree(place, ignore_errors=True)


def farspan(cluster: Cluster, *words: str, code: int = 0, timeout: float = 150, cold: bool = False, **env: str) -> str:
    """Runs a command; returns its output, or its refusal. cold: in a fresh interpreter, as Ray's own processes need."""
    start = warm.COLD if cold else cluster.farspan
    done = subprocess.run(
        [*start, *words], cwd=cluster.place, env=cluster.env | env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def far(cluster: Cluster, *words: str) -> str:
    """Runs a command on a machine that does not see the folder of runs; returns its output."""
    hide = f'mount -t tmpfs none {cluster.place}/runs && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh", *warm.COLD, *words],
        cwd=cluster.place,
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps_reached(run: Path) -> int:
    return records(run)[-1]["step"]


CONSTANT = ["schedule=constant", "schedule.warmup=768"]


def job_overrides(cluster: Cluster, *more: str) -> list[str]:
    kept = [each for each in overrides(cluster.place) if not each.startswith("cluster=")]
    # A machine's cores are divided among its workers: sums over more threads are other sums.
    return [*kept, "cluster.threads=1", f"train.steps={STEPS}", "train.checkpoint_every=1920", *CONSTANT, *more]


def records(run: Path) -> list[dict]:
    """The newest attempt's record of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return list({r["step"]: r for r in lines}.values())


def numbers(run: Path) -> list[tuple]:
    return [(r["step"], r["tokens"], r["loss"], r["grad_norm"], r["lr"], r["expert_load"]) for r in records(run)]


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(cluster) -> Path:
    """The same job on this machine's own processes; `alone` trains it as far as a test needs it."""
    run = cluster.place / "runs" / "alone"
    farspan(cluster, "train", *job_overrides(cluster, f"run.dir={run}", "cluster=none", f"train.steps={FEW}"))
    return run


def alone(cluster: Cluster, run: Path, number: int) -> list[tuple]:
    """The numbers of so many steps; its rate is constant, so that they do not depend on where it ends."""
    if number > steps(run):
        farspan(cluster, "train", f"resume={run}", f"train.steps={number}")
    return numbers(run)[:number]


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def first(cluster) -> Path:
    """The folder of a job that is submitted; `logs --follow` waits for its end."""
    said = farspan(
        cluster, "submit", cluster.address, *job_overrides(cluster, "run.dir=runs/first", f"train.steps={FEW}")
    )
    assert said == "first\n"
    return cluster.place / "runs" / "first"


def lose_a_worker(run: Path) -> None:
    """Kills the second rank of a job that has a whole checkpoint, and waits until the job has begun again."""
    # A checkpoint is written beside training: behind which step it is whole depends on the machine.
    wait_for(lambda: checkpoint.newest(run / "checkpoints", lambda _: None) is not None, 120)
    (victim,) = [m["pid"] for m in json.loads((run / ".ray" / "members.json").read_text())][1:]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: records(run)[-1]["attempt"] == 2, 120)


def test_a_submitted_job_is_followed_to_its_end(cluster, first, uninterrupted):
    run = first
    logs = farspan(cluster, "logs", "first", "--follow", cluster.address)
    if len(cluster.nodes) == 2:
        assert "2 workers on 2 machines" in logs and "sequence x2: over 2 neighbouring nodes" in logs
    else:
        assert "2 workers on 1 machine, all with Python " in logs
    assert f"step {FEW}" in logs and "held-out loss" in logs and "Traceback" not in logs
    assert numbers(run) == numbers(uninterrupted)
    assert {"config.yaml", "tokenizer.json", "corpus.json"} <= {p.name for p in run.iterdir()}
    last = checkpoint.newest(run / "checkpoints", pytest.fail)
    assert last is not None and {"config.yaml", "tokenizer.json", "corpus.json"} <= {p.name for p in last.iterdir()}
    status = farspan(cluster, "status", "first", cluster.address)
    for words in (
        "succeeded",
        "complete",
        f"step        {FEW} of {FEW} (100%)",
        "held-out",
        "tokens/s",
    ):
        assert words in status, status
    assert f"step-{FEW}" in status
    listed = farspan(cluster, "list", cluster.address)
    assert re.search(r"first\s+succeeded\s+.* ago\s+" + str(run), listed)
    moved = cluster.place / "moved"  # a checkpoint alone, away from its run
    shutil.copytree(last, moved)
    assert farspan(cluster, "generate", str(moved), "prompt=alpha", "tokens=5").startswith("alpha")


@pytest.mark.slow
def test_a_submitted_job_that_loses_a_worker_goes_on_to_its_end(cluster, uninterrupted):
    job = job_overrides(cluster, "run.dir=runs/lost", f"train.steps={MORE}")
    assert farspan(cluster, "submit", cluster.address, *job) == "lost\n"
    run = cluster.place / "runs" / "lost"
    lose_a_worker(run)
    logs = farspan(cluster, "logs", "lost", "--follow", cluster.address)
    assert f"step {MORE}" in logs and "Traceback" not in logs
    assert numbers(run) == alone(cluster, uninterrupted, MORE)
    assert {r["attempt"] for r in records(run)} == {1, 2}
    status = farspan(cluster, "status", "lost", cluster.address)
    assert "succeeded" in status and "restarts    1" in status


@pytest.mark.slow
@needs_namespace
def test_a_run_that_only_the_cluster_sees_is_described(cluster, first):
    said = far(cluster, "status", "first", cluster.address)
    assert "cannot be seen from here; the last lines of its log:" in said and f"step {FEW}" in said


@pytest.mark.slow
@needs_namespace
def test_a_run_that_only_the_cluster_sees_is_resumed_by_its_id(cluster, first):
    assert far(cluster, "submit", "resume=first", f"train.steps={FEW + 2}", cluster.address) == "first-2\n"
    far(cluster, "logs", "first-2", "--follow", cluster.address)
    assert [r["step"] for r in records(first)] == [*range(1, FEW + 3)]


@pytest.fixture(scope="module")
def interrupted(cluster) -> Path:
    """The folder of a job that `farspan train` follows; it loses a worker, and is stopped by Ctrl-C."""
    run = cluster.place / "runs" / "second"
    process = subprocess.Popen(
        [*cluster.farspan, "train", "cluster=ray", cluster.address, *job_overrides(cluster, f"run.dir={run}")],
        cwd=cluster.place,
        env=cluster.env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        lose_a_worker(run)
        status = farspan(cluster, "status", "second", cluster.address)
        assert re.search(r"restarts +1", status) and re.search(r"running|starting", status)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "job second on http://" in said and "stopping after this step" in said
    reached = steps_reached(run)
    assert f"stopped at step {reached}" in said and "Traceback" not in said and reached < STEPS
    assert "stopped" in farspan(cluster, "list", cluster.address)
    assert checkpoint.newest(run / "checkpoints", pytest.fail).name == f"step-{reached}"
    return run


@pytest.mark.slow
def test_a_lost_worker_and_ctrl_c_change_no_number(cluster, uninterrupted, interrupted):
    assert numbers(interrupted) == alone(cluster, uninterrupted, steps_reached(interrupted))
    assert {r["attempt"] for r in records(interrupted)} == {1, 2}


@pytest.mark.slow
def test_a_job_resumed_by_its_id_is_stopped_and_changes_no_number(cluster, uninterrupted, interrupted):
    run, reached = interrupted, steps_reached(interrupted)
    assert farspan(cluster, "submit", "resume=second", cluster.address) == "second-2\n"
    wait_for(lambda: records(run)[-1]["step"] > reached, 120)
    said = farspan(cluster, "stop", "second-2", cluster.address)
    assert "lost: rank 1 was killed" not in said  # of the time before the stop
    last = steps_reached(run)
    assert checkpoint.newest(run / "checkpoints", pytest.fail).name == f"step-{last}"
    assert "goes on from step-" not in farspan(cluster, "logs", "second-2", cluster.address)
    assert numbers(run) == alone(cluster, uninterrupted, last)
    assert {r["attempt"] for r in records(run)} == {1, 2, 3}


@pytest.mark.slow
def test_a_machine_of_the_cluster_joins_its_ray_without_a_job(cluster, uninterrupted):
    run = cluster.place / "runs" / "joined"
    address = f"cluster.address=127.0.0.1:{cluster.port}"
    farspan(
        cluster,
        "train",
        "cluster=ray",
        address,
        *job_overrides(cluster, f"run.dir={run}", f"train.steps={FEW}"),
        cold=True,
    )
    assert numbers(run) == numbers(uninterrupted)
    assert "joined" not in farspan(cluster, "list", cluster.address)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["politely", "raylet", "machine"])
def test_a_lost_machine_is_waited_for(cluster, how):
    """One of two machines goes, as machines do; the run waits for another, and goes on from its last checkpoint."""
    name = f"waited-{how}"
    run = cluster.place / "runs" / name
    farspan(cluster, "submit", cluster.address, *job_overrides(cluster, f"run.dir=runs/{name}", "train.steps=200"))
    wait_for(lambda: steps(run) >= 8, 60)
    node = cluster.nodes.pop()
    if how == "raylet":
        os.kill(in_session(node.pid, "raylet/raylet")[0], signal.SIGKILL)
    elif how == "machine":
        with_session(node.pid, signal.SIGKILL)
    else:
        cluster.end(node)
    log = ["logs", name, cluster.address]
    wait_for(
        lambda: "waiting for machines: cluster.workers=2: the cluster has room for 1" in farspan(cluster, *log), 90
    )
    cluster.start()
    wait_for(lambda: records(run)[-1]["attempt"] == 2, 90)
    with_session(node.pid, signal.SIGKILL)
    said = farspan(cluster, "stop", name, cluster.address)
    assert "has ended" in said
    if how != "politely":
        assert "was lost with its machine" in farspan(cluster, *log)
    assert [r["step"] for r in records(run)] == list(range(1, len(records(run)) + 1))


def refused(cluster: Cluster, *words: str, **env: str) -> str:
    """The one line with which a command is refused."""
    (line,) = farspan(cluster, *words, code=2, **env).splitlines()
    return line


def test_what_the_cluster_cannot_do_is_one_line(cluster):
    before = sorted(cluster.place.glob("runs/*"))
    job = job_overrides(cluster, "run.name=never")
    line = refused(cluster, "submit", cluster.address, *job, "cluster.workers=3")
    assert "cluster.workers=3: the cluster has room for 2 (" in line
    assert line.count(f": {cluster.cores}") == len(cluster.nodes)
    line = refused(cluster, "submit", cluster.address, *job, "cluster.device=cuda")
    assert "cluster.device=cuda: no machine of http://" in line
    line = refused(cluster, "status", "frist", cluster.address)
    assert "frist: no such job at http://" in line
    for verb in ("logs", "stop"):
        assert "nosuch: no such job" in refused(cluster, verb, "nosuch", cluster.address)
    line = refused(cluster, "submit", cluster.address, "resume=nosuch")
    assert "no such job" in line
    assert "asks for a token" in refused(cluster, "list", cluster.address, RAY_AUTH_MODE="disabled")
    assert sorted(cluster.place.glob("runs/*")) == before


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_by_the_job(cluster):
    said = farspan(cluster, "submit", cluster.address, *job_overrides(cluster, "run.dir=/proc/1/nowhere"), code=2)
    assert "run.dir=/proc/1/nowhere: cannot be written (" in said


def test_where_no_ray_answers_it_is_said_within_ten_seconds(monkeypatch, capsys, tmp_path):
    assert 2 * nodes._ANSWER_S <= 10  # a connection, then an answer
    monkeypatch.setattr(nodes, "_ANSWER_S", 0.5)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        port = deaf.getsockname()[1]
        for address in (f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{port}"):
            for verb in (["submit", *overrides(tmp_path)[:1], f"data.path={tmp_path}"], ["list"], ["status", "x"]):
                began, busy = time.monotonic(), time.process_time()
                assert main([*verb, f"cluster.address={address}"]) == 2
                assert time.monotonic() - began - (time.process_time() - busy) < 5
                said = capsys.readouterr().err
                assert len(said.splitlines()) == 1 and f"cluster.address={address}: no Ray answers there" in said, said


def third(cluster: Cluster) -> list[str]:
    """A job that a third machine is needed for."""
    job = job_overrides(cluster, "run.dir=runs/refused", "cluster.workers=3", "parallel.sequence=1")
    return [*job, "train.batch_tokens=1152"]


@pytest.mark.slow
def test_a_machine_with_another_torch_is_refused(cluster):
    """A third machine, with a torch that calls itself another."""
    other = cluster.place / "other" / "torch-1.2.3.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.2.3\n")
    node = cluster.start(PYTHONPATH=f"{other.parent}{os.pathsep}{ROOT}")
    cluster.wait_for(3)
    said = farspan(cluster, "submit", cluster.address, *third(cluster), code=2)
    assert "versions of torch differ between machines: " in said and "1.2.3 on " in said, said
    assert not (cluster.place / "runs" / "refused").exists()
    cluster.end(node)
    cluster.wait_for(2)


@pytest.mark.slow
@needs_namespace
def test_a_machine_with_another_file_system_is_refused(cluster):
    """A third machine, with a run folder of its own."""
    hide = f'mount -t tmpfs none {cluster.place}/runs && exec "$@"'
    (cluster.place / "runs").mkdir(exist_ok=True)
    node = cluster.start("unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh")
    cluster.wait_for(3)
    said = farspan(cluster, "submit", cluster.address, *third(cluster), code=2)
    assert "run.dir=" in said and "does not see the run folder of the others" in said, said
    assert "expected a folder on a file system that all machines share" in said
    cluster.end(node)
    cluster.wait_for(2)


def test_differences_are_told_by_machine(tmp_path):
    same = Sight("3.11.7", "2.60.0", "2.13.0", None)
    difference({"the driver": same, "n1": same})
    with pytest.raises(UserError, match="of python differ between machines: 3.11.7 on the driver, n1; 3.12.1 on n2"):
        difference({"the driver": same, "n1": same, "n2": Sight("3.12.1", "2.60.0", "2.13.0", None)})
    assert _folder(tmp_path / "elsewhere", "token", "mark") == "does not see the run folder of the others"
    (tmp_path / "token").touch()
    assert _folder(tmp_path, "token", "mark") is None and (tmp_path / "mark").exists()
