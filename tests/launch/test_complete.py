"""Completion: what is offered, how soon, and that a real bash puts it into the line."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.commands.completion import SCRIPTS, candidates
from launch.config import files
from launch.verbs import VERBS
from tests.jobs import overrides
from tests.launch.processes import cpu_seconds

BASH = shutil.which("bash")
bash_only = pytest.mark.skipif(BASH is None, reason="there is no bash here")

# words before the cursor -> candidates that must be there, and one that must not
OFFERED = {
    ("",): ({"train", "sweep", "plan", "submit", "status", "doctor"}, "complete"),
    ("tr",): ({"train"}, "plan"),
    ("train", ""): ({"model=", "model.", "seed=", "train.", "experiment=", "mixer@model.blocks.gla.mixer="}, "train="),
    ("train", "parallel.transport."): ({"parallel.transport.recurrence=", "parallel.transport.attention="}, "model="),
    ("train", "parallel.transport.attention="): ({"parallel.transport.attention=gather"}, None),
    ("train", "cluster."): ({"cluster.workers=", "cluster.address="}, "cluster.template.nodes="),  # not in local.yaml
    ("train", "cluster=slurm", "cluster.template.n"): ({"cluster.template.nodes=", "cluster.template.name="}, None),
    ("train", "data=t"): ({"data=text"}, "data=stdlib"),
    ("train", "+data=t"): ({"+data=text"}, None),
    ("train", "~optimizer.b"): ({"~optimizer.betas"}, "~optimizer.betas="),
    ("train", "engine.reshard_after_forward="): (
        {"engine.reshard_after_forward=true", "engine.reshard_after_forward=false"},
        None,
    ),
    ("train", "cluster.device=c"): ({"cluster.device=cpu", "cluster.device=cuda"}, "cluster.device=auto"),
    ("train", "precision.compute="): ({"precision.compute=bf16", "precision.compute=fp64"}, None),
    ("train", "scheduler.layout="): ({"scheduler.layout=zigzag"}, None),
    ("train", "tracking.mode="): ({"tracking.mode=offline"}, None),
    ("train", "data.corpus="): ({"data.corpus=stdlib"}, None),
    ("train", "mixer@model.blocks.gla.mixer=attention", "model.blocks.gla.mixer."): (
        {"model.blocks.gla.mixer.kv_heads="},
        "model.blocks.gla.mixer.expand_k=",
    ),
    ("train", "model.blocks.gla.mixer.d"): (set(), "model.blocks.gla.mixer.dim="),  # the program gives it
    ("sweep", "schedule=wsd,c"): ({"schedule=wsd,constant", "schedule=wsd,cosine"}, None),
    ("train", "-"): ({"--cfg", "--help"}, "--follow"),
    ("logs", "job", "--f"): ({"--follow"}, "--cfg"),
    ("generate", "runs/x", ""): ({"prompt=", "tokens="}, "cluster.address="),
    ("evaluate", "runs/x", "evaluate.p"): ({"evaluate.parts=", "evaluate.pairs="}, "evaluate.tokens="),
    ("evaluate", "runs/x", "cluster="): ({"cluster=none"}, None),
    ("status", "x", "cl"): ({"cluster.address="}, None),
    ("completion", ""): ({"bash", "zsh", "fish"}, None),
    ("train", "model.dim="): (set(), "model.dim=256"),  # open: nothing is put into the line
}


@pytest.mark.parametrize("words", OFFERED, ids=" ".join)
def test_what_is_offered(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted, unwanted = OFFERED[words]
    found = candidates(list(words))
    assert wanted <= set(found) and unwanted not in found
    assert wanted or not found
    assert all(each.startswith(words[-1]) for each in found)


def test_every_key_of_the_default_job_is_offered():
    from launch.config import files

    keys = [key for key in files.leaves(files.written()[0]) if not key.rpartition(".")[2].startswith("_")]
    offered = {}
    for key in keys:
        parent = key.rpartition(".")[0]
        if parent not in offered:
            offered[parent] = set(candidates(["train", f"{parent}." if parent else ""]))
        assert f"{key}=" in offered[parent], key
    assert f"{keys[-1]}=" in candidates(["train", keys[-1][:-1]])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two runs, a corpus and a hidden file."""
    for name in ("runs/first", "runs/second", "my_texts", "elsewhere/third", "runs/first/checkpoints/step-9"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/first", "runs/second", "elsewhere/third"):
        (tmp_path / name / "config.yaml").touch()
    for name in ("a.txt", "my_texts/b.txt", "a b.txt", ".hidden"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_and_files_are_offered(place):
    assert set(candidates(["train", "resume="])) == {"resume=runs/first", "resume=runs/second"}
    assert candidates(["train", "resume=runs/f"]) == ["resume=runs/first"]
    assert candidates(["train", "resume=elsewhere/"]) == ["resume=elsewhere/third"]
    assert candidates(["train", "init_from=runs/first/ch"]) == ["init_from=runs/first/checkpoints/"]
    assert set(candidates(["generate", ""])) == {"runs/first", "runs/second"}
    assert candidates(["stop", "fir"]) == ["first"]
    assert set(candidates(["train", "data.path="])) == {
        f"data.path={each}" for each in ("runs/", "my_texts/", "elsewhere/", "a.txt", "a b.txt")
    }
    assert candidates(["train", "data.path=my_texts/"]) == ["data.path=my_texts/b.txt"]
    assert candidates(["train", "data.path=.h"]) == ["data.path=.hidden"]


NONSENSE = [
    "",
    "--",
    "-- nonsense x",
    "-- train a=[ = ~",
    "-- a =x",
    "-- train data.path=/no/such/place/x",
    "-- train model=none mo",
]


@pytest.mark.parametrize("line", NONSENSE)
def test_a_line_that_makes_no_sense_is_no_error(line, capsys):
    assert main(["complete", *line.split()]) == 0
    assert capsys.readouterr().err == ""


def test_only_the_three_shells_have_a_script(capsys):
    for shell in SCRIPTS:
        assert main(["completion", shell]) == 0
        assert "farspan" in capsys.readouterr().out
    assert main(["completion"]) == 2 and main(["completion", "csh"]) == 2
    assert "accepts bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_is_valid(shell):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell} here")
    check = [program, "--no-execute"] if shell == "fish" else [program, "-n"]
    done = subprocess.run(check, input=SCRIPTS[shell], text=True, capture_output=True, timeout=30)
    assert done.returncode == 0 and not done.stderr


def test_it_answers_at_once_and_imports_neither_torch_nor_hydra():
    code = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]);"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'numpy', 'ray', 'rich') if m in sys.modules], code)"
    )
    command = [sys.executable, "-c", code, "complete", "--", "train", "model."]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "model.dim=" in said and said.endswith("[] 0\n"), said


def test_a_mistyped_key_is_refused_without_torch():
    code = (
        "import sys; from launch.cli import main; codes = [main(['train', key]) for key in sys.argv[1:]];"
        "print([m for m in ('torch', 'ray', 'scipy') if m in sys.modules], codes)"
    )
    keys = ["model.dimm=3", "train.tokns=1", "optimizer.lrr=1", "model.blocks.gla.mixer.heds=2", "nodel.dim=3"]
    done = subprocess.run([sys.executable, "-c", code, *keys], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"[] {[2] * len(keys)}\n", done.stdout
    nearest = ["model.dim", "train.tokens", "optimizer.lr", "model.blocks.gla.mixer.heads", "model.dim"]
    assert [line.rpartition("nearest: ")[2] for line in done.stderr.splitlines()] == nearest


def test_checking_a_run_imports_nothing_that_only_its_workers_need(tmp_path):
    code = (
        "import sys; from launch.preflight.check import check_run; from launch.preflight.configure import configure;"
        "check_run(configure(sys.argv[1:]), print);"
        "print([m for m in ('torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.tensor',"
        "'torch.distributed.pipelining', 'torch.distributed.checkpoint', 'ray') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, *overrides(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert said.splitlines()[-1] == "[]", said


@pytest.mark.parametrize(
    ("words", "times"),
    [(["--help"], 4), (["train", "--help"], 6), (["complete", "--", "train", "model."], 9)],  # measured: 2.3, 3.4, 5.4
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_start_no_run_take_few_times_as_long_as_an_empty_program(words, times):
    """An import of torch alone takes more than thirty times as long."""
    farspan = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    assert cpu_seconds("-c", farspan, *words) < times * cpu_seconds("-c", "pass")


@pytest.fixture
def path(tmp_path_factory):
    """A PATH on which `farspan` is this checkout's."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "farspan"
    root = Path(__file__).resolve().parents[2]
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
                      "from launch.cli import main\nsys.exit(main())\n")  # fmt: skip
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


# A line and what bash, which cuts words at = : and @, is to put behind the last cut.
REPLIES = {
    "farspan tra": ["train"],
    "farspan train data=": files.groups()["data"],
    "farspan train data=t": ["text"],
    "farspan train parallel.transport.rec": ["parallel.transport.recurrence="],
    "farspan train mixer@model.blocks.gla.mixer=gated_deltap": ["gated_deltaproduct"],
    "farspan train mixer@model.blocks.gd": ["model.blocks.gdn.mixer="],
    "farspan train  data=text   data.path=my": ["my_texts/"],
    "farspan train data.path=a\\ ": ["a\\ b.txt"],
    "cd x; farspan pl": ["plan"],
    "farspan train cluster=ray cluster.address=http://h:82": [],
    "farspan nonsense ": [],
}


@bash_only
@pytest.mark.parametrize("line", REPLIES)
def test_the_function_in_bash(place, path, line):
    cut = r"""
        eval "$(farspan completion bash)"
        compopt() { :; }
        COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
        _farspan farspan "${COMP_WORDS[COMP_CWORD]}"
        printf '%s\n' "${COMPREPLY[@]}"
    """
    command = line.rpartition("; ")[2]
    words = re.findall(r"(?:\\.|[^\s=:@\\])+|[=:@]+", command) + ([""] if command.endswith(" ") else [])
    done = subprocess.run(
        [BASH, "--norc", "-c", cut, "bash", command, *words],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [each for each in done.stdout.splitlines() if each] == REPLIES[line]


# What is typed, TAB included, and the line that must then stand there.
TYPED = {
    "farspan tra\t": "farspan train ",
    "farspan train experiment=smo\t": "farspan train experiment=smoke ",
    "farspan train cluster.work\t": "farspan train cluster.workers=",  # no blank: the value follows
    "farspan train optimi\t.l\t1": "farspan train optimizer.lr=1",
    "farspan train mixer@model.blocks.gla.mixer=lin\t": "farspan train mixer@model.blocks.gla.mixer=linear ",
    "farspan train engine.resh\ttr\t": "farspan train engine.reshard_after_forward=true ",
    "farspan generate runs/f\t": "farspan generate runs/first ",
    "farspan train data.path=my\t": "farspan train data.path=my_texts/",
    "farspan train data.path=a\\ \t": "farspan train data.path=a\\ b.txt ",
}


@bash_only
def test_typing_in_bash(place, path):
    """A bash on a terminal: TAB is pressed, and the line is read back by a command bound to a key."""
    environment = {"PATH": path, "HOME": str(place), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execve(BASH, [BASH, "--norc", "--noprofile", "-i"], environment)
    try:
        told = place / "told"
        setup = (
            "PS1=ready\\>; eval \"$(farspan completion bash)\"; bind 'set enable-bracketed-paste off'; "
            f"""note() {{ printf '%s' "$READLINE_LINE" > {told}.new; mv {told}.new {told}; """  # a whole file or none
            "READLINE_LINE=; READLINE_POINT=0; }; "
            "bind -x '\"\\C-g\":note'\n"
        )
        os.write(terminal, setup.encode())
        _until(terminal, lambda said: said.count("ready>") >= 1)
        for typed, line in TYPED.items():
            told.unlink(missing_ok=True)
            for piece in re.findall(r"[^\t]+|\t", typed):
                os.write(terminal, piece.encode())
            os.write(terminal, b"\x07")
            _until(terminal, lambda said: told.exists())
            assert told.read_text() == line, typed
    finally:
        os.close(terminal)  # SIGHUP to the shell
        os.waitpid(pid, 0)


def _until(terminal: int, condition, seconds: float = 30) -> None:
    """Reads what the terminal says until `condition` holds of it."""
    said, deadline = "", time.monotonic() + seconds
    while not condition(said):
        assert time.monotonic() < deadline, said
        if select.select([terminal], [], [], 0.05)[0]:
            said += os.read(terminal, 4096).decode(errors="replace")


def test_every_verb_has_a_function_that_is_named_where_it_is_loaded():
    for name, verb in VERBS.items():
        module, _, function = verb.function.partition(":")
        assert module.startswith("launch.") and function.rstrip("_") == name
