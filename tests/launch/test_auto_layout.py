"""`parallel=auto` as a user meets it: the table, a run with the layout in its configuration, what is refused."""

import json
import re
from pathlib import Path

import pytest

from launch.cli import main
from launch.run.rundir import saved_config
from tests.jobs import overrides

AUTO = ["parallel=auto", "cluster.workers=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


@pytest.mark.composes
def test_the_plan_for_a_cluster_that_is_not_here_is_a_table_of_layouts(place, capsys):
    """1,024 H100: in seconds, without a GPU, without the corpus."""
    asked = ["model=llama_1b", "data.max_length=8192", "train.batch_tokens=4194304", "cluster.workers=1024"]
    assert main(["plan", "parallel=auto", *asked, "parallel.machine.device=h100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index(next(line for line in lines if line.startswith("layouts")))
    assert first <= 5 and lines[0].startswith("auto ") and len(lines) == first + 1 + 10 + 1
    times = [float(re.search(r"  ([\d.e-]+)  +\+", line)[1]) for line in lines[first + 1 : -1]]
    assert times == sorted(times) and lines[-1].startswith("keys ") and "parallel.data=" in lines[-1]


@pytest.mark.composes
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["parallel.machine.memory=0.0001"], "memory=0.0001: no layout of 2 ranks fits 96.6 kB a rank; the least, "),
        (["parallel.machine.device=h99"], "parallel.machine.device=h99: must be one of a100, a100_40g, b200, h100"),
        (["parallel.machine.memory=0"], "parallel.machine.memory=0.0: must be above 0, or null"),
        (["scheduler=adaptive"], "must be static with parallel=auto"),
        (["parallel.tensor=64"], "parallel.tensor=64: must divide cluster.workers=2"),
        (["parallel.data=2", "train.batch_tokens=96"], "parallel.data=2: must have a sequence each, and a step has 1"),
    ],
)
def test_what_no_layout_can_be_chosen_for_is_refused_in_one_line(place, capsys, more, words):
    assert main(["plan", *overrides(place), *AUTO, *more]) == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "\n" not in line
    assert "fits" not in words or "; the largest tensor, " in line and "would make it fit" in line


@pytest.mark.dist
def test_a_run_trains_with_the_layout_that_was_chosen_and_its_configuration_has_it(place, capsys):
    run = place / "run"
    assert main(["train", *overrides(place), *AUTO, "parallel.tensor=2", "train.steps=2", f"run.dir={run}"]) == 0
    said = capsys.readouterr()
    assert "parallel=auto: tensor 2, " in said.out + said.err
    parallel = saved_config(run)["parallel"]
    assert parallel["auto"] is False and (parallel["tensor"], parallel["data"], parallel["sequence"]) == (2, 1, 1)
    assert main(["train", f"resume={run}", "train.steps=3"]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]


@pytest.mark.composes
def test_a_layout_that_does_not_fit_is_refused_with_what_would_make_it_fit(place, capsys):
    four = ["model.layers=4", "model.pattern=[gla,gdn,gla,attn]"]
    common = [*overrides(place, *four), "cluster.workers=1", "data.max_length=384", "parallel.machine.memory=0.005"]
    assert main(["plan", *common]) == 2
    line = capsys.readouterr().err.strip()
    assert (
        "parallel.machine.memory=0.005: a rank can hold 4.8 MB, and one rank takes 7.4 MB, " in line
        and "\n" not in line
    )
    assert (
        "of which activations are 6.3 MB" in line and "; the largest tensor, " in line and "would make it fit" in line
    )
    assert main(["plan", *common[:-1], "parallel.machine.memory=1"]) == 0
    assert "memory " in capsys.readouterr().out
