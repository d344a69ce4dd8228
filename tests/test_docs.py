"""Every command of the README and of docs/ is run, as printed, by someone who has nothing but these pages.

What trains is made short: a small budget and a small model are added behind what is printed, and no Ray is started
where the page does not say which cluster. What cannot run here is listed, with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch.preflight.check import check_run
from launch.preflight.configure import configure
from tests import warm
from tests.launch.processes import ROOT, mentioning, wait_for

PAGES = [
    "README.md",
    *(
        f"docs/{page}.md"
        for page in (
            "install",
            "first-run",
            "models",
            "parallel",
            "verify",
            "data",
            "schedules",
            "continual",
            "optimizers",
            "guards",
            "cluster",
            "evaluate",
            "extension",
            "conversion",
            "decoding",
            "hub",
        )
    ),
]
TAKE_MINUTES = [
    "README.md",
    *(
        f"docs/{page}.md"
        for page in (
            "first-run",
            "install",
            "models",
            "parallel",
            "verify",
            "data",
            "schedules",
            "continual",
            "guards",
            "optimizers",
            "cluster",
            "evaluate",
            "extension",
            "conversion",
            "decoding",
            "hub",
        )
    ),
]
NOT_RUN = {
    "python3 -m venv": "makes an environment: `make` does the same",
    ".venv/bin/python -m pip": "installs: `make` does the same",
    "source .venv": "of the shell",
    "pip install": "installs",
    "sbatch": "needs Slurm",
    "scancel": "needs Slurm",
    "kubectl": "needs Kubernetes",
    "ray up": "needs hosts to log into",
    "ray stop": "would stop every Ray on this machine; the test ends its own",
    "farspan train experiment=million": "takes seven minutes on two free cores, and 12 GB",
    "farspan train experiment=context_study": "takes ten minutes on a free core, and what extends it as long",
    "farspan train experiment=conversion_study": "takes five minutes on a free core, and what follows needs it",
    "farspan evaluate reach": "its run is one of those",
    "farspan evaluate first 'evaluate.parts=[]'": "needs lm-eval and a network; tests/train/evaluation has a stand-in",
    "wandb login": "needs an account",
    "wandb sync": "needs a server; tests/train/tracking runs it against one of its own",
}
SMALL = [
    "model.dim=64",
    "data.heldout_tokens=4096",
    "train.evaluate_every=null",
    "train.checkpoint_every=null",
    "train.mfu=false",
    "cluster.threads=1",
]
MARK = "FARSPAN_TEST_DOCS"
PROGRAMS = ("farspan", "make", "ray", "python", "pip", "wandb", "sbatch", "kubectl", "eval", "export", "source")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """What the page tells to type, in its order: lines of console blocks, and whole commands inside a sentence."""
    text = (ROOT / page).read_text()
    found = []
    for match in re.finditer(r"^```console\n(.*?)^```$|`(farspan [a-z]+ [^`\n]*)`", text, re.MULTILINE | re.DOTALL):
        lines = match[1].splitlines() if match[1] is not None else [match[2]]
        found += [re.sub(r"\s+#.*", "", line) for line in lines if line.strip()]
    return [line for line in found if "…" not in line and not re.search(r"\b(RUN|JOB|FOLDER)\b", line)]


def shortened(command: str) -> str:
    """The command as printed, with what makes it short behind it."""
    words = shlex.split(command)
    if words[:1] != ["farspan"] or words[1] not in ("train", "submit", "sweep") or {"--help", "--cfg"} & set(words):
        return command
    kept = [word for word in words if not word.startswith("train.tokens=")]
    asked = dict(word.split("=", 1) for word in words[2:] if "=" in word)
    length = int(re.findall(r"\d+", asked.get("train.batch_tokens", "4096").replace("_", ""))[-1])  # a ramp's last
    if "resume" in asked and words[1] == "sweep":
        return command
    if asked.get("experiment") == "convert":
        stages = "stages=[{length: 4096, tokens: 4096, distill: hidden}, {length: 4096, tokens: 4096, distill: logits}]"
        return shlex.join([*words, *SMALL, stages, "evaluate.parts=[loss]", "evaluate.tokens=4096"])
    if asked.get("experiment") == "extend_context" or asked.get("resume") == "long":  # its stages have budgets
        stages = "stages=[{length: 8192, tokens: 8192, positions: {base: 40_000}}]"
        few = ["evaluate.samples=1", "evaluate.tokens=8192", "evaluate.depths=2", "evaluate.documents=2"]
        return shlex.join([*words, *([] if "resume" in asked else [*SMALL, stages, *few])])
    more = [*SMALL, f"train.tokens={8 * length if 'resume' in asked else 2 * length}"]
    if words[1] != "submit" and "cluster" not in asked and asked.get("run.name") != "watched":
        more.append("cluster=none")
    return shlex.join([*kept, *(each for each in more if each.split("=")[0] not in asked or "tokens" in each)])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_in_console_blocks(page):
    """Else they would not be run."""
    for language, text in blocks(page):
        if language != "console":
            typed = [line.split(" ") for line in text.splitlines()]
            assert not [w for w in typed if w[0] in PROGRAMS and not w[1:2][0].endswith(":")], text


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in TAKE_MINUTES)) for page in PAGES]
)
def test_every_command_works_as_printed(page, tmp_path):
    _write_texts(tmp_path / "my_texts")
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    env = os.environ | {
        "PATH": f"{_console(tmp_path)}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": home,  # the default corpus is tokenised once a machine
        "RAY_TMPDIR": (sockets := tempfile.mkdtemp(prefix="fs-")),  # a socket's path has 107 characters at most
        MARK: str(tmp_path),
    }
    env.pop("RAY_ADDRESS", None)
    try:
        for command in commands(page):
            _type(command, tmp_path, env)
    finally:
        _end_ray(tmp_path)
        shutil.rmtree(sockets, ignore_errors=True)


def test_the_readmes_runs_are_accepted(tmp_path, monkeypatch):
    """As they are checked before a process starts, but for the run that some begin from; `make docs` starts them."""
    _write_texts(tmp_path / "my_texts")
    monkeypatch.chdir(tmp_path)
    trained = [shlex.split(line)[2:] for line in commands("README.md") if line.startswith("farspan train")]
    assert len(trained) >= 8 and any("run.name=first" in words for words in trained)
    for words in trained:
        if "experiment=continual" not in words:
            check_run(configure([w for w in words if not w.endswith("=first")]), lambda line: None)


def _write_texts(folder: Path) -> None:
    """A user's own corpus: some hundred documents of 2 to 30 kB."""
    folder.mkdir()
    rng = random.Random(0)
    words = "the a of to model state span token gate decay chunk and with then from".split()
    for number in range(300):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(400, 6000)))
        (folder / f"{number}.txt").write_text(text)


def _type(command: str, place: Path, env: dict[str, str]) -> None:
    if any(command.startswith(start) for start in NOT_RUN):
        return
    if command.startswith("export "):
        key, _, value = command.removeprefix("export ").partition("=")
        env[key] = value
        return
    if command.startswith("make "):  # CI runs train and test; the others take minutes
        command, place = f"make -n {command.removeprefix('make ')}", ROOT
    pipe = re.search(r" > \S+$", command)  # a redirection is the shell's
    typed = shortened(command[: pipe.start()] if pipe else command) + (pipe[0] if pipe else "")
    if command.startswith("ray start"):
        typed = typed.replace("--num-cpus=2", "--num-cpus=2 --object-store-memory=80000000")
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", typed], cwd=place, env=env, capture_output=True, text=True, timeout=240, start_new_session=True
    )
    said = f"{command}\n  typed: {typed}\n  exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    print(f"{time.monotonic() - began:6.1f} s  {command}")
    ended_already = command.startswith("farspan stop") and "has ended already" in done.stderr
    assert done.returncode == 0 or ended_already, said
    assert "Traceback" not in done.stdout + done.stderr, said


def _console(place: Path) -> Path:
    """A folder with a `farspan` of this checkout on it, one that has imported what it needs."""
    folder = place / "bin"
    folder.mkdir(exist_ok=True)
    script = folder / "farspan"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(warm.command())} "$@"\n')
    script.chmod(0o755)
    return folder


def _end_ray(place: Path) -> None:
    """Ends what `ray start` has left running: all that inherited our mark."""
    for line in mentioning(f"{MARK}={place}"):
        try:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        except OSError:
            continue
    wait_for(lambda: not mentioning(f"{MARK}={place}"), 15)


def _written_pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_page_is_in_the_index_and_every_link_leads_somewhere():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in _written_pages():
        assert page.parent == ROOT or page.name == "README.md" or f"]({page.name})" in index, page
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not link.startswith(("http", "#")):
                assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_no_sentence_of_the_documentation_opens_with_a_question():
    """Generated sections and the diary aside: "What", "Of" and "Whether" begin no sentence."""
    for page in _written_pages():
        if page.name in ("notes.md", "configuration.md"):
            continue
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`[^`\n]*`|^#.*$", "", text, flags=re.MULTILINE)
        assert not re.findall(r"(?:\A|[.:;?!]\s+|\n\n|\n- )(?:What|Of|Whether)\s+\w+", text), page.name


def test_the_picture_of_the_rooms_has_the_arrows_of_the_code():
    path = ROOT / "docs" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", path)
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    assert pictures.imports() == pictures.ARROWS.keys()
