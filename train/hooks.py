"""Hooks: all that a run does beside its steps, in an ordered list that `train.build` makes.

The loop calls every hook of the list, in its order, at the same moments on every rank. So a hook may enter collectives
in any method but `on_failure`, as long as it does so on every rank; what only rank 0 does (files, a tracker) is decided
inside a hook and not by leaving it out of the list. The order is that of the list: an evaluation adds to a record
before a checkpoint is written, and the record is written after both.

A hook that remembers something across a restart has a `key`. Checkpoints keep its `state` in their manifest under that
key and its `tensors` in their files; a resumed run and one that goes back to a checkpoint hand both back through
`load`. A new feature with a state is one such class, and one line in `train.build`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from parallel.schedule.plan import Plan
from parallel.tensor import Division
from train.checkpoints import checkpoint
from train.checkpoints.stored import DamagedError

Record = dict[str, Any]  # of a step, as metrics.jsonl has it
RESERVED = {"format", "step", "tokens", "places", "skips", "attempt", "skipped", "rollbacks", "since", "scale"}
RESERVED |= {"padding", "seed", "data", "order", "published", "rope_theta", "model", "optimizer", "files"}


class Hook(Protocol):
    """Does nothing by itself: a hook extends this class and defines the methods that it needs.

    key: under which name a checkpoint keeps the hook's state; empty for a hook that has none.
    """

    key: ClassVar[str] = ""

    def before_run(self) -> None:
        """Called once, before the first step of this attempt."""
        return

    def before_step(self, plan: Plan) -> None:
        """Called with the plan of each step before it runs, also of a step that is then skipped."""
        return

    def after_step(self, record: Record) -> None:
        """Called when the weights have been updated. A hook may add to `record` for those behind it in the list."""
        return

    def on_skip(self, record: Record) -> None:
        """Called in the place of `after_step` when the guard held a step back and its batch was passed over."""
        return

    def after_run(self) -> None:
        """Called once, when the budget is used up or a stop was asked for."""
        return

    def on_failure(self, error: BaseException) -> None:
        """Called when the run ends by an error, perhaps on this rank alone: no collectives here."""
        return

    def state(self) -> dict[str, Any] | None:
        """Returns what the manifest of a checkpoint keeps, in JSON's types; None for nothing."""
        return None

    def tensors(self) -> dict[str, Any] | None:
        """Returns what the files of a checkpoint keep: tensors by name, nested or not; None for nothing."""
        return None

    def load(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Takes back what `state` gave; {} where there is no checkpoint, or one without this key. Collective.

        Returns the tensors that are then filled in place from those that `tensors` gave; None for none.
        """
        return None


H = TypeVar("H", bound=Hook)


class Hooks:
    """The hooks of a run, in order. Raises ValueError for a key that two hooks, or a hook and the manifest, have."""

    def __init__(self, *hooks: Hook):
        self._hooks: list[Hook] = []
        for hook in hooks:
            self.add(hook)

    def add(self, hook: Hook) -> None:
        """Puts a hook behind the others."""
        if hook.key and hook.key in RESERVED | {other.key for other in self._hooks}:
            raise ValueError(f"hooks: {type(hook).__name__} has the key {hook.key}, which is in use")
        self._hooks.append(hook)

    def __iter__(self) -> Iterator[Hook]:
        return iter(self._hooks)

    def of(self, kind: type[H]) -> H:
        """Returns the hook of a class. Raises LookupError where there is none."""
        for hook in self._hooks:
            if isinstance(hook, kind):
                return hook
        raise LookupError(f"hooks: there is no {kind.__name__}")

    def before_run(self) -> None:
        for hook in self._hooks:
            hook.before_run()

    def before_step(self, plan: Plan) -> None:
        for hook in self._hooks:
            hook.before_step(plan)

    def after_step(self, record: Record) -> None:
        for hook in self._hooks:
            hook.after_step(record)

    def on_skip(self, record: Record) -> None:
        for hook in self._hooks:
            hook.on_skip(record)

    def after_run(self) -> None:
        for hook in self._hooks:
            hook.after_run()

    def on_failure(self, error: BaseException) -> None:
        """`error` is what ended the run and what is raised, and not what else may break here."""
        for hook in self._hooks:
            with contextlib.suppress(Exception):
                hook.on_failure(error)

    def state(self) -> dict[str, Any]:
        """Returns the states of all hooks by their keys, for a manifest."""
        states = {hook.key: hook.state() for hook in self._hooks if hook.key}
        return {key: state for key, state in states.items() if state is not None}

    def tensors(self) -> dict[str, Any]:
        """Returns the tensors of all hooks by their keys, for the files of a checkpoint."""
        by_key = {hook.key: hook.tensors() for hook in self._hooks if hook.key}
        return {key: tensors for key, tensors in by_key.items() if tensors is not None}

    def load(self, manifest: dict[str, Any], path: Path | None, division: Division | None = None) -> None:
        """Hands every hook its state of the checkpoint `path`, whose manifest this is; {} and None without one.
        division: of the model whose run this is.

        Raises DamagedError for a state that a hook cannot read. Collective.
        """
        wanted = {}
        for hook in self._hooks:
            if not hook.key:
                continue
            state = manifest.get(hook.key)
            try:
                tensors = hook.load(state or {})
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                if not state:
                    raise
                raise DamagedError(f"its manifest says of {hook.key} what cannot be") from error
            if tensors and path is not None:
                wanted[hook.key] = tensors
        if wanted and path is not None:
            checkpoint.read(wanted, path, division=division)
