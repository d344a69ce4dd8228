"""`farspan evaluate` as a user meets it: a table, results and pictures, and mistakes that cost one line."""

import json
import shutil

import pytest

from launch.cli import main
from launch.evaluation.measure import configured, folder_of
from launch.evaluation.report import draw, table
from tests.launch.test_cli import finish, overrides, start
from train.settings import PARTS

pytestmark = pytest.mark.e2e
QUICK = ["evaluate.tokens=2000", "evaluate.samples=2", "evaluate.depths=3", "evaluate.documents=2"]
QUICK += ["evaluate.length=256", "evaluate.context=64", "cluster.threads=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, of every kind of layer."""
    place = tmp_path_factory.mktemp("evaluate")
    given = overrides(place, "cluster.workers=1", f"run.dir={place / 'run'}", "train.steps=2")
    finish(start(place, "train", *given))
    return place / "run"


def refused(capsys, *arguments):
    """The line that it costs."""
    assert main(["evaluate", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("farspan evaluate: ") and err.count("\n") == 1, err
    return err.removeprefix("farspan evaluate: ")


def test_an_evaluation_on_two_workers_prints_a_table_and_leaves_results_and_pictures(run):
    process = start(run.parent, "evaluate", str(run), *QUICK)  # two workers are the default
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    folder = run / "evaluation" / "step-2"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {"checkpoint", "length", *PARTS} and results["checkpoint"] == "step-2"
    assert sorted(p.name for p in folder.iterdir()) == ["loss.png", "needle.png", "positions.png", "results.json"]
    assert all((folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("loss", "needle", "positions"))
    for words in ("held-out loss", f"{results['loss']['loss']:.4f}", "needle", "recall", "copy", "long range"):
        assert words in out
    assert "on 2 workers" in err and str(folder) in err and "Traceback" not in err
    assert [line for line in err.splitlines() if line in ("loss", "needle", "long range")]  # progress


def test_the_configuration_is_the_runs_and_where_it_runs_is_the_command_lines(run):
    (found,) = (run / "checkpoints").iterdir()
    config = configured(found, ["data.heldout=0.5", "evaluate.parts=[copy]"])
    assert config.model["dim"] == 32 and config.data["heldout"] == 0.5 and config.evaluate.parts == ["copy"]
    assert config.cluster.kind == "local" and config.cluster.workers == 2
    assert folder_of(found) == run / "evaluation" / "step-2"
    assert folder_of(found, "average") == run / "evaluation" / "step-2-average"
    assert folder_of(run.parent / "copied") == run.parent / "copied-evaluation", "nothing is written below a checkpoint"


def test_what_is_wrong_costs_one_line_before_a_process_starts(run, capsys, tmp_path):
    assert refused(capsys, "evaluate.parts=[loss]").startswith("RUN: missing; expected a run folder")
    assert "no such run" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "empty")
    assert refused(capsys, tmp_path / "empty").endswith("has no complete checkpoint\n")
    for arguments, said in {
        ("evaluate.parts=[loss,speed]",): "evaluate.parts=speed: must be one of loss, positions, needle, recall, copy",
        ("evaluate.parts=[]",): "evaluate.parts=[]: must name a part",
        ("evaluate.samples=0",): "evaluate.samples=0: must be at least 1",
        ("evaluate.lengths=[64,256]",): "evaluate.lengths=64: must be at least ",
        ("evaluate.depth=3",): "evaluate.depth: no such key; nearest: evaluate.depths",
        ("evaluate.tasks=[hellaswag]",): "evaluate.tasks=[hellaswag]: needs the lm-eval package, which is not",
        ("cluster=ray",): "cluster=ray: must be none or local",
        ("cluster.workers=3", "parallel.data=2"): "parallel.data=2: must divide cluster.workers=3",
        ("model.dim=64",): f"RUN={run}: holds another model: ",
        ("model.blocks.attn.mixer.positions._target_=models.positions.Randomized",
         "+model.blocks.attn.mixer.positions.longest=200",
         "evaluate.length=256"): "evaluate.length=256: must be at most 200, the positions that the model knows",
        ("data.tokenizer=bpe", f"data.store={tmp_path / 'bpe'}", "data.vocabulary=257"): "data.tokenizer=json: must",
        ("evaluate.weights=mean",): "evaluate.weights=mean: must be one of raw, average",
        ("evaluate.weights=average",): "evaluate.weights=average: must be raw, ",
        ("resume=first",): "resume=first: not of an evaluation",
    }.items():  # fmt: skip
        assert refused(capsys, run, *arguments).startswith(said), arguments
    assert not (tmp_path / "empty" / "evaluation").exists()


def test_a_table_and_pictures_of_what_was_found(tmp_path):
    loss = {"documents": 3, "targets": 10, "loss": 1.5, "accuracy": 0.25}
    results = {
        "loss": {**loss, "loss_per_byte": 0.5, "sources": {"a": loss, "b": loss}, "lengths": [{"from": 64, **loss}]},
        "positions": [{"from": 1, "targets": 3, "loss": 2.0, "accuracy": 0.1}],
        "needle": {"lengths": [], "depths": [0.0, 1.0], "exact": [], "logprob": []},
        "recall": {"chance": 0.1, "lengths": [{"length": 64, "accuracy": 0.5, "loss": 1.0}]},
        "long_range": {"context": 1024, "lengths": []},
        "tasks": {"piqa": {"acc,none": 0.5, "alias": "piqa"}},
    }
    text = "\n".join(table(results, [*PARTS, "tasks"]))
    for words in ("  a ", "64 to 127 tokens", "per byte: 0.5000", "50.0%", "2,048 tokens that it takes", "piqa", "acc"):
        assert words in text
    assert "no length has room" in text and "copy" not in text
    assert draw(tmp_path, results) == ["loss.png", "positions.png"]
