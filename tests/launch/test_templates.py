"""Templates: what is rendered is what Slurm, KubeRay and Ray accept; mistakes cost one line; a Slurm job is tried."""

import copy
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf

from launch.cli import main
from launch.cluster.placement import place
from launch.commands.template import machines
from launch.commands.train import automatic
from launch.config.compose import composed
from launch.errors import UserError
from launch.templates import command, commented, key_of, kuberay, own_words, ray_up, slurm
from tests.jobs import overrides
from train.run_config import RunConfig

pytestmark = pytest.mark.composes

KUBE = ["cluster=kuberay", "cluster.template.image=registry/farspan:1", "cluster.template.claim=runs"]
LOCAL = ["cluster=ray_up", "cluster.template.head_ip=10.0.0.9", "cluster.template.worker_ips=[10.0.0.10]"]
ALL = (["cluster=slurm"], KUBE, [*KUBE, "cluster.template.resource=RayCluster"], LOCAL)
HARD = ['run.name=it\'s "one"; $(touch x) `y`', "init_from=a b\nc: d", "model.pattern=[gla,attn]"]


@cache
def _composed(cluster: str) -> dict:
    return composed([cluster]).to_dict()


def configured(cluster: str, *words: str) -> RunConfig:
    """The configuration under words that Hydra need not read: composing takes half a second."""
    config = copy.deepcopy(_composed(cluster))
    for word in words:
        key, _, value = word.partition("=")
        node, *path = config, *key.split(".")
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = (
            value if word in HARD else int(float(value)) if re.fullmatch(r"\d+e\d+", value) else yaml.safe_load(value)
        )
    return RunConfig.of(config)


def render(*words: str) -> str:
    """The text, without the checks of the run that `farspan template` does besides."""
    config = configured(*words)
    found = machines(config)
    assert found is not None
    return found.render(config, list(words))


def resource(*words: str) -> dict:
    return yaml.safe_load(render(*KUBE, *words))


# ---- what all of them do


@pytest.mark.parametrize("cluster", ALL, ids=lambda words: words[0] + (words[-1] if "Ray" in words[-1] else ""))
def test_the_verb_prints_the_file_of_a_checked_run(cluster, tmp_path, capsys):
    """The corpus need not be here: only the cluster may see it."""
    words = [*overrides(tmp_path), *cluster, "cluster.workers=4", "parallel.sequence=2", "data.path=/on/the/cluster"]
    assert main(["template", *words]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    commands = [line for line in said.out.splitlines() if "cluster=ray " in line]
    assert commands and all("cluster.workers=4 cluster.device=cuda cluster.restarts=3" in line for line in commands)
    assert "data.path=/on/the/cluster" in commands[0] and "parallel.sequence=2" in commands[0]
    assert not any("cluster.template" in line or "cluster=slurm" in line for line in commands)


def test_words_of_the_cluster_stay_behind_and_others_travel_as_they_are():
    words = ["cluster=slurm", "+cluster.workers=3", "~cluster.threads", "train.tokens=5e6", "run.dir=here", "seed=1"]
    assert own_words(words, "run.dir") == ["train.tokens=5e6", "seed=1"]
    assert key_of("mixer@model.blocks.gla.mixer=gla") == "mixer" and key_of("++run.dir=x=y") == "run.dir"
    assert shlex.split(command(*HARD)) == HARD
    assert commented("one\ntwo: 3\n#", "") == "# one\n# two: 3\n# #\n#\n"


def test_explicit_threads_and_devices_travel():
    text = render("cluster=slurm", "cluster.threads=4", "cluster.device=cpu", "cluster.restarts=0")
    assert "cluster.device=cpu cluster.restarts=0 cluster.threads=4" in text
    assert "cluster.device=cpu" in render("cluster=slurm", "cluster.template.gpus_per_node=0")


def test_planned_machines_hold_a_worker_a_gpu_or_a_core():
    found = machines(configured("cluster=slurm", "cluster.template.cpus_per_node=32"))
    assert [(node.name, node.slots) for node in found.nodes_planned()] == [("node 1", 8), ("node 2", 8)]
    assert {node.slots for node in found.nodes_planned("cpu")} == {32}
    local = machines(configured(*LOCAL))
    assert [node.name for node in local.nodes_planned()] == ["10.0.0.9", "10.0.0.10"]
    placement = place(16, local.nodes_planned(), {"data": 1, "sequence": 16})
    assert placement.lines()[-1] == "sequence x16: over 2 neighbouring nodes"
    assert machines(configured("cluster=none")) is None


def test_plan_shows_the_machines_of_a_template(tmp_path, capsys):
    jobs = [word for word in overrides(tmp_path) if not word.startswith("cluster")]
    assert main(["plan", *jobs, "cluster=slurm", "cluster.workers=16", "parallel.data=8"]) == 0
    said = capsys.readouterr().out
    for words in ("node 1  ranks 0-7", "node 2  ranks 8-15", "data x8: across nodes", "sequence x2: inside a node"):
        assert words in said
    assert main(["plan", *jobs, "cluster=none", "cluster.workers=2"]) == 0
    assert "placement   this machine  ranks 0-1" in capsys.readouterr().out


# Through the command line: what the configuration, the run and the placement refuse.
REFUSED = {
    "cluster=local": "cluster=local: describes no machines; accepts cluster=kuberay, ray_up, slurm",
    "cluster=slurm cluster.template.nodes=0": "cluster.template.nodes=0: must be at least 1",
    "cluster=slurm cluster.template.nods=3": "cluster.template.nods: no such key; nearest: cluster.template.nodes",
    "cluster=slurm cluster.template.nodes=two": "cluster.template.nodes=two: expected a whole number",
    "cluster=slurm cluster.workers=17": "cluster.workers=17: the cluster has room for 16 (node 1: 8, node 2: 8)",
    "cluster=slurm parallel.sequence=3": "parallel.sequence=3: must divide cluster.workers=16",
    "cluster=slurm +cluster.template.directives.nice=low": "cluster.template.directives.nice=low: expected a whole "
    "number",
    "cluster=slurm cluster.device=cuda cluster.template.gpus_per_node=0": "cluster.device=cuda: "
    "cluster.template.gpus_per_node=0; accepts auto or cpu",
    "cluster=slurm model.dim=0": "model.dim=0: must be at least 1",
    "cluster=slurm train.tokns=3": "train.tokns: no such key; nearest: train.tokens",
    "cluster=slurm cluster.template._target_=train.engines.FSDP cluster.template.nodes=2": "cluster.template.",
    "cluster=kuberay": "cluster.template.image=null: must name one that holds farspan",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_costs_one_line(mistake, tmp_path, capsys):
    words = [word for word in overrides(tmp_path) if not word.startswith("cluster")]
    assert main(["template", *words, *shlex.split(mistake)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and REFUSED[mistake] in said.err, said.err


# What the templates themselves refuse: cluster.template.KEY=VALUE.
MISTAKES = {
    "cluster=slurm": {
        "time=1h": "expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]",
        "memory=64Gi": "expected a whole number with K, M, G or T",
        "grace=5": "must be at least 30",
        "dashboard_port=6379": "is cluster.template.port already",
        "port=80": "expected a port between 1024 and 64000",
        "partition=a b": "expected names, separated by commas",
        "output=run %j": "expected a path without blanks",
        "interface=eth0;reboot": "expected the name of a network interface",
        "directives={time: 5}": ".time=5: is set by cluster.template.time",
        "directives={constrain: x}": ".constrain=x: no such option here; accepts begin, clusters",
        "directives={open-mode: truncate}": "no such option here",
        'setup=["a\\nb"]': "cluster.template.setup[0]=a b: expected one line of shell",
    },
    "cluster=kuberay": {
        "image=a": "cluster.template.claim=null: must name a volume claim that all pods can write",
        "resource=RayServe": "must be one of RayJob, RayCluster",
        "submission_mode=SidecarMode": "must be one of HTTPMode, K8sJobMode",
        "auth=none": "must be one of token, disabled",
        "memory=lots": "expected an amount, as 512Gi",
        "name=Far": "expected a name of small letters, digits and -",
        f"name={'a' * 48}": "has 48 characters; KubeRay takes 47",
        "mount=runs": "expected an absolute path",
        "head_cpus=0": "must be at least 1",
    },
    "cluster=ray_up": {
        "port=6379": "cluster.template.head_ip=null: must name the machine that leads",
        "provider=gcp": "must be one of local, aws",
        "provider=aws ami=latest": "cluster.template.ami=latest: expected an image",
        "provider=aws region=USA": "cluster.template.region=USA: expected a region",
        "provider=aws disk=1": "cluster.template.disk=1: must be at least 20",
    },
}


@pytest.mark.parametrize(("cluster", "mistake"), [(c, m) for c in MISTAKES for m in MISTAKES[c]])
def test_a_templates_mistake_names_its_key(cluster, mistake):
    words = mistake.split() if mistake.startswith("provider=aws ") else [mistake]
    with pytest.raises((UserError, ValueError)) as refused:
        render(cluster, *(f"cluster.template.{word}" for word in words))
    line = str(refused.value)
    assert MISTAKES[cluster][mistake] in line and line.startswith("cluster.template.") and "\n" not in line
    if len(words) == 1 and "cluster.template" not in MISTAKES[cluster][mistake] and "{" not in mistake:
        assert line.startswith(f"cluster.template.{mistake}: ")


def test_values_that_only_the_schemas_know_are_refused_with_their_field():
    for words, line in (
        ([*KUBE, "cluster.template.tolerations=[{efect: NoSchedule}]"], "tolerations.0: Additional properties are not"),
        ([*KUBE, "cluster.template.labels={a: 3}"], "cluster.template: metadata.labels.a: 3 is not of type 'string'"),
        ([*KUBE, "run.dir=/tmp/x"], "run.dir=/tmp/x: all pods must see it; expected a folder in /mnt/farspan"),
        ([*KUBE, "run.name=a b"], "run.dir='/mnt/farspan/runs/a b': expected a path of letters"),
    ):
        with pytest.raises(ValueError) as refused:
            render(*words)
        assert line in str(refused.value)
    with pytest.raises(UserError, match=r"worker_ips\[0\]=10.0.0.9: is named twice"):
        render(*LOCAL, "cluster.template.worker_ips=[10.0.0.9]")


# ---- Slurm


def test_the_script_is_bash_and_its_words_come_through_a_shell():
    words = ["cluster=slurm", *HARD, "cluster.template.setup=[module load python,'source \"$HOME/v/bin/activate\"']"]
    text = render(*words)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    last_option = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#") and line)
    assert last_option < first_command  # Slurm stops reading there
    # bash itself says what farspan would be told.
    run = "/r u/it's"
    quoting = "\n".join(line for line in lines if line.startswith(("apostrophe=", "quoted=")))
    functions = text[text.index("begin() {") : text.index("set +eu")].replace("exec farspan", "printf '%s\\0'")
    said = subprocess.run(
        ["bash", "-c", f'url=http://10.0.0.1:8265 run="$0"\n{quoting}\n{functions}\nbegin; printf "|\\0"; again', run],
        capture_output=True,
        text=True,
        check=True,
    )
    begin, again = (part.strip("\0").split("\0") for part in said.stdout.split("|"))
    settled = ["train", "cluster=ray", "cluster.address=http://10.0.0.1:8265", "cluster.workers=16"]
    settled += ["cluster.device=cuda", "cluster.restarts=3"]
    assert begin == [*settled, *HARD, r"run.dir='/r u/it\'s'"]
    assert again == [*settled, r"resume='/r u/it\'s'"]
    assert composed([begin[-1]]).run.dir == composed([again[-1]]).resume == run
    if shellcheck := shutil.which("shellcheck"):  # SC2329: it does not see that traps call functions
        subprocess.run([shellcheck, "-e", "SC2329", "-"], input=render("cluster=slurm"), text=True, check=True)


def test_the_run_of_a_job_has_a_folder_that_a_requeued_job_finds_again():
    def folder(*words: str) -> str:
        return next(line for line in render("cluster=slurm", *words).splitlines() if line.startswith("run="))

    assert folder() == 'run="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"'
    assert folder("run.name=first") == "run=runs/first"
    assert folder("run.dir=/shared/first", "run.name=second") == "run=/shared/first"
    resumed = render("cluster=slurm", "resume=runs/old", "train.tokens=9e6")
    begin, again = (line.split(maxsplit=1)[1] for line in resumed.splitlines() if re.match(r"(begin|again)\(", line))
    assert begin == again and "resume=runs/old train.tokens=9e6" in begin and "run.dir" not in begin


def test_directives_are_those_of_the_settings():
    words = ["nodes=4", "gpu=h100", "time=2-12", "partition=long", "account=me", "qos=high", "memory=900G"]
    words += ["requeues=0", "grace=60", "exclusive=false", "directives={constraint: 'ib&h100', mail-type: 'END,FAIL'}"]
    text = render("cluster=slurm", *(f"cluster.template.{word}" for word in words))
    assert [line for line in text.splitlines() if line.startswith("#SBATCH")] == [
        f"#SBATCH --{option}"
        for option in (
            "job-name=farspan", "nodes=4", "ntasks-per-node=1", "cpus-per-task=64", "gres=gpu:h100:8", "mem=900G",
            "time=2-12", "partition=long", "account=me", "qos=high", "output=%x-%j.out", "open-mode=append",
            "signal=B:USR1@60", "no-requeue", "constraint=ib&h100", "mail-type=END,FAIL",
        )
    ]  # fmt: skip
    assert "--gres" not in render("cluster=slurm", "cluster.template.gpus_per_node=0").split("set -euo")[0]


@pytest.mark.parametrize(
    ("option", "right", "wrong"),
    [
        ("time", "90 90:30 24:00:00 2-12 2-12:30 2-12:30:00 UNLIMITED", "1h 1-2-3 24: :30 1:2:3:4"),
        ("mem", "0 512 512K 512M 512G 2T", "512Gi 1.5G -1 G"),
        ("gres", "gpu gpu:8 gpu:h100:8 gpu:8,shard:2", "gpu: gpu:8: :8"),
        ("signal", "TERM USR1@60 B:TERM@120 R:15", "B: @60 B:TERM@"),
        ("dependency", "afterok:12 afterok:12:13,afterany:14 singleton", "after ok:12 afterok:x"),
        ("mail-type", "END END,FAIL TIME_LIMIT_90", "end NEVER END,"),
        ("nodelist", "n1 n1,n2 gpu[01-04,7]", "n;1 a|b"),
        ("switches", "2 2@60 2@1-00:00:00", "x 2@"),
    ],
)
def test_values_have_the_forms_that_slurm_reads(option, right, wrong):
    pattern, _ = slurm.OPTIONS[option]
    assert all(re.fullmatch(pattern, value) for value in right.split())
    assert not any(re.fullmatch(pattern, value) for value in wrong.split())


FAKES = {
    # One machine plays all: srun starts the command here, once.
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [[ $1 == show ]]; then printf "%s\\n" ${3//,/ }; else echo "$@" >>"$SLURM_SUBMIT_DIR/scontrol"; fi',
    "hostname": "echo 127.0.0.1\n",
}
FARSPAN = """\
import json, os, pathlib, signal, sys, time, urllib.error, urllib.request
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
words = dict(word.split("=", 1) for word in sys.argv[2:])
def ask(headers):
    request = urllib.request.Request(words["cluster.address"] + "/nodes?view=summary", headers=headers)
    return json.load(urllib.request.urlopen(request))
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
told = ask({"Authorization": "Bearer " + token.read_text()})
try:
    ask({})
    open_to_all = True
except urllib.error.HTTPError as error:
    open_to_all = error.code != 401
alive = [node for node in told["data"]["summary"] if node["raylet"]["state"] == "ALIVE"]
run = pathlib.Path((words.get("run.dir") or words["resume"]).strip("'"))
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").touch()
here = pathlib.Path(os.environ["SLURM_SUBMIT_DIR"])
seen = {"words": sys.argv[1:], "machines": len(alive), "open": open_to_all, "mode": oct(token.stat().st_mode)[-3:],
        "private": oct(token.parent.stat().st_mode)[-3:], "directory": os.getcwd()}
(here / "seen.part").write_text(json.dumps(seen))
(here / "seen.part").rename(here / "seen.json")
while (here / "hold").exists() and not stopped:
    time.sleep(0.1)
(run / "summary.json").write_text(json.dumps({"stopped": bool(stopped)}))
sys.exit(int((here / "code").read_text()) if (here / "code").exists() else 0)
"""


@pytest.fixture
def stage(tmp_path):
    """A folder that plays the shared file system, with stand-ins for Slurm and farspan first on the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
    (programs / "farspan").write_text(f"#!{sys.executable}\n{FARSPAN}")
    for program in programs.iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def batch(stage: Path, number: int, nodes: int, restarts: int = 0, **more: str) -> subprocess.Popen:
    """The rendered script as Slurm would start it; its machines are all this one."""
    words = ["gpus_per_node=0", "cpus_per_node=1", "exclusive=false", "join=60", f"nodes={nodes}"]
    script = stage / "job.sh"
    script.write_text(
        render("cluster=slurm", f"cluster.workers={nodes}", *(f"cluster.template.{word}" for word in words))
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
    environment |= {
        "PATH": os.pathsep.join([str(stage / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_SUBMIT_DIR": str(stage),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NAME": "far",
        "SLURM_JOB_NODELIST": ",".join(["127.0.0.1", "localhost"][:nodes]),
        **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        **more,
    }
    return subprocess.Popen(
        ["bash", str(script)], env=environment, cwd=stage, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)


def processes(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in words:
            found.append(words)
    return found


@pytest.mark.slow
@pytest.mark.e2e
def test_a_job_starts_ray_follows_its_run_saves_at_the_limit_and_goes_on(stage):
    """Two machines on one host; then, queued again, one."""
    number = os.getpid() % 30_000 + 30_000
    scratch = Path(f"/tmp/farspan-{number}")
    (stage / "hold").touch()
    process = batch(stage, number, nodes=2)
    try:
        wait_for(stage / "seen.json", process)
        process.send_signal(signal.SIGUSR1)  # the time limit is near
        said, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    seen = json.loads((stage / "seen.json").read_text())
    run = stage / "runs" / f"far-{number}"
    url = next(word.partition("=")[2] for word in seen["words"] if word.startswith("cluster.address="))
    assert seen["words"] == [
        *["train", "cluster=ray", f"cluster.address={url}", "cluster.workers=2", "cluster.device=cpu"],
        *["cluster.restarts=3", f"run.dir='{run}'"],
    ]
    assert url == f"http://127.0.0.1:{8265 + number % 1000}"
    assert seen["machines"] == 2 and not seen["open"]
    assert seen["mode"] == "600" and seen["private"] == "700" and seen["directory"] == str(stage)
    assert process.returncode == 0, said
    assert "the run is saved, and the job queues again" in said
    assert (stage / "scontrol").read_text() == f"requeue {number}\n"
    assert not scratch.exists() and not list(stage.glob(".farspan-*"))
    assert not processes(str(scratch))

    for name in ("hold", "seen.json", "scontrol"):
        (stage / name).unlink()
    (stage / "code").write_text("3")  # farspan's exit code is the job's
    process = batch(stage, number, nodes=1, restarts=1)
    try:
        said, _ = process.communicate(timeout=90)
    finally:
        process.kill()
        shutil.rmtree(scratch, ignore_errors=True)
    seen = json.loads((stage / "seen.json").read_text())
    assert seen["words"][-1] == f"resume='{run}'" and seen["machines"] == 1
    assert process.returncode == 3, said
    assert not (stage / "scontrol").exists() and not processes(str(scratch))


@pytest.mark.e2e
def test_a_job_whose_machines_do_not_meet_says_so_and_leaves_nothing(stage):
    (stage / "bin" / "ray").write_text("#!/usr/bin/env bash\necho no such luck\nexit 4\n")
    (stage / "bin" / "ray").chmod(0o755)
    process = batch(stage, 70_001, nodes=1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Ray did not start on 127.0.0.1" in said and "no such luck" in said
    assert not list(stage.glob(".farspan-*")) and not (stage / "seen.json").exists()
    for name, words in (("farspan", "farspan is not on the PATH"), ("scontrol", "expected 1 machines, Slurm gave 0")):
        (stage / "bin" / name).write_text("#!/usr/bin/env bash\nexit 1\n")
        path = f"{stage / 'bin'}:/usr/bin:/bin"
        if name == "farspan":
            (stage / "bin" / name).unlink()
        else:
            (stage / "bin" / "farspan").write_text("#!/bin/sh\n")
            (stage / "bin" / "farspan").chmod(0o755)
        said, _ = (again := batch(stage, 70_002, nodes=1, PATH=path)).communicate(timeout=60)
        assert again.returncode == 1 and words in said, said


# ---- KubeRay


def test_a_rayjob_trains_on_pods_that_share_the_run():
    job = resource("train.tokens=5e6", "run.name=first")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert shlex.split(spec["entrypoint"]) == [
        *["farspan", "train", "cluster=ray", "cluster.address=auto", "cluster.workers=16", "cluster.device=cuda"],
        *["cluster.restarts=3", "train.tokens=5e6", "run.name=first", "run.dir=/mnt/farspan/runs/first", "resume=auto"],
    ]
    assert spec["submissionMode"] == "HTTPMode" and spec["ttlSecondsAfterFinished"] == 3600
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_TRAIN_V2_ENABLED"] == "1"
    cluster = spec["rayClusterSpec"]
    from importlib.metadata import version

    assert cluster["rayVersion"] == version("ray") and cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    head, worker = (g["template"]["spec"]["containers"][0] for g in (cluster["headGroupSpec"], group))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # no worker there
    assert worker["resources"]["requests"] == worker["resources"]["limits"]
    assert worker["resources"]["limits"] == {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8"}
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    for pod in (head, worker):
        assert {"name": "runs", "mountPath": "/mnt/farspan"} in pod["volumeMounts"]
    volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}


def test_the_rest_of_kubernetes_is_passed_on():
    words = ["namespace=ml", "service_account=trainer", "pull_secrets=[reg]", "labels={kueue.x-k8s.io/queue-name: q}"]
    words += ["node_selector={pool: h100}", "tolerations=[{key: gpu, operator: Exists, effect: NoSchedule}]"]
    words += ["auth=disabled", "shm=null", "shutdown=false"]
    job = resource(*(f"cluster.template.{word}" for word in words))
    assert job["metadata"] == {"name": "farspan", "namespace": "ml", "labels": {"kueue.x-k8s.io/queue-name": "q"}}
    assert "ttlSecondsAfterFinished" not in job["spec"]
    cluster = job["spec"]["rayClusterSpec"]
    head, worker = (g["template"]["spec"] for g in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]))
    assert worker["nodeSelector"] == {"pool": "h100"} and "nodeSelector" not in head
    assert worker["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert worker["serviceAccountName"] == "trainer" and head["imagePullSecrets"] == [{"name": "reg"}]
    assert [volume["name"] for volume in worker["volumes"]] == ["runs"]
    assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in head["containers"][0]["env"]


def test_a_second_set_of_pods_goes_on_with_the_run_of_the_first(tmp_path):
    """And so does a job that the operator submits once more, with no retries at all."""
    run = tmp_path / "runs" / "farspan"
    for retries in (0, 2):
        job = resource(f"cluster.template.retries={retries}", f"cluster.template.mount={tmp_path}", *HARD[1:])
        assert job["spec"]["backoffLimit"] == retries
        words = shlex.split(job["spec"]["entrypoint"])
        assert words[:2] == ["farspan", "train"] and words[-1] == "resume=auto"
        first = automatic(words[2:], pytest.fail) or []
        assert first[-3:] == [*HARD[1:], f"run.dir={run}"] and first == words[2:-1]
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(composed([]).to_dict())))
    said: list[str] = []
    assert (automatic(words[2:], said.append) or [])[-2:] == ["cluster.restarts=3", f"resume={run}"]
    assert automatic([], pytest.fail) == []  # the default job
    (run / "metrics.jsonl").write_text(json.dumps({"step": 10**9, "tokens": 10**12, "time": 0.0, "loss": 1.0}) + "\n")
    assert automatic(words[2:], said.append) is None and said.pop() == f"run {run} is complete"
    assert said == [f"resume=auto: the run in {run} goes on, in its own configuration"]


def test_an_old_pod_that_still_has_the_run_is_waited_for(tmp_path, monkeypatch):
    """For a bounded time."""
    said: list[str] = []
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr("launch.runner.attempts.LOCK_S", 0.2)
        began = time.monotonic()
        assert automatic([f"run.dir={tmp_path}", "resume=auto"], said.append) == [f"run.dir={tmp_path}"]
        assert 0.2 <= time.monotonic() - began < 10 and "in use by another run; 0 s at most" in said[0]
        monkeypatch.setattr("launch.runner.attempts.LOCK_S", 60.0)
        automatic([f"run.dir={tmp_path}", "resume=auto"], lambda line: lock.close())
    assert time.monotonic() - began < 30
    automatic([f"run.dir={tmp_path}", "resume=auto"], pytest.fail)
    with pytest.raises(UserError, match="resume=auto: needs run.dir"):
        automatic(["resume=auto"], said.append)


def test_words_that_a_submitters_shell_would_change_need_the_operator():
    assert resource("cluster.template.submission_mode=K8sJobMode", "run.name=a")["spec"]["submissionMode"]
    with pytest.raises(ValueError, match="submission_mode=K8sJobMode: its shells would change"):
        render(*KUBE, "cluster.template.submission_mode=K8sJobMode", HARD[1])


def test_a_raycluster_only_waits_and_its_comment_goes_on():
    text = render(*KUBE, "cluster.template.resource=RayCluster", "seed=3")
    cluster = yaml.safe_load(text)
    assert cluster["kind"] == "RayCluster" and "headGroupSpec" in cluster["spec"]
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert "port-forward service/farspan-head-svc 8265:8265" in comment and "get secret farspan " in comment
    assert "farspan submit cluster=ray cluster.address=http://127.0.0.1:8265 cluster.workers=16" in comment
    assert "seed=3 run.dir=/mnt/farspan/runs/farspan" in comment


@pytest.mark.parametrize("cluster", ALL[1:], ids=("RayJob", "RayCluster", "ray up"))
def test_no_word_leaves_the_comment(cluster):
    plain, hard = (yaml.safe_load(render(*cluster, *words)) for words in ([], HARD[1:]))
    if cluster is KUBE:
        plain["spec"]["entrypoint"] = hard["spec"]["entrypoint"]
    assert plain == hard


def _broken(node, path=()):
    """Copies of a document: with one key misspelt, or one value of another type."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key), "type"
        if isinstance(node, dict):
            yield (*path, key), "name"
        if isinstance(child, dict | list):
            yield from _broken(child, (*path, key))


OPEN = ("labels", "nodeSelector", "requests", "limits")  # maps whose keys are the user's


@pytest.mark.parametrize("kind", kuberay.RESOURCES)
def test_the_schema_refuses_every_misspelt_field_and_wrong_type(kind):
    words = ["labels={a: b}", "node_selector={pool: h100}", "tolerations=[{key: gpu, operator: Exists}]", "namespace=n"]
    words += ["service_account=s", "pull_secrets=[reg]", f"resource={kind}"]
    whole = resource(*(f"cluster.template.{word}" for word in words))
    validator = Draft202012Validator(kuberay.schema())
    Draft202012Validator.check_schema(kuberay.schema())
    assert validator.is_valid(whole)
    count = 0
    for path, how in _broken(whole):
        broken = copy.deepcopy(whole)
        node = broken
        for key in path[:-1]:
            node = node[key]
        if how == "type":
            node[path[-1]] = [3.5] if not isinstance(node[path[-1]], list) else "text"
        elif len(path) > 1 and path[-2] in OPEN:
            continue
        else:
            node[f"{path[-1]}x"] = node.pop(path[-1])
        assert not validator.is_valid(broken), (path, how)
        count += 1
    assert count > 100


# ---- ray up


@pytest.mark.parametrize("words", [LOCAL, ["cluster=ray_up", "cluster.template.provider=aws"]], ids=["local", "aws"])
def test_what_ray_up_gets_is_what_ray_accepts(words):
    text = render(*words, "cluster.template.setup=[mount /shared]", "cluster.template.activate=source v/bin/activate")
    cluster = yaml.safe_load(text)
    assert cluster["setup_commands"] == ["mount /shared"]
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert all(line.startswith("source v/bin/activate && ") for line in commands)
        assert "RAY_AUTH_MODE=token" in commands[-1] and "--num-gpus=8" in commands[-1]
        assert all(subprocess.run(["bash", "-n", "-c", line]).returncode == 0 for line in commands)
    assert "--port=6379" in cluster["head_start_ray_commands"][-1]
    assert "--address=$RAY_HEAD_IP:6379" in cluster["worker_start_ray_commands"][-1]
    assert "farspan submit cluster=ray cluster.address=http://127.0.0.1:8265 cluster.workers=16" in text
    if words is LOCAL:
        assert cluster["provider"] == {"type": "local", "head_ip": "10.0.0.9", "worker_ips": ["10.0.0.10"]}
    else:
        types = cluster["available_node_types"]
        assert types["worker"]["min_workers"] == types["worker"]["max_workers"] == cluster["max_workers"] == 1
        assert types["head"]["resources"] == {"CPU": 192, "GPU": 8}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"max_worker": 3}, "the file: Additional properties are not allowed \\('max_worker' was unexpected\\)"),
        ({"max_workers": "three"}, "max_workers: 'three' is not of type 'integer'"),
        ({"setup_commands": [3]}, "setup_commands.0: 3 is not of type 'string'"),
        ({"max_workers": 0}, "Ray refuses: The specified global `max_workers` is smaller"),
        ({"head_node_type": "tail"}, "Ray refuses"),
    ],
)
def test_rays_schema_and_rays_own_checks_refuse(change, line):
    whole = yaml.safe_load(render("cluster=ray_up", "cluster.template.provider=aws"))
    ray_up._check(whole)
    with pytest.raises(ValueError, match=line):
        ray_up._check({**whole, **change})


def test_one_machine_of_aws_and_spot_machines():
    alone = yaml.safe_load(render("cluster=ray_up", "cluster.template.provider=aws", "cluster.template.nodes=1"))
    assert list(alone["available_node_types"]) == ["head"] and alone["max_workers"] == 0
    words = ["provider=aws", "nodes=3", "spot=true", "ami=ami-0abc", "zone=us-east-1a"]
    spot = yaml.safe_load(render("cluster=ray_up", *(f"cluster.template.{word}" for word in words)))
    head, worker = (spot["available_node_types"][name]["node_config"] for name in ("head", "worker"))
    assert "InstanceMarketOptions" not in head and worker["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["ImageId"] == "ami-0abc" and spot["max_workers"] == 2
