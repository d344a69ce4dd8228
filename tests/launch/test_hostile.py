"""A run, a checkpoint or a sweep from elsewhere, at the command line: no traceback, no hang, nothing run or written."""

import fcntl
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.tokenizer import Bytes
from launch.cli import main
from launch.commands.convert import export
from launch.commands.jobs import logs, status, stop
from launch.commands.prepare import prepare
from launch.config.compose import composed
from launch.config.model import model_of
from launch.errors import UserError
from launch.evaluation import measure
from launch.extend.stages import _parent
from launch.preflight.check import check_run
from launch.preflight.configure import configure
from launch.run import rundir
from launch.runner.attempts import _turn_away
from tests.jobs import overrides
from tests.watched import WATCHED, change
from train.checkpoints import checkpoint
from train.settings import RunSettings

BOUND_S = 10.0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run as training leaves it, with two checkpoints, of weights that were never trained."""
    folder = tmp_path_factory.mktemp("hostile")
    config = composed(overrides(folder))
    run = folder / "run"
    run.mkdir()
    rundir.write_config(run, config, {"farspan": "0"})
    (run / "tokenizer.json").write_text(json.dumps(Bytes().card()))
    (run / "metrics.jsonl").write_text('{"step": 4, "tokens": 1536, "time": 1.0, "loss": 5.0, "attempt": 1}\n')
    torch.manual_seed(0)
    weights = config.model.build().state_dict()
    weights = {
        n: torch.randn_like(x) * 0.02 if x.is_floating_point() else torch.zeros_like(x) for n, x in weights.items()
    }
    shapes = {name: [list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in weights.items()}
    for step in (2, 4):
        path = run / "checkpoints" / f"step-{step}"
        path.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": weights}, checkpoint_id=str(path), no_dist=True)
        for name in ("config.yaml", "tokenizer.json"):
            shutil.copy(run / name, path / name)
        facts = {"step": step, "tokens": 384 * step, "skips": 0, "attempt": 1, "seed": 0, "data": "x"}
        checkpoint.seal(path, facts | {"model": shapes})
    return run


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "run"))


def resealed(path: Path) -> None:
    """With the right checksums, as someone from elsewhere would."""
    facts = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).unlink()
    checkpoint.seal(path, facts)


def told(capsys, *arguments: str, bound: float = BOUND_S) -> tuple[int, str]:
    """The exit code of a command, and its one line. Fails for a traceback, for more than a line, and for a hang."""
    capsys.readouterr()
    WATCHED.on, WATCHED.seen = True, []
    began = time.monotonic()
    try:
        code = main(list(arguments))
    finally:
        WATCHED.on = False
    ran = [event for event in WATCHED.seen if not event.startswith("open")]
    assert time.monotonic() - began < bound and not ran, ran
    return code, capsys.readouterr().err


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{n}: &{n} [{','.join(['*' + b] * 9)}]\n" for b, n in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = {
    "empty": "",
    "list": "[]",
    "text": "hello",
    "no model": "train: {steps: 1}\n",
    "model of text": "model: x\n",
    "nul": "model: {_target_: models.LM}\n\0",
    "bomb": BOMB,
    "around itself": "model: &a {b: *a}\n",
    "python": "model: !!python/object/apply:os.system ['touch ran']\n",
    "another class": "model: {_target_: os.system, command: touch ran}\n",
    "a class that writes": "model: {_target_: train.tracking.record.JsonlWriter, path: ran}\n",
    "a class of the wrong room": "model: {_target_: train.tracking.Tracking}\n",
    "class of a number": "model: {_target_: 5}\n",
    "interpolation": "model: {_target_: models.LM, dim: '${oc.env:HOME}'}\n",
    "deep": "model: " + "[" * 5000,
    "number": "model: {a: " + "9" * 6000 + "}\n",
    "no utf-8": b"model: \xff\n",
    "long": "model: {a: " + "x" * 600_000 + "}\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_is_none(run, capsys, name: str) -> None:
    content = CONFIGS[name]
    for folder in (run, run / "checkpoints" / "step-4"):
        (folder / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    resealed(run / "checkpoints" / "step-4")
    before = listing(run.parent)
    for words in (["generate", "run", "tokens=1"], ["generate", "run/checkpoints/step-4"]):
        code, line = told(capsys, *words)
        assert code == 2 and line.count("\n") == 1 and "config.yaml" in line, line
    assert listing(run.parent) == before


TOKENIZERS = {
    "null": "null",
    "list": "[]",
    "text": '"bytes"',
    "empty": "",
    "name of a list": '{"name": []}',
    "no text": '{"name": "json", "document": null, "json": 5, "size": 3, "special": {}}',
    "lies": '{"name": "bytes", "size": 10000000000, "special": {"document": 256}}',
    "ids of text": '{"name": "ids", "size": "a", "special": {"document": "b"}}',
    "ids of nothing": '{"name": "ids", "size": null, "special": null}',
    "deep": "[" * 100_000,
    "pipe": None,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_none(run, capsys, name: str) -> None:
    path = run / "checkpoints" / "step-4"
    (path / "tokenizer.json").unlink()
    if (content := TOKENIZERS[name]) is None:
        os.mkfifo(path / "tokenizer.json")
    else:
        (path / "tokenizer.json").write_text(content)
        resealed(path)
    code, line = told(capsys, "generate", "run/checkpoints/step-4", "tokens=1", "prompt=a")
    assert code == 2 and line.count("\n") == 1 and "token" in line, line


def cut(path: Path) -> None:
    content = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(content[: len(content) // 2])


def emptied(path: Path) -> None:
    (path / ".metadata").write_bytes(b"")


def of_garbage(path: Path) -> None:
    (path / "__0_0.distcp").write_bytes(b"\x00" * (path / "__0_0.distcp").stat().st_size)


def of_another_model(path: Path) -> None:
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("dim: 32", "dim: 64"))


def with_nothing(path: Path) -> None:
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "files": {}}))


def listed(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_text("[]")


def null(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_text("null")


def altered(path: Path) -> None:
    """A flipped bit: the checksum is wrong."""
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)


RIGHT = (cut, emptied, of_garbage)  # in these the checksums are made right
DAMAGES = (*RIGHT, with_nothing, listed, null, altered)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_a_damaged_checkpoint_named_by_its_folder_is_taken_by_nothing(run, capsys, damage) -> None:
    path = run / "checkpoints" / "step-4"
    damage(path)
    if damage in RIGHT:
        resealed(path)
    before = listing(run.parent)
    code, line = told(capsys, "generate", str(path), "tokens=1", "prompt=a")
    assert code in (1, 2) and line.count("\n") == 1, line
    if damage is of_garbage:  # known when its tensors are read
        return
    for words in (["export", str(path), "out"], ["evaluate", str(path)]):
        code, line = told(capsys, *words)
        assert code == 2 and line.count("\n") == 1 and "damaged" in line, line
    assert listing(run.parent) == before


@pytest.mark.composes
def test_init_from_and_resume_verify_the_checkpoint_that_they_are_given(run, capsys, made) -> None:
    path = run / "checkpoints" / "step-4"
    altered(path)
    before = listing(run.parent)
    common = overrides(made.parent)
    for word in (f"init_from={path}", f"resume={path}"):
        code, line = told(capsys, "train", *(common if word.startswith("init") else []), word, bound=60)
        assert code == 2 and line.count("\n") == 1 and "this checkpoint is damaged" in line, line
    altered(run / "checkpoints" / "step-2")
    code, line = told(capsys, "train", "resume=run", bound=60)
    assert code == 2 and "all 2 checkpoints are damaged" in line and "run.anew=true" in line, line
    with (run / ".lock").open("w") as lock:  # a run that trains takes its old checkpoints away
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, line = told(capsys, "train", "resume=run", bound=60)
    (run / ".lock").unlink()
    assert code == 2 and line.splitlines()[-1] == "farspan train: run.dir=run: in use by another run", line
    assert listing(run.parent) == before


def test_a_model_that_is_another_than_its_configuration_says_is_one_line(run, capsys) -> None:
    path = run / "checkpoints" / "step-4"
    of_another_model(path)
    resealed(path)
    code, line = told(capsys, "generate", str(path), "tokens=1", "prompt=a")
    assert code == 2 and line.count("\n") == 1 and "holds another model" in line, line


def test_going_on_from_a_named_checkpoint_works_in_its_run(run) -> None:
    config = configure(["resume=run/checkpoints/step-2"])
    assert config.run.dir == "run" and config.resume == "run/checkpoints/step-2"


def test_what_is_no_run_is_not_taken_for_one(run, tmp_path) -> None:
    Path("moved").mkdir()
    shutil.copytree(run / "checkpoints" / "step-2", "moved/step-2")
    with pytest.raises(UserError, match="without its run; init_from=moved/step-2"):
        configure(["resume=moved/step-2"])
    with pytest.raises(UserError, match="is a checkpoint; expected a run; its run is"):
        rundir.run_folder("JOB", "run/checkpoints/step-2")
    Path("project").mkdir()
    Path("project/config.yaml").write_text("title: my pages\n")
    with pytest.raises(UserError, match="is no run that can be read"):
        rundir.run_folder("resume", "project")
    for folder, words in (("project", "holds other files"), ("run/checkpoints/step-2", "must not lie in a checkpoint")):
        with pytest.raises(UserError, match=words):
            rundir.claim(RunSettings(dir=folder), resumed=False)
    with pytest.raises(UserError, match="must not lie in a checkpoint"):
        rundir.claim(RunSettings(dir="run/checkpoints/step-2/new"), resumed=False)
    with pytest.raises(UserError, match="must not lie in a checkpoint"):
        export(["run", "run/checkpoints/step-2/out"])
    shutil.copytree("run/checkpoints/step-2", "best")
    Path("link").symlink_to("run/checkpoints")
    for place in ("run/checkpoints/step-2/made", "run/checkpoints/step-2", "best/made", "link/step-2/made"):
        before = listing(tmp_path)
        for overrides_ in ([f"data.store={place}"], ["data=store", "data.store=some", f"data.local={place}"]):
            with pytest.raises(
                UserError, match=r"^data\.(store|local)=.*: must not lie in a checkpoint, .*/(step-2|best)$"
            ):
                prepare([*overrides_, "data.path=texts"])
        assert listing(tmp_path) == before
    for word in ("run/checkpoints/step-2", "project"):
        for verb in (status, logs, stop):
            with pytest.raises(UserError, match="expected a run|is no run"):
                verb([word])
    assert sorted(p.name for p in Path("project").iterdir()) == ["config.yaml"]
    assert "new" not in listing(run / "checkpoints" / "step-2")


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", ".lock", "stop", "summary.json", "plans/step-1.txt"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_run_whose_files_are_pipes_or_lead_elsewhere_is_not_touched(run, capsys, name: str, kind: str) -> None:
    victim = run.parent / "victim"
    victim.write_text("mine\n")
    (run / name).unlink(missing_ok=True)
    (run / name).parent.mkdir(exist_ok=True)
    os.mkfifo(run / name) if kind == "pipe" else (run / name).symlink_to(victim)
    for words in (["generate", "run", "tokens=1"], ["train", "resume=run"]):
        code, line = told(capsys, *words, bound=30)
        assert code == 2 and line.count("\n") == 1 and name in line, line
    assert victim.read_text() == "mine\n"


def test_records_that_are_none_are_passed_over(run, capsys) -> None:
    good = '{"step": 4, "tokens": 1536, "time": 1.0, "loss": 5.0, "attempt": 1}'
    odd = ['{"step": "4"}', '{"step": 5, "tokens": "x", "time": []}', "[" * 50_000, "null", '{"step": 6, "time": null}']
    (run / "metrics.jsonl").write_text("\n".join([*odd, good, *odd]) + "\n")
    code = main(["status", "run"])
    shown = capsys.readouterr().out
    assert code == 0 and "step        4 of" in shown and "loss        5.000" in shown
    (run / "log.txt").write_bytes(b"\xff said\n")
    (run / "jobs.jsonl").write_text('null\n[]\n{"job": 5}\n')
    assert main(["logs", "run"]) == 0 and "said" in capsys.readouterr().out


def test_what_a_run_turns_away_from_is_set_aside_and_kept(run) -> None:
    class CheckedRun:
        config = SimpleNamespace(resume="run/checkpoints/step-2")
        resume: Path | None = Path("run/checkpoints/step-2")

    said: list[str] = []
    _turn_away(CheckedRun, run, said.append, anew=False)  # type: ignore[arg-type]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-2", "step-4.aside"]
    assert len(said) == 1 and "step-4.aside" in said[0]
    assert checkpoint.newest(run / "checkpoints", said.append) == run / "checkpoints" / "step-2"
    checkpoint.prune(run / "checkpoints", 2, keep=1)
    assert (run / "checkpoints" / "step-4.aside").exists()
    altered(run / "checkpoints" / "step-2")
    CheckedRun.config, CheckedRun.resume = SimpleNamespace(resume="run"), None
    _turn_away(CheckedRun, run, said.append, anew=True)  # type: ignore[arg-type]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-2.aside", "step-4.aside"]


def test_a_sweep_or_a_chain_from_elsewhere(tmp_path) -> None:
    from launch.extend.record import Record
    from launch.sweep.record import Sweep

    for text in ("null", "[]", "{}", '{"name": 1, "overrides": 2, "swept": 3, "members": 4}', "[" * 100_000):
        (tmp_path / "sweep.json").write_text(text)
        (tmp_path / "extension.json").write_text(text)
        with pytest.raises(UserError) as error:
            Sweep.load(tmp_path)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError) as error:
            Record(tmp_path, None, [])
        assert "\n" not in str(error.value)
    for folder in ("../../evil", "/tmp", "..", 5):
        member = {"number": 0, "folder": folder, "overrides": [], "values": {}}
        told = {"name": "s", "overrides": [], "swept": [], "members": [member]}
        (tmp_path / "sweep.json").write_text(json.dumps(told))
        with pytest.raises(UserError, match="is no folder of it"):
            Sweep.load(tmp_path)


@pytest.mark.parametrize("damage", [cut, emptied, altered])
def test_a_chain_begins_from_no_damaged_checkpoint(run, capsys, damage) -> None:
    """Named, or as the newest of a run, whose older one is then taken instead."""
    chain = "stages=[{length: 192, tokens: 1000}]"
    damage(run / "checkpoints" / "step-4")
    before = listing(run)
    code, line = told(capsys, "plan", "init_from=run/checkpoints/step-4", chain)
    assert (
        code == 2 and line.count("\n") == 1 and "init_from=run/checkpoints/step-4: this checkpoint is damaged" in line
    )
    config = configure(["init_from=run", chain])
    assert _parent(config).path.name == "step-2"
    damage(run / "checkpoints" / "step-2")
    with pytest.raises(UserError, match="^init_from=run: has no complete checkpoint$"):
        _parent(config)
    assert listing(run) == before


def checks(run: Path) -> dict[str, object]:
    """By verb, the checks that it makes in this process before anything starts."""

    def resume() -> None:
        check_run(configure([f"resume={run}"]), lambda line: None, device="cpu")

    def init_from() -> None:
        check_run(configure([f"init_from={run}", "train.steps=2"]), lambda line: None, device="cpu")

    def evaluated() -> None:
        found = run / "checkpoints" / "step-4"
        measure.check_evaluation(measure.configured(found, []), found, str(run), lambda line: None)
        measure.trained_on(found)

    return {
        "resume": resume,
        "init_from": init_from,
        "evaluate": evaluated,
        "status": lambda: status([str(run)]),
        "generate": lambda: model_of(rundir.saved_config(run)["model"]),
        "export": lambda: export([str(run), str(run.with_name("out"))]),
    }


def with_config(run: Path, path: tuple, value) -> None:
    """Has another value at one place of the configuration of a run and of its checkpoints, of right checksums."""
    whole = yaml.safe_load((run / "config.yaml").read_text())
    node = whole
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    for folder in (run, *(run / "checkpoints").iterdir()):
        (folder / "config.yaml").write_text(yaml.safe_dump(whole))
        if folder != run:
            resealed(folder)


ODD = [
    ("status", ("train", "keep"), None),
    ("status", ("train", "guard", "skips"), ["x"]),
    ("status", ("train", "average"), float("nan")),
    ("status", ("train",), -1),
    ("status", ("train", "batch_tokens"), {"a": 1}),
    ("init_from", ("model", "blocks", "gdn"), None),
    ("init_from", ("model", "blocks", "gla", "mixer"), [[1, 2]]),
    ("init_from", ("model", "blocks"), 5),
    ("resume", ("optimizer", "lr"), {"a": 1}),
    ("evaluate", ("model", "pattern"), 1.5),
    ("export", ("model", "dim"), "x"),
    ("export", ("model", "blocks", "attn", "mixer", "positions"), [[1, 2]]),
    ("generate", ("model", "blocks", "gdn", "norm_eps"), [[1, 2]]),
]


@pytest.mark.parametrize(("verb", "path", "value"), ODD)
def test_a_value_of_another_kind_in_a_configuration_is_one_line(run, verb: str, path: tuple, value) -> None:
    with_config(run, path, value)
    with pytest.raises(UserError) as error:
        checks(run)[verb]()
    assert "\n" not in str(error.value) and str(error.value)


@settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_leaf_of_a_configuration_may_be_of_another_kind(made, tmp_path_factory, data) -> None:
    run = Path(shutil.copytree(made, tmp_path_factory.mktemp("leaf") / "run"))
    node, path = yaml.safe_load((run / "config.yaml").read_text()), ()
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        node, path = node[key], (*path, key)
    kinds = (None, True, -1, 10**30, 1.5, "x", [], ["x"], {}, {"a": 1}, [[1, 2]])
    with_config(run, path, data.draw(st.sampled_from([each for each in kinds if type(each) is not type(node)])))
    verb = data.draw(st.sampled_from(["resume", "init_from", "evaluate", "status", "export"]))
    try:
        checks(run)[verb]()
    except UserError as error:
        assert "\n" not in str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=10_000, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_of_any_key_of_a_runs_files_is_read_or_refused_in_one_line(made, tmp_path_factory, data) -> None:
    """A key of the manifest, of the tokenizer's card or of the configuration has another value, checksums are right."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(made, folder)
    path = folder / "checkpoints" / "step-4"
    name = data.draw(st.sampled_from([checkpoint.MANIFEST, "tokenizer.json", "config.yaml"]))
    whole = yaml.safe_load((path / name).read_text())
    change(data, whole, VALUES)
    (path / name).write_text(json.dumps(whole, ensure_ascii=False, allow_nan=True), errors="replace")
    if name != checkpoint.MANIFEST:
        resealed(path)
    before = listing(folder)
    began = time.monotonic()
    WATCHED.on, WATCHED.seen = True, []
    try:
        code = main(["generate", str(path), "tokens=1", "prompt=a"])
    finally:
        WATCHED.on = False
    assert code in (0, 1, 2) and time.monotonic() - began < BOUND_S
    assert not [event for event in WATCHED.seen if not event.startswith("open")]
    assert listing(folder) == before
