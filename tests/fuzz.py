"""Any value of any key: no verb answers with a traceback, none hangs, and a refusal is one line (`make fuzz`).

Cases are drawn by a seed, so that a number names each: `python -m tests.fuzz --first 0 --count 2000`. A case is a verb
that trains nothing, a small job, the options of the group that a key belongs to, and one or two keys with any values.
The keys are those of the reference: every key of every option of every group, with what constructors add to the files.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from launch.cli import main
from launch.config import files
from launch.config.compose import composed
from launch.errors import UserError
from tests.jobs import overrides

LIMIT_S = 20  # of a case, of this process's own time; of time on the wall six times as much
MEMORY = 24 << 30  # of address space: a value that asks for more must be refused

NUMBERS = (
    "0 1 -1 2 3 7 1.5 -0.0 1e-45 1e-320 1e308 1e400 -1e400 inf -inf nan 1e15 1e18 1e19 100000000 2147483648".split()
)
NUMBERS += ["99999999999999999999999", "-99999999999999999999999", "0x10", "1_000", "1e3", "'64'", "4.0", "1" * 5000]
TEXTS = ["null", "true", "false", "''", "' '", "a", "a/b", "../evil", "..", "/", "~", "~/x", "~nobody/x", "/dev/null"]
TEXTS += [
    "a:b",
    "x" * 300,
    "ü",
    "\udcff",
    '"it\'s"',
    "'a[b]c'",
    "'[1'",
    "a b",
    "???",
    "?",
    "'*'",
    "'%'",
    "'\\'",
    "-",
    "@",
]
TEXTS += ["'a\nb'", "'\x00'", "'\x1b[2J'", "$HOME", "'$HOME'", "'{}'", "'[bold]x[/bold]'", "'[/x]'"]
TREES = [
    "[]",
    "[1]",
    "[a]",
    "[null]",
    "[[1,2]]",
    "[[0,0]]",
    "[[0,1e15]]",
    "[-1]",
    "[1e400]",
    "[[]]",
    "[[[1]]]",
    "[true]",
]
TREES += ["{}", "{a: 1}", "{_target_: os.system}", "{_target_: data.Data}", "{_target_: null}", "{_target_: 3}"]
TREES += ["{_target_: models.mixers.gla.GLA}", "{_target_: torch.optim.SGD}", "{_partial_: true}", "[{_target_: 1}]"]
TREES += ["{null: 1}", "{1: 2}", "{_target_: train.settings.TrainSettings, tokens: -1}", "{_args_: [1]}"]
LINKS = ["${seed}", "${nope}", "${run}", "${oc.env:HOME}", "${oc.env:NOPE}", "${model}", "${", "${a:b}", "$", "${..}"]
VALUES = [*NUMBERS, *TEXTS, *TREES, *LINKS]
VERBS = ("plan", "plan", "plan", "train --cfg", "sweep --cfg", "template")

# What would reach outside: another machine, the network, a thousand processes, a file without an end.
_OUTSIDE = ("cluster.address", "cluster.kind", "data.workers", "data.local")


def choices() -> list[tuple[str, ...]]:
    """Overrides of groups under which, together, every key of the reference is there."""
    found: list[tuple[str, ...]] = [()]
    for group, options in files.groups().items():
        if group == "mixer":
            found += [(f"mixer@model.blocks.gla.mixer={option}",) for option in options]
        elif group == "positions":
            where = "model.blocks.gla.mixer"
            found += [(f"mixer@{where}=attention", f"positions@{where}.positions={option}") for option in options]
        elif group != "experiment":
            found += [(f"{group}={option}",) for option in options]
    return found


@cache
def keys(chosen: tuple[str, ...]) -> list[str]:
    """Every full key of a job under `chosen`; those of the chosen part alone, where one is chosen."""
    try:
        found = list(_paths(composed(list(chosen)).to_dict()))
    except UserError:  # an option that takes a value of the user's
        return ["model"]
    place = chosen[-1].partition("=")[0].rpartition("@")[2] if chosen else ""
    return [key for key in found if key.startswith(place) and key not in _OUTSIDE]


def _paths(node: Any, path: str = "") -> Iterator[str]:
    if path:
        yield path
    for key, child in node.items() if isinstance(node, dict) else ():
        yield from _paths(child, f"{path}.{key}" if path else str(key))


def case(number: int, place: Path) -> list[str]:
    """The command line of a case."""
    draw = random.Random(number)
    words = draw.choice(VERBS).split()
    job = overrides(place)
    for _ in range(draw.choice((1, 1, 2))):
        chosen = draw.choice(choices())
        while chosen and chosen[0].startswith("cluster=") and words[0] == "template":
            chosen = draw.choice(choices())
        key, value = draw.choice(keys(chosen)), draw.choice(VALUES)
        words += [
            *(each for each in chosen if each not in words),
            f"{draw.choice(('', '', '', '+', '++'))}{key}={value}",
        ]
    own = {word.lstrip("+").partition("=")[0] for word in words}
    small = [each for each in job if each.partition("=")[0] not in own]
    if any(name.startswith(("model", "mixer")) for name in own):
        small = [each for each in small if not each.startswith("model.blocks.")]
    return [words[0], *small, *words[1:]]


class HungError(Exception):
    """A case that has not ended."""


def verdict(arguments: list[str], limit: float = LIMIT_S) -> str | None:
    """What is wrong with the answer to a command line; None where it is an answer."""

    def late(number: int, frame: Any) -> None:
        raise HungError

    out, err = io.StringIO(), io.StringIO()
    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, limit), signal.SIGALRM: (signal.ITIMER_REAL, 6 * limit)}
    before = {number: signal.signal(number, late) for number in clocks}
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(arguments)
    except HungError:
        return f"no answer within {limit:g} s:\n" + traceback.format_exc(limit=-6)
    except BaseException:
        return traceback.format_exc(limit=-8)
    finally:
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    said = err.getvalue()
    if code == 2 and (said.count("\n") != 1 or len(said) > 2000):
        return f"exit 2 with {said.count(chr(10))} lines of {len(said)} letters: {said[:300]}"
    return None if code in (0, 2) else f"exit {code}: {said[:500]}"


def run(first: int, count: int) -> int:
    """Runs the cases, and prints those that are wrong. Returns how many."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "here").mkdir()
        os.environ |= {
            "HOME": name,
            "XDG_CACHE_HOME": str(place / "cache"),
            "WANDB_MODE": "offline",
            "FARSPAN_TRACEBACK": "1",
        }
        os.chdir(place / "here")
        began = time.monotonic()
        for number in range(first, first + count):
            arguments = case(number, place)
            if said := verdict(arguments):
                wrong += 1
                shown = [each for each in arguments if each not in overrides(place)]
                print(f"--- {number}: {shown!r}"[:600] + f"\n{said}", flush=True)
        print(f"{count} cases, {wrong} wrong, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    asked = parser.parse_args()
    sys.exit(1 if run(asked.first, asked.count) else 0)
