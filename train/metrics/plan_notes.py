"""The hook that keeps a run's plans for people to read, as `plans/step-N.txt`."""

from pathlib import Path

from parallel.schedule.plan import MicroStep, Plan
from train.hooks import Hook

NOTED = 32  # plans: lengths that come in turns, as those of a decomposition do, have one each


class PlanNotes(Hook):
    """Writes every plan that no recent step had. folder: where to; None on ranks that write none. most: plans to write;
    None for all, where plans repeat."""

    def __init__(self, folder: Path | None, most: int | None = None):
        self._folder, self._left = folder, most
        self._noted: tuple[tuple[MicroStep, ...], ...] = ()

    def before_step(self, plan: Plan) -> None:
        if self._folder is None or plan.micro_steps in self._noted or self._left == 0:
            return
        self._left = None if self._left is None else self._left - 1
        self._noted = (*self._noted[-NOTED:], plan.micro_steps)
        self._folder.mkdir(exist_ok=True)
        (self._folder / f"step-{plan.step}.txt").write_text(plan.text() + "\n")
