"""A sweep's own folder: `sweep.json` says what it is and how far each member has come; the tables follow from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data import reading
from launch.errors import UserError
from launch.sweep import table as sweep_table
from launch.sweep.members import Member, Swept
from launch.sweep.table import Result

FILE = "sweep.json"
OPEN = ("waiting", "running", "stopped", "failed")  # states that `resume` takes up again


@dataclass
class Sweep:
    """folder: where sweep.json, the tables, the plot and a folder for each member are. name: the members' group. here:
    the folder where it was started, which relative paths in the overrides are of; None where that is not known."""

    folder: Path
    name: str
    overrides: list[str]
    swept: list[Swept]
    members: list[Member]
    here: str | None = None
    _results: dict[int, Result] = field(default_factory=dict)

    def place(self, member: Member) -> Path:
        """A member's run folder."""
        return self.folder / member.folder

    def mark(self, member: Member, state: str, reason: str | None = None) -> None:
        """A member has come to another state: kept at once, in the tables too."""
        member.state, member.reason = state, reason
        self._results.pop(member.number, None)
        self.save()
        self.tabulate()

    def results(self) -> list[Result]:
        """Returns what each member has reached; read again for those whose state has changed."""
        for member in self.members:
            if member.number not in self._results:
                self._results[member.number] = sweep_table.read(member, self.place(member))
        return [self._results[member.number] for member in self.members]

    def tabulate(self) -> None:
        """Writes table.txt and table.csv."""
        sweep_table.write(self.folder, self.swept, self.results())

    def save(self) -> None:
        """Writes sweep.json aside, and renames it."""
        record = {
            "name": self.name,
            "here": self.here,
            "overrides": self.overrides,
            "swept": [asdict(key) for key in self.swept],
            "members": [asdict(member) for member in self.members],
        }
        aside = self.folder / f"{FILE}.partial"
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Sweep:
        """The sweep of a folder. Raises UserError where its file cannot be read."""
        try:
            record = reading.json_object(folder / FILE)
            swept = [Swept(**key) for key in record["swept"]]
            members = [Member(**member) for member in record["members"]]
            for member in members:
                if (
                    not isinstance(member.folder, str)
                    or set(member.folder) & set("/\\\0")
                    or member.folder in (".", "..")
                ):
                    raise ValueError(f"{member.folder}: is no folder of it")
            if not isinstance(record["name"], str) or not isinstance(record["overrides"], list):
                raise TypeError("its name or its overrides are none")
            here = record.get("here")
            if here is not None and not isinstance(here, str):
                raise TypeError("where it began is no folder")
            return cls(folder, record["name"], record["overrides"], swept, members, here)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"resume={folder}: {FILE} cannot be read ({type(error).__name__}: {error})") from None
