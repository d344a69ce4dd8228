"""`farspan doctor`: what it finds, and that nothing it meets, broken packages and dead addresses included, stops it."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.cluster import nodes
from launch.commands import doctor as commands
from launch.doctor import doctor, machine
from launch.doctor.doctor import Fact, package
from models.mixers import MIXERS

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_limits_of_control_groups_are_the_least_of_all_levels(tmp_path):
    assert machine.limits(tmp_path) == (None, None)
    write(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    write(tmp_path / "sys/fs/cgroup/job/step/cpu.max", "max 100000\n")
    write(tmp_path / "sys/fs/cgroup/job/cpu.max", "150000 100000\n")
    write(tmp_path / "sys/fs/cgroup/job/step/memory.max", "8000000000\n")
    write(tmp_path / "sys/fs/cgroup/job/memory.max", "max\n")
    assert machine.limits(tmp_path) == (1.5, 8_000_000_000)


def test_limits_of_the_older_control_groups(tmp_path):
    write(tmp_path / "proc/self/cgroup", "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "300000\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")  # none
    write(tmp_path / "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "5000000000\n")
    assert machine.limits(tmp_path) == (3.0, 5_000_000_000)


def test_a_processor_by_name_and_instruction_sets(tmp_path):
    intel = write(tmp_path / "intel", "model name\t: Fast  CPU\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_bf16\n")
    assert machine.processor(intel, "x86_64") == ("Fast CPU", ["avx2", "avx512f", "avx512_bf16", "amx_bf16"])
    arm = write(tmp_path / "arm", "processor\t: 0\nFeatures\t: fp asimd sve bf16\n")
    assert machine.processor(arm, "aarch64")[1] == ["asimd", "bf16", "sve"]
    assert machine.processor(tmp_path / "none", "x86_64")[1] == []


def test_memory_and_file_systems_where_the_system_says(tmp_path):
    assert machine.memory(write(tmp_path / "m", "MemTotal: 8 kB\nMemFree: 1 kB\nMemAvailable: 4 kB\n")) == (8192, 4096)
    assert machine.memory(tmp_path / "none") is None
    mounts = f"1 0 0:1 / / rw - ext4 /dev/x rw\n2 1 0:2 / {tmp_path} rw shared:1 - nfs4 host:/x rw\n"
    mounted = write(tmp_path / "mountinfo", mounts)
    assert machine.file_system(tmp_path / "a", mounted) == "nfs4" and machine.file_system(Path("/"), mounted) == "ext4"
    assert machine.file_system(tmp_path, tmp_path / "none") == ""


def test_the_disk_is_measured_and_nothing_is_left(tmp_path):
    disk = machine.disk(tmp_path, size=8 << 20)
    assert disk.write > 0 and disk.read > 0 and disk.free > 0 and disk.locks
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_either(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        machine.disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.fcntl, "flock", lambda *_: None)  # grants every lock
    fact = doctor._disk(tmp_path / "run")
    assert fact.sign == "broken" and fact.needed and "locks" in fact.value


@linux
def test_a_folder_that_cannot_be_written_is_found():
    fact = doctor._disk(Path("/proc/runs/first"))
    assert fact.sign == "broken" and fact.needed and "/proc cannot be written" in fact.value


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the import path of this process and of those that it starts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_package_that_is_not_there_is_missing():
    fact = package("no-such-package", "", False)
    assert fact == Fact("no-such-package", "missing", "pip install no-such-package", False)
    assert "github.com/NVIDIA/apex" in package("apex", "", False).value


def test_a_package_is_tried_and_of_a_version_that_fits():
    fact = package("numpy", ">=1.26", True)
    assert fact.sign == "ok" and fact.value.startswith(version("numpy")) and fact.needed
    fact = package("numpy", "<1", True)
    assert fact.sign == "broken" and "farspan needs <1" in fact.value


BROKEN = {
    "raise ImportError('libcudart.so.99: cannot open shared object file')": "ImportError: libcudart.so.99",
    "import no_such_dependency": "ModuleNotFoundError: No module named 'no_such_dependency'",
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "killed by SIGSEGV",
    "raise SystemExit(3)": "SystemExit: 3",
    "def f(:": "SyntaxError",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_package_that_is_there_but_does_not_work_is_broken(site, code):
    write(site / "broken_package/__init__.py", code)
    write(site / "broken_package-1.2.dist-info/METADATA", "Name: broken-package\nVersion: 1.2\n")
    fact = package("broken-package", "", False)
    assert fact.sign == "broken" and fact.value.startswith("1.2: ") and BROKEN[code] in fact.value
    assert "\n" not in fact.value


def test_a_package_that_hangs_is_given_up_with_all_that_it_started(site, monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT", 2.0)
    code = "import subprocess, pathlib, time; p = subprocess.Popen(['sleep', '100']);"
    write(site / "hangs.py", f"{code} pathlib.Path({str(site / 'pid')!r}).write_text(str(p.pid)); time.sleep(100)")
    began = time.monotonic()
    fact = package("hangs", "", False)
    assert fact.sign == "broken" and "nothing in 2 s" in fact.value and time.monotonic() - began < 20
    child = int((site / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_apex_of_pypi_is_not_taken_for_nvidias(site):
    write(site / "apex/__init__.py", "raise ImportError('No module named pyramid')")
    write(site / "apex-0.9.10.dev0.dist-info/METADATA", "Name: apex\nVersion: 0.9.10.dev0\n")
    fact = package("apex", "", False)
    assert fact.sign == "broken" and "0.9.10.dev0" in fact.value and "web toolkit" in fact.value


def test_nvidias_apex_is_tried(site):
    write(site / "apex/__init__.py", "")
    optimizers = write(site / "apex/optimizers/__init__.py", "from apex.optimizers.fused_adam import FusedAdam")
    write(optimizers.with_name("fused_adam.py"), "class FusedAdam: pass")
    fact = package("apex", "", False)
    assert fact.sign == "ok" and fact.value.startswith("of unknown version")
    optimizers.write_text("raise ImportError('amp_C: undefined symbol')")
    assert "undefined symbol" in package("apex", "", False).value


def test_a_torch_that_does_not_import_ends_nothing(site):
    write(site / "torch/__init__.py", "raise ImportError('libtorch_cpu.so: no such file')")
    (fact,) = doctor._torch()
    assert fact.name == "torch" and fact.sign == "broken" and fact.needed and "libtorch_cpu.so" in fact.value


def test_every_mixer_says_which_kernel_it_gets_and_why():
    found = {fact.name: fact for fact in doctor._kernels()}
    assert sorted(found) == sorted(MIXERS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for fact in found.values():
        kernel, why = fact.value.split(": ", 1)
        assert fact.sign == "ok" and not fact.needed and why, fact
        assert kernel == "PyTorch" or device == "cuda", fact
    if device == "cpu":
        assert found["gla"].value == "PyTorch: Triton has no kernels for cpu"
        assert found["attention"].value == "PyTorch: its flash kernel for CPUs"
    assert found["mom"].value == found["gated_deltanet"].value  # its memories are those


def test_what_is_planned_is_not_there_and_what_is_there_is_imported():
    root = Path(doctor.__file__).parents[2]
    rooms = [root / room for room in ("conf", "data", "launch", "models", "parallel", "train")]
    files = [path for room in rooms for path in room.rglob("*") if path.suffix in (".py", ".yaml")]
    text = "\n".join(path.read_text() for path in files if path.parent != Path(doctor.__file__).parent)
    for name, each in doctor.PACKAGES.items():
        module = re.escape(each.module.partition(".")[0])
        used = re.search(rf"^\s*(import|from) {module}\b|\"{module}\.ops\b", text, re.MULTILINE)
        unused = each.brings.startswith("planned") or "oracle" in each.brings
        assert bool(used) != unused, name


def test_kernels_that_cannot_be_found_out_end_nothing(site):
    write(site / "torch/__init__.py", "raise ImportError('libtorch_cpu.so: no such file')")
    (fact,) = doctor._kernels()
    assert fact.name == "kernels" and fact.sign == "broken" and not fact.needed and "libtorch_cpu.so" in fact.value


@pytest.fixture
def ray():
    """A server that answers as a Ray dashboard does; `answer` is what it says of itself."""

    class Handler(http.server.BaseHTTPRequestHandler):
        answer = {"version": "4", "ray_version": version("ray")}

        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(self.answer).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_ray_of_the_environment(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_ray_that_answers(ray):
    address, _ = ray
    (fact,) = doctor._ray(address)
    assert fact == Fact("cluster.address", "ok", f"{address}: Ray {version('ray')} answers, as here")
    (fact,) = doctor._ray(address.removeprefix("http://"))
    assert fact.sign == "ok" and "answers" in fact.value


def test_a_ray_of_another_version_or_none_at_all(ray):
    address, handler = ray
    handler.answer = {"ray_version": "2.9.0"}
    (fact,) = doctor._ray(address)
    assert fact.sign == "broken" and "Ray 2.9.0 runs there" in fact.value and version("ray") in fact.value
    handler.answer = {"hello": "world"}
    (fact,) = doctor._ray(address)
    assert fact.sign == "broken" and "not Ray's dashboard" in fact.value


def test_no_answer_is_found_within_the_limit(monkeypatch):
    monkeypatch.setattr(nodes, "_ANSWER_S", 0.5)
    with socket.socket() as silent:  # accepts, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        (fact,) = doctor._ray(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert fact.sign == "broken" and time.monotonic() - began < 5
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for scheme in ("http://", ""):
            (fact,) = doctor._ray(f"{scheme}127.0.0.1:{closed.getsockname()[1]}")
            assert fact.sign == "broken" and "refused" in fact.value, fact


def test_addresses_that_are_none(monkeypatch, tmp_path):
    (fact,) = doctor._ray(None)
    assert fact.sign == "missing" and not fact.needed
    (fact,) = doctor._ray("somewhere")
    assert fact.sign == "broken" and "expected http://HOST:8265, HOST:PORT or auto" in fact.value
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (fact,) = doctor._ray("auto")
    assert fact.sign == "broken" and "no Ray runs on this machine" in fact.value
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (fact,) = doctor._ray(None)
    assert fact.name == "RAY_ADDRESS" and fact.sign == "broken" and not fact.needed


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([Fact("torch", "ok", "", True), Fact("triton", "missing", "")], 0),
        ([Fact("triton", "broken", "")], 0),
        ([Fact("torch", "broken", "", True)], 1),
        ([Fact("cores", "missing", "", True)], 1),
        ([Fact("cluster.address", "broken", "")], 1),  # it was asked for
        ([Fact("RAY_ADDRESS", "broken", "")], 0),  # the default job does not look at it
    ],
)
def test_the_verdict(monkeypatch, capsys, found, code):
    monkeypatch.setattr(commands, "facts", lambda *_: iter(found))
    assert commands.doctor([]) == code
    assert ("cannot run" in capsys.readouterr().out) == (code == 1 and found[0].needed)


@pytest.mark.parametrize("argument", ["run.dri=x", "--all", "run.dir=", "runs/first"])
def test_a_mistaken_argument_costs_one_line(capsys, argument):
    assert main(["doctor", argument]) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1 and argument in said.err


def test_the_requirements_are_those_of_the_package_or_of_the_checkout(monkeypatch):
    installed = doctor._requirements()
    assert {"torch", "ray", "hydra-core", "wandb"} <= set(installed[0]) and "fla-core" in installed[1]
    assert not set(installed[0]) & set(installed[1]) and "fla" not in installed[0]

    def none(_):
        raise doctor.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "requires", none)
    checkout = doctor._requirements()[0]
    assert {"torch", "ray", "hydra-core", "wandb"} <= set(checkout) and checkout["torch"].startswith(">=")


@pytest.mark.slow
@pytest.mark.e2e
def test_as_a_user_would(tmp_path, ray):
    command = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())", "doctor"]
    done = subprocess.run(
        [*command, f"run.dir={tmp_path}/runs/first", f"cluster.address={ray[0]}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"ok |missing |broken ", line)]
    names = [line[9:28].split()[0] for line in lines]
    expected = "python cores memory torch matmul devices gloo hydra-core wandb triton apex gla runs cluster.address"
    assert set(expected.split()) <= set(names)
    assert all(line[8] == " " and line[9] != " " and line[27] == " " and line[28] != " " for line in lines), lines
    for name in ("python", "cores", "torch", "gloo", "ray", "wandb", "runs", "cluster.address"):
        assert lines[names.index(name)].startswith("ok"), lines[names.index(name)]
    assert f"{tmp_path}:" in done.stdout and "can run here" in done.stdout
    assert list(tmp_path.iterdir()) == []
