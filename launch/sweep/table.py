"""The results of a sweep's members, read from their folders: as a table on the screen, as text, and as CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.sweep.members import Member, Swept, plain

_WIDTH = 10_000  # of the text file: no line is folded


@dataclass
class Result:
    """A member and what it reached. loss: of the last step; heldout: the last evaluation's; both in nats per token.

    accuracy: the share of held-out targets that were the likeliest token at that evaluation. tokens_per_second: the
    median over steps. curve: (tokens, training loss) of every step whose loss is finite.
    """

    member: Member
    folder: Path
    loss: float | None = None
    heldout: float | None = None
    accuracy: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    seen: bool = True

    @property
    def done(self) -> bool:
        return self.member.state == "done"


def read(member: Member, folder: Path) -> Result:
    """The result of a member, from its run folder as far as that can be seen."""
    from train.tracking.record import records

    if not (folder / "config.yaml").exists():
        return Result(member, folder, seen=False)
    steps = records(folder / "metrics.jsonl")
    if not steps:
        return Result(member, folder)
    scored = next((r for r in reversed(steps) if r.get("heldout_loss") is not None), None) or _summary(folder)
    rates = [r["tokens_per_second"] for r in steps if r.get("tokens_per_second")]
    return Result(
        member,
        folder,
        loss=steps[-1].get("loss"),
        heldout=scored.get("heldout_loss"),
        accuracy=scored.get("heldout_accuracy"),
        tokens=steps[-1].get("tokens"),
        tokens_per_second=median(rates) if rates else None,
        curve=[(r["tokens"], r["loss"]) for r in steps if r.get("loss") is not None and "tokens" in r],
    )


def ranked(results: list[Result]) -> list[Result]:
    """The finished ones first, by held-out loss, then by training loss; the others after them."""

    def key(result: Result) -> tuple[Any, ...]:
        missing = float("inf")
        heldout = missing if result.heldout is None else result.heldout
        return not result.done, heldout, missing if result.loss is None else result.loss, result.member.number

    return sorted(results, key=key)


def best(results: list[Result]) -> Result | None:
    """The finished member of the lowest held-out loss, or None where none has one."""
    first = next(iter(ranked(results)), None)
    return first if first and first.done and first.heldout is not None else None


def table(swept: list[Swept], results: list[Result], *, folders: bool) -> Table:
    """The results in order; the best in bold with a star. folders: also where each run is."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("")
    shown.add_column("#", justify="right")
    for key in swept:
        shown.add_column(key.label, justify="right" if key.numbers else "left", no_wrap=True)
    for title in ("held-out", "right", "loss", "tokens", "tokens/s"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    if folders:
        shown.add_column("folder", no_wrap=True)
    first = best(results)
    for each in ranked(results):
        star = each is first
        cells = ["*" if star else "", str(each.member.number)]
        cells += [plain(each.member.values[key.key]) for key in swept]
        cells += [_number(each.heldout, ".4f"), _number(each.accuracy, ".1%"), _number(each.loss, ".4f")]
        cells += [_number(each.tokens, ",d"), _number(each.tokens_per_second, ",.0f"), _state(each)]
        cells += [str(each.folder)] if folders else []
        shown.add_row(*map(Text, cells), style="bold" if star else "dim" if not each.done else None)
    return shown


def show(swept: list[Swept], results: list[Result]) -> None:
    """Prints the table to standard output, with the folders where the screen is wide enough, and the lines below it."""
    console = Console(highlight=False, emoji=False)
    for folders in (True, False):
        shown = table(swept, results, folders=folders)
        width = console.measure(shown, options=console.options.update(width=_WIDTH)).maximum
        if width <= console.width:
            break
    Console(highlight=False, emoji=False, width=max(width, console.width)).print(
        shown
    )  # longer lines rather than cut cells
    for line in notes(swept, results):
        console.print(line, markup=False, soft_wrap=True)


def notes(swept: list[Swept], results: list[Result]) -> list[str]:
    """The lines below the table: which is best, and why each of the others did not finish."""
    lines = []
    if first := best(results):
        values = ", ".join(f"{key.label}={plain(first.member.values[key.key])}" for key in swept)
        lines.append(f"* best held-out loss: {first.heldout:.4f} nats per token, {values}, in {first.folder}")
    for each in sorted(results, key=lambda result: result.member.number):
        if each.member.reason:
            lines.append(f"{each.member.number}: {each.member.state}: {each.member.reason}")
        elif not each.seen and each.member.job:
            lines.append(
                f"{each.member.number}: in {each.folder}, which cannot be seen from here; job {each.member.job}"
            )
    return lines


def write(folder: Path, swept: list[Swept], results: list[Result]) -> None:
    """`table.txt` and `table.csv`, each written aside and renamed."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH, color_system=None, highlight=False, emoji=False).print(
        table(swept, results, folders=True)
    )
    lines = [line.rstrip() for line in text.getvalue().splitlines()] + ["", *notes(swept, results)]
    _replace(folder / "table.txt", "\n".join(lines).rstrip() + "\n")
    rows = io.StringIO()
    out = csv.writer(rows, lineterminator="\n")
    scores = ["heldout_loss", "heldout_accuracy", "loss", "tokens", "tokens_per_second"]
    out.writerow(["number", *(key.key for key in swept), *scores, "state", "reason", "folder"])
    for each in ranked(results):
        values = [plain(each.member.values[key.key]) for key in swept]
        out.writerow(
            [each.member.number, *values, each.heldout, each.accuracy, each.loss, each.tokens, each.tokens_per_second]
            + [each.member.state, each.member.reason, each.folder]
        )
    _replace(folder / "table.csv", rows.getvalue())


def _state(result: Result) -> str:
    elsewhere = "" if result.seen or not result.member.job or result.member.state == "waiting" else ", not seen here"
    return result.member.state + elsewhere


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
