"""Plans of training without a model: made ahead, logged, replayed where they fit, changed by a slow rank."""

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import train.planning
from data.pack import Packed, unpacked
from parallel.schedule.adaptive.cost import Cluster, Costs, Layer, Model, Wire
from parallel.schedule.adaptive.scheduler import Adaptive
from parallel.schedule.plan import Group
from parallel.sequence.place import _identities
from train.planning import LOG, Planning

RANKS = 4


def sequence(length: int) -> Packed:
    zeros = np.zeros(length, dtype=np.int64)
    return Packed(tokens=zeros, targets=zeros, starts=np.arange(length) == 0)


def drawn(step: int) -> list[Packed]:
    rng = np.random.default_rng(step)
    return [sequence(int(n)) for n in rng.lognormal(3, 1, 24).clip(1, 150)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of four, whose word nobody waits for."""
    fake = SimpleNamespace(
        get_world_size=lambda: RANKS, get_backend=lambda: "gloo", broadcast_object_list=lambda told, group: None
    )
    monkeypatch.setattr(train.planning, "dist", fake)


class Run:
    """A planner, the steps that it is asked for, and its lines for people."""

    def __init__(self, folder: Path, step: int = 0, room: int = 64, **keys: Any):
        layers = (Layer(2, pair=1e-7, token=1e-5, token_bytes=64.0), Layer(2, token=2e-5, state_bytes=512.0))
        wires = {1: Wire(1e8, 1e-4)}
        costs = Costs(Model("small", layers, 0.01, 0, 1), Cluster("4", RANKS, 2.0**40, wires, most_tokens=room))
        self.progress, self.lines, self.next = SimpleNamespace(state=SimpleNamespace(step=step)), list[str](), None
        folder.mkdir(exist_ok=True)
        self.planning = Planning(
            Adaptive(tokens_per_rank=room, quantum=1, **keys),
            costs,
            ranks=RANKS,
            progress=self.progress,
            following=lambda: self.next,
            folder=folder,
            settings=json.dumps(keys),
            say=self.lines.append,
        )
        self.planning.load({})

    def step(self, batch: list[Packed] | None = None) -> Any:
        """Plans the next step, with the batch behind it ready."""
        number = self.progress.state.step + 1
        self.next = Future()
        self.next.set_result(drawn(number + 1))
        _, plan = self.planning.next(batch or drawn(number))
        plan.check(RANKS)
        self.progress.state.step = number
        return plan


def test_a_plan_made_ahead_is_the_one_that_is_made_now(alone: None, tmp_path: Path) -> None:
    ahead, now = Run(tmp_path / "a"), Run(tmp_path / "b")
    for step in range(1, 5):
        plan = ahead.step()
        now.planning._ahead = None
        assert plan == now.step() and plan.step == step
    other = [sequence(20)] * 5
    assert ahead.step(other).lengths == (20,) * 5, "a batch that was not foreseen is planned anew"


def test_logged_plans_are_replayed_where_they_fit(alone: None, tmp_path: Path) -> None:
    first = Run(tmp_path / "a")
    plans = [first.step() for _ in range(5)]
    rows = [json.loads(line) for line in (tmp_path / "a" / LOG).read_text().splitlines()]
    for row in rows:  # one group a micro-step: no planner's choice
        row["micro_steps"] = [[group] for micro in row["micro_steps"] for group in micro]
    (tmp_path / "a" / LOG).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "cut')
    again = Run(tmp_path / "a", step=2)
    third = again.step()
    assert third != plans[2] and len(third.micro_steps) == len(rows[2]["micro_steps"])
    assert again.step([sequence(9)] * 3).lengths == (9,) * 3, "of another batch it says nothing"
    assert len(again.step().micro_steps) == len(rows[4]["micro_steps"])
    changed = Run(tmp_path / "a", step=2, layout="contiguous")
    assert len(changed.step().micro_steps) == len(plans[2].micro_steps), "other keys ask for other plans"


def test_a_slow_rank_gets_less_work_from_a_logged_step_on(alone: None, tmp_path: Path) -> None:
    run = Run(tmp_path / "a", room=512)

    def work(plan: Any) -> np.ndarray:
        return train.planning._expected(run.planning._costs, plan, RANKS)

    shares = []
    for step in range(1, 21):
        plan = run.step()
        share = work(plan)
        shares.append(share[3] / share.sum())
        slow = np.array([1, 1, 1, 2.5 if step > 2 else 1])
        run.planning.observe(plan, share * slow * np.random.default_rng(step).uniform(0.97, 1.03, RANKS))
    assert np.mean(shares[:6]) > 0.2 and np.mean(shares[12:]) < 0.15
    (line, *_) = run.lines
    assert "speeds of ranks changed: rank 3 at 0." in line and 4 < int(line.split(":")[0].split()[1]) < 12
    assert run.planning._costs.speeds[3] == pytest.approx(0.4, rel=0.2)
    state = run.planning.state()
    resumed = Run(tmp_path / "a", step=20, room=512)
    resumed.planning.load(json.loads(json.dumps(state)))
    run.planning._ahead = None
    assert resumed.step() == run.step(), "a run that goes on believes what it believed"


def test_a_rank_that_computed_nothing_says_nothing(alone: None, tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    for _ in range(9):
        run.planning.observe(run.step(), [0.0, 0.0, 0.0, 9.0])
    assert not run.lines


def test_a_sequence_that_fits_no_group_ends_the_run_in_one_line(alone: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a sequence of 300 tokens fits no group: the largest .* 4 ranks is 256"):
        Run(tmp_path / "a").step([sequence(300)])


def test_random_choices_know_a_document_by_its_window(alone: None, tmp_path: Path) -> None:
    lengths = [[5, 9, 1], [15]]
    windows = [
        replace(sequence(sum(each)), starts=np.isin(np.arange(sum(each)), np.cumsum([0, *each]))) for each in lengths
    ]
    pieces = unpacked(windows)
    whole = _identities(Group((0,), (0, 1), ()), windows, 7, 0)
    apart = _identities(Group((0,), (3, 2, 1, 0), ()), pieces, 7, 0)
    assert whole == apart[::-1] == [(7, 0, 0, 5), (7, 0, 1, 9), (7, 0, 2, 1), (7, 1, 0, 15)]


@pytest.mark.parametrize("mutation", ["logged", "_digest"])
def test_a_planner_that_forgets_the_log_or_takes_any_of_it_is_caught(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    monkeypatch.setattr(train.planning, mutation, {"logged": lambda *_: {}, "_digest": lambda lengths: 0}[mutation])
    with pytest.raises((AssertionError, ValueError)):
        test_logged_plans_are_replayed_where_they_fit(None, tmp_path)
