"""extension.json: what was measured before a chain's first stage and after each, as it comes."""

import json
from pathlib import Path
from typing import Any

from data import reading
from launch.errors import UserError
from launch.extend.stages import StagePlan

FILE = "extension.json"


class Record:
    """The file in a chain's folder, complete or as it was.

    trained: tokens that the parent was trained on. lengths: of the stages. `facts`: what the file holds.
    """

    def __init__(self, folder: Path, trained: int | None, lengths: list[int]):
        self.path = folder / FILE
        self.facts: dict[str, Any] = {"trained": trained, "lengths": lengths, "stages": []}
        if self.path.exists():
            self.facts = _read(self.path)
            self.facts["lengths"] = lengths
        self._took = dict[str, float]()

    def __contains__(self, name: str) -> bool:
        return any(stage["name"] == name for stage in self.facts["stages"])

    def took(self, name: str, seconds: float) -> None:
        """Notes how long a stage's run was, here and now."""
        self._took[name] = seconds

    def add(self, name: str, results: Path, leg: StagePlan | None) -> None:
        """Adds an evaluation's results after a stage; those of the parent, without one."""
        measured = json.loads(results.read_text())
        stage: dict[str, Any] = {"name": name, "length": self.facts["trained"] if leg is None else leg.stage.length}
        if leg is not None:
            stage |= {"tokens": leg.flight.train.total_tokens, "lr": leg.config.optimizer["lr"]}
            stage |= {"rotary": leg.positions, "seconds": self._took.get(name)}
        stage |= {"checkpoint": measured["checkpoint"], "read": measured["length"]}
        stage |= {part: measured[part] for part in measured if part not in ("checkpoint", "length")}
        self.facts["stages"].append(stage)
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps(self.facts, indent=1) + "\n")
        aside.rename(self.path)


def _read(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is none of a chain's."""
    try:
        value = reading.json_object(path)
        if not isinstance(value.get("stages"), list) or not all(
            isinstance(stage, dict) and isinstance(stage.get("name"), str) for stage in value["stages"]
        ):
            raise ValueError(f"{path.name}: has no stages")
    except ValueError as error:
        raise UserError(f"{path.parent}: {error}") from None
    return value
