"""`experiment=continual` as a user runs it: a parent, a child on another corpus, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from launch.preflight.configure import configure
from tests.jobs import SMALL, corpus
from train.tracking.record import records

KEPT = [key for key in SMALL if key != "data=text" and not key.startswith("data.heldout=")]
SHORT = [*KEPT, "cluster.workers=1", "data.heldout=0.2", "data.heldout_tokens=384", "tracking=none"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, `runs/base`, and another corpus, `new`."""
    place = tmp_path_factory.mktemp("continual")
    corpus(place / "old")
    (place / "new").mkdir()
    rng = np.random.default_rng(1)
    for i in range(40):
        (place / "new" / f"{i:02}.txt").write_text(
            "".join(map(str, rng.integers(0, 10, size=int(rng.integers(20, 600)))))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(place)
        old = ["data=text", f"data.path={place / 'old'}", "train.steps=4"]
        assert main(["train", *SHORT, *old, "run.dir=runs/base"]) == 0
    return place


@pytest.fixture
def inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.chdir(here)
    return here


CHILD = [*SHORT, "experiment=continual", "data.sources.new.data.path=new", "train.evaluate_every=384"]


@pytest.mark.e2e
def test_a_run_goes_on_with_another_corpus_and_says_what_it_forgets(inside: Path, capsys) -> None:
    child = [*CHILD, "init_from=base", "data.replay=0.25"]
    assert main(["train", *child, "train.steps=4", "run.dir=runs/child"]) == 0
    said = capsys.readouterr().err
    assert "forgetting: the held-out loss on old rose by" in said
    assert "adaptation: the held-out loss on new fell by" in said
    found = records("runs/child/metrics.jsonl")
    assert [r["step"] for r in found] == [0, 1, 2, 3, 4]
    last = found[-1]
    assert last["forgetting"]["old"] == last["heldout"]["old"]["loss"] - found[0]["heldout"]["old"]["loss"]
    assert last["drawn"] == {"new/96": 12 * 96, "old/96": 4 * 96}, "a quarter is replayed"
    assert json.loads(Path("runs/child/lineage.json").read_text())["run"] == "base"
    rates, left = [r["lr"] for r in found[1:]], records("runs/base/metrics.jsonl")[-1]["lr"]
    assert max(rates) > 2 * left and rates[-1] < max(rates) / 2, "up again, and down"
    # what it became goes on as well: a mixture is replayed part by part
    more = ["data.sources.new.data.path=old", "init_from=child", "train.steps=2", "run.dir=runs/third"]
    assert main(["train", *child, *more]) == 2
    assert "data.sources.new.data: must be another corpus than data.sources.old-old" in capsys.readouterr().err
    parts = configure([*child, "init_from=child"]).data["sources"]
    assert {name: part["weight"] for name, part in parts.items()} == {"new": 1.0, "old-new": 0.75, "old-old": 0.25}
    assert [parts[name]["order"] for name in ("old-new", "old-old")] == [1, 2]


@pytest.mark.e2e
def test_a_run_that_ends_before_its_first_checkpoint_still_starts_from_its_parent(inside: Path, capsys) -> None:
    child = [*CHILD, "init_from=base", "train.steps=2", "run.dir=runs/lost"]
    assert main(["train", *child]) == 0
    first = records("runs/lost/metrics.jsonl")[0]["heldout_loss"]
    shutil.rmtree("runs/lost/checkpoints")
    capsys.readouterr()
    assert main(["train", "resume=lost"]) == 0
    assert "has no complete checkpoint: starting from step 0" in capsys.readouterr().err
    again = records("runs/lost/metrics.jsonl")
    assert again[0]["attempt"] == 2 and again[0]["heldout_loss"] == first


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["init_from=base", "data.sources.new.data.path=old"], "data.sources.new.data: must be another corpus than"),
        (["init_from=base", "data.replay=1.5"], "data.replay=1.5: must be a share from 0 to 1, or null"),
        (["init_from=base", "data.heldout=0.3"], "data.heldout=0.3: must be at most 0.2: "),
        (["init_from=nowhere"], "init_from=nowhere: no such run"),
        (
            ["init_from=new"],
            "data.sources.old.data.corpus=null: must be a corpus: init_from=new tells of none that is here",
        ),
        ([], "data.sources.old.data.corpus=null: must be one of stdlib, text, "),
        (["resume=base", "init_from=base"], "init_from=base: must be null with resume=base, a run that has begun"),
    ],
)
@pytest.mark.e2e
def test_bad_requests_cost_one_line(inside: Path, capsys, overrides: list[str], line: str) -> None:
    before = sorted(path.name for path in Path("runs").iterdir())
    assert main(["train", *CHILD, *overrides, "run.dir=runs/refused"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"farspan train: {line}")
    assert sorted(path.name for path in Path("runs").iterdir()) == before


@pytest.mark.composes
def test_a_member_of_a_sweep_starts_from_the_run_that_its_values_name(inside: Path) -> None:
    saved = configure(["init_from=base"]).model
    named = configure(["init_from='${run.name}se'", "run.name=ba"])
    assert named.init_from == "base" and named.model == saved
    assert saved != configure([]).model
