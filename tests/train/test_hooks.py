"""Hooks: their order, what a restart and a rollback hand back to them, and that a new one is a class and a line."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import train.build
from parallel.schedule.static import Static
from tests.jobs import order
from train.build import build
from train.checkpoints import checkpoint
from train.checkpoints.hook import Checkpoints
from train.evaluation.heldout import Evaluation, Heldout, Means
from train.guards.rollback import Rollback
from train.hooks import RESERVED, Hook, Hooks
from train.loop import Trainer
from train.metrics.plan_notes import PlanNotes
from train.metrics.timing import PhaseTimes
from train.settings import GuardSettings, TrainSettings
from train.state import State, TrainProgress
from train.tracking.hook import Recording

CALLS: list[tuple[str, str]] = []


class Noisy(Hook):
    """Notes every call."""

    def __init__(self, name: str, fails: str = ""):
        self.name, self.fails = name, fails

    def _note(self, moment: str) -> None:
        CALLS.append((self.name, moment))
        if moment == self.fails:
            raise OSError(f"{self.name} broke")

    def before_run(self) -> None:
        self._note("before_run")

    def before_step(self, plan: Any) -> None:
        self._note("before_step")

    def after_step(self, record: dict[str, Any]) -> None:
        record["seen by"] = [*record.get("seen by", ()), self.name]
        self._note(f"after_step {record['step']}")

    def on_skip(self, record: dict[str, Any]) -> None:
        self._note("on_skip")

    def after_run(self) -> None:
        self._note("after_run")

    def on_failure(self, error: BaseException) -> None:
        self._note(f"on_failure {type(error).__name__}")


class Counter(Hook):
    """Remembers the steps that it saw, and a sum over them as a tensor: a feature with a state of its own."""

    key: ClassVar[str] = "counter"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.total = torch.zeros(3)

    def after_step(self, record: dict[str, Any]) -> None:
        self.steps.append(record["step"])
        self.total += record["step"]

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def tensors(self) -> dict[str, Any]:
        return {"total": self.total}

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        self.steps = list(state.get("steps", []))
        return self.tensors() if state else None


def settings(steps: int, **more: Any) -> TrainSettings:
    return TrainSettings(steps=steps, batch_tokens=10, tokens=10 * steps, **more)


def trainer(hooks: Hooks, script: list[str], steps: int = 9) -> Trainer:
    """One that takes no steps but those of a script: an optimizer step, one that is skipped, a stop, an error."""
    progress = TrainProgress(settings(steps), State())
    names = (
        "seed",
        "rate",
        "stop",
        "model",
        "optimizer",
        "schedule",
        "batches",
        "plan",
        "executor",
        "groups",
        "phases",
    )
    parts: dict[str, Any] = dict.fromkeys((*names, "guard"))
    rollback = SimpleNamespace(due=lambda: script[:1] == ["step after going back"], go_back=lambda: went.append("back"))
    found = Trainer(
        progress=progress,
        hooks=hooks,
        patience=SimpleNamespace(end=lambda: None),
        rollback=rollback,
        **parts,  # type: ignore[arg-type]
    )
    went: list[str] = []
    found.went = went  # type: ignore[attr-defined]

    def step() -> tuple[dict[str, Any], bool]:
        what = script.pop(0)
        if what == "error":
            raise FloatingPointError("no number")
        hooks.before_step(None)  # type: ignore[arg-type]
        if "skip" in what:
            progress.skipped()
            return {"step": progress.state.step, "skipped": {}}, "stop" in what
        progress.stepped(10, 10)
        return {"step": progress.state.step}, "stop" in what

    found.step = step  # type: ignore[method-assign]
    return found


def fit(hooks: Hooks, *script: str, steps: int = 9) -> tuple[list[tuple[str, str]], Any]:
    CALLS.clear()
    one = trainer(hooks, list(script), steps)
    one.fit()
    return list(CALLS), one


def test_hooks_are_called_in_the_order_of_the_list_at_every_moment():
    calls, one = fit(Hooks(Noisy("a"), Noisy("b"), Noisy("c")), "step", "skip", "step after going back", steps=2)
    moments = ["before_run", "before_step", "after_step 1", "before_step", "on_skip", "before_step", "after_step 2"]
    assert calls == [(name, moment) for moment in [*moments, "after_run"] for name in "abc"]
    assert one.went == ["back"], "once, after the step that was skipped"


def test_what_a_hook_adds_to_a_record_is_there_for_those_behind_it():
    hooks = Hooks(Noisy("first"), Noisy("second"))
    assert trainer(hooks, ["step"]).advance() == {"step": 1, "seen by": ["first", "second"]}


def test_a_stop_ends_the_run_without_going_back_and_an_error_is_told_to_all():
    calls, one = fit(Hooks(Noisy("a")), "skip and stop", "step after going back")
    assert [moment for _, moment in calls] == ["before_run", "before_step", "on_skip", "after_run"] and not one.went
    with pytest.raises(FloatingPointError, match="no number"):
        fit(Hooks(Noisy("a", fails="on_failure FloatingPointError"), Noisy("b")), "step", "error")
    assert CALLS[-2:] == [("a", "on_failure FloatingPointError"), ("b", "on_failure FloatingPointError")]
    with pytest.raises(OSError, match="a broke"):
        fit(Hooks(Noisy("a", fails="after_step 1"), Noisy("b")), "step")
    assert CALLS[-1] == ("b", "on_failure OSError") and ("b", "after_step 1") not in CALLS


def test_the_order_of_the_calls_is_that_of_the_list_and_this_test_can_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Hooks, "after_step", lambda self, record: [h.after_step(record) for h in reversed([*self])])
    for test in (
        test_hooks_are_called_in_the_order_of_the_list_at_every_moment,
        test_what_a_hook_adds_to_a_record_is_there_for_those_behind_it,
    ):
        with pytest.raises(AssertionError):
            test()


def test_two_hooks_have_two_keys_and_none_that_a_manifest_has():
    with pytest.raises(ValueError, match="hooks: Counter has the key counter, which is in use"):
        Hooks(Counter(), Counter())
    assert {*State().facts()} <= RESERVED
    for key in ("step", "model", "files"):
        with pytest.raises(ValueError, match=f"has the key {key}, which is in use"):
            Hooks(type("Other", (Counter,), {"key": key})())
    assert isinstance(Hooks(Noisy("a"), one := Counter()).of(Counter), Counter) and Hooks(one).of(Counter) is one
    with pytest.raises(LookupError, match="there is no Checkpoints"):
        Hooks(one).of(Checkpoints)


def test_a_state_that_cannot_be_is_damage_and_an_error_without_a_state_is_none():
    class Strict(Counter):
        def load(self, state: dict[str, Any]) -> None:
            self.steps = state["steps"]

    with pytest.raises(checkpoint.DamagedError, match="its manifest says of counter what cannot be"):
        Hooks(Strict()).load({"counter": {"other": 1}}, Path("x"))
    with pytest.raises(KeyError):
        Hooks(Strict()).load({}, None)


# A run that is restarted, and one that goes back: the toy hook is in build's list by one line.
def with_a_counter(job: dict[str, Any], *, loads: bool = True) -> Any:
    honest = train.build.Hooks
    train.build.Hooks = lambda: Hooks(Counter())  # type: ignore[misc, assignment, return-value]
    load = Hooks.load
    if not loads:  # broken on purpose: nothing is handed back
        Hooks.load = lambda self, manifest, path, division=None: load(self, {}, None)  # type: ignore[method-assign]
    try:
        return build(job)
    finally:
        train.build.Hooks = honest  # type: ignore[misc]


def counted(job: dict[str, Any], loads: bool = True) -> dict[str, Any]:
    one = with_a_counter(job, loads=loads)
    one.fit()
    counter = one.hooks.of(Counter)
    names = [type(hook).__name__ for hook in one.hooks]
    return {"steps": counter.steps, "total": counter.total.tolist(), "hooks": names, "skips": one.state.skips}


@pytest.mark.dist
def test_a_hook_with_a_state_goes_on_where_a_checkpoint_left_it(run, tmp_path: Path) -> None:
    more = ["cluster.workers=2", "model.layers=1", "train.average=ema", "tracking=none"]
    first = order(tmp_path, tmp_path / "run", *more, "train.steps=2")
    again = order(tmp_path, tmp_path / "run", *more, "train.steps=3", resume=str(tmp_path / "run/checkpoints/step-2"))
    ranks = run(2, counted, first)
    assert ranks[0]["hooks"] == ranks[1]["hooks"], "collectives have their order from the list"
    rest = ["Average", "PlanNotes", "Evaluation", "Checkpoints", "Recording"]
    assert ranks[0]["hooks"] == ["Counter", "Guard", "TransportChoice", *rest]
    saved = json.loads((tmp_path / "run/checkpoints/step-2/manifest.json").read_text())
    assert saved["counter"] == {"steps": [1, 2]} and saved["average"]["kind"] == "ema" and saved["guard"] == {}
    for found in run(2, counted, again):
        assert found["steps"] == [1, 2, 3] and found["total"] == [6.0] * 3
    for broken in run(2, counted, again | {"run_dir": str(tmp_path / "other")}, False):
        assert broken["steps"] == [3], "the test sees a state that is not handed back"


class Alone:
    """Of one rank."""

    rank = 0
    first = True


def gone_back(folder: Path, loads: bool) -> dict[str, Any]:
    """A run of one rank that keeps a checkpoint after step 2, goes wrong after step 4, and goes back."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    progress = TrainProgress(settings(9, guard=GuardSettings(skips=2, window=4, backoff=0.5)), State())
    said: list[str] = []
    patience: Any = SimpleNamespace(during=lambda what: PhaseTimes()("checkpoint"))
    first, second = Counter(), type("Second", (Counter,), {"key": "second"})()
    hooks = Hooks(first)
    kept = Checkpoints(
        folder=folder / "checkpoints",
        model=model,
        optimizer=optimizer,
        batches=SimpleNamespace(rope_theta=lambda step, skips: None),
        progress=progress,
        hooks=hooks,
        phases=PhaseTimes(),
        patience=patience,
        say=said.append,
        written=lambda path, record: said.append(path.name),
        facts={"seed": 0},
    )
    hooks.add(second)
    hooks.add(kept)
    back = Rollback(
        run_dir=folder,
        progress=progress,
        seed=0,
        model=model,
        optimizer=optimizer,
        batches=None,
        executor=None,  # type: ignore[arg-type]
        groups=Alone(),  # type: ignore[arg-type]
        split=(1, 1),
        load=kept.go_back,
        tell=said.append,
    )
    weights = {}
    for step in range(1, 5):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        progress.stepped(10, 10)
        hooks.after_step({"step": step})
        weights[step] = model.weight.detach().clone()
        if step == 2:
            kept.save()
    second.steps = [-1]
    progress.skipped()
    assert not back.due()
    progress.skipped()
    assert back.due()
    if not loads:
        Hooks.load = lambda self, manifest, path, division=None: None  # type: ignore[method-assign]
    back.go_back()
    return {
        "weights": torch.equal(model.weight, weights[2]) and not torch.equal(weights[2], weights[4]),
        "steps": [hook.steps for hook in (first, second)],
        "totals": [hook.total.tolist() for hook in (first, second)],
        "state": progress.state.facts(),
        "said": said,
    }


@pytest.mark.dist
def test_going_back_hands_every_hook_its_state_of_that_checkpoint(run, tmp_path: Path) -> None:
    (found,) = run(1, gone_back, tmp_path / "run", True)
    assert found["weights"] and found["steps"] == [[1, 2], [1, 2]] and found["totals"] == [[3.0] * 3] * 2
    state = found["state"]
    assert (state["step"], state["skipped"], state["rollbacks"], state["scale"]) == (2, [[2, 6]], 1, 0.5)
    assert found["said"][-1].endswith("back to step-2, batches 2 to 5 passed over, learning rate times 0.5")
    (broken,) = run(1, gone_back, tmp_path / "broken", False)
    assert broken["steps"] == [[1, 2, 3, 4], [-1]], "the test sees states that are not handed back"


class Told:
    """A tracker that notes what it is told, and what metrics.jsonl would have."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **more: self.calls.append((name, *given, *more.values()))


def test_a_record_is_written_whole_and_the_summary_has_the_last_evaluation(tmp_path: Path) -> None:
    progress = TrainProgress(settings(3), State(attempt=2))
    recording = Recording(tmp_path, progress, PhaseTimes())
    recording.before_run()  # a rank without a tracker says and writes nothing
    recording.on_failure(OSError("x"))
    recording.after_run()
    assert not [*tmp_path.iterdir()]
    recording.tracker = told = Told()  # type: ignore[assignment]
    hooks = Hooks(recording)
    hooks.before_run()
    scores = {"heldout_loss": 2.0, "heldout_accuracy": 0.5, "heldout": {"a": {"loss": 2.0}}}
    for step, more in ((1, scores | {"forgetting": {"a": 0.1}}), (2, {}), (3, {"heldout_loss_average": 1.5})):
        progress.stepped(10, 10)
        hooks.after_step({"step": step, "tokens": 10 * step, "loss": 4.0 - step, **more})
    hooks.after_run()
    alert, first, *_, last, end = told.calls
    assert alert == ("alert", "goes on", "attempt 2 goes on from step 0", "INFO")
    assert first[1]["forgetting"] == {"a": 0.1} and "seconds" in first[1] and last[1]["step"] == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.pop("seconds") >= 0 and end[:1] == ("finish",) and len(told.calls) == 5
    assert summary == {"step": 3, "tokens": 30, "loss": 1.0, "stopped": False, "heldout_loss_average": 1.5, **scores}


def test_the_tracker_hears_of_a_failure_and_its_own_is_not_raised(tmp_path: Path) -> None:
    recording = Recording(tmp_path, TrainProgress(settings(3), State(step=4)), PhaseTimes())
    recording.tracker = told = Told()  # type: ignore[assignment]
    Hooks(recording).on_failure(FloatingPointError("loss is nan\nand more"))
    text = "FloatingPointError: loss is nan (attempt 1, step 4)"
    assert told.calls == [
        ("alert", "not finite", text, "ERROR"),
        ("finish", {"step": 4, "tokens": 0, "error": text}, 1),
    ]


def test_evaluations_come_when_due_and_at_the_end_and_not_for_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Heldout(Means(2.0, 0.5), {"old": Means(2.0, 0.5)})
    monkeypatch.setattr("train.evaluation.heldout.heldout", lambda *given, **more: scores)
    progress, logged = TrainProgress(settings(4, evaluate_every=30), State()), []
    sequence = SimpleNamespace(starts=np.ones(2, dtype=bool), counted=np.ones(2, dtype=bool))
    batches = SimpleNamespace(sides={"old": True}, batch=lambda seed, step, skips: [sequence])
    parts: dict[str, Any] = {"executor": None, "plan": None, "phases": PhaseTimes(), "seed": 0, "batches": batches}
    evaluation = Evaluation(progress=progress, log=logged.append, replays=True, bytes_per_target=(2.0, 1.0), **parts)
    evaluation.before_run()
    assert logged[0]["forgetting"] == {"old": 0.0} and logged[0]["step"] == 0 and evaluation.state() == {"old": 2.0}
    assert logged[0]["heldout_bits_per_byte"] == pytest.approx(1 / math.log(2))

    def evaluated(stopping: bool = False) -> bool:
        progress.stopping = stopping
        progress.stepped(10, 10)
        record: dict[str, Any] = {}
        evaluation.after_step(record)
        assert not record or record["documents"] == [[1, 2]]
        return bool(record)

    assert [evaluated(), evaluated(stopping=True), evaluated(), evaluated()] == [False, False, True, True]
    progress.state.step, progress.state.tokens = 3, 30
    assert not evaluated(stopping=True), "a stop should not take long, even at the end"
    again = Evaluation(progress=progress, log=logged.append, replays=True, **parts)
    again.load({"old": 3.0})
    again.before_run()
    assert len(logged) == 1 and again.state() == {"old": 3.0}, "measured from the first beginning"


def test_a_plan_is_noted_once_by_one_rank(tmp_path: Path) -> None:
    plans = [
        Static(layout="contiguous").plan(step, [length], data=1, sequence=1)
        for step, length in ((1, 8), (2, 8), (3, 9))
    ]
    for folder in (None, tmp_path / "plans"):
        hooks = Hooks(PlanNotes(folder))
        for plan in plans:
            hooks.before_step(plan)
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == ["step-1.txt", "step-3.txt"]
