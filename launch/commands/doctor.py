"""`farspan doctor`: what this machine has, and whether it works here."""

import os
import sys
from pathlib import Path

from launch.commands.arguments import places
from launch.doctor.doctor import facts


def doctor(arguments: list[str]) -> int:
    """Prints the facts. Returns 0 when the default job can run here, and a Ray answers at an address that is given."""
    given = places(arguments)
    address = given.get("cluster.address")
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    healthy = answers = True
    for fact in facts(Path(given.get("run.dir", "runs/NAME")), address):
        if isinstance(fact, str):
            print(f"\n{fact}", flush=True)
            continue
        healthy = healthy and (fact.sign == "ok" or not fact.needed)
        answers = answers and (fact.sign == "ok" or fact.name != "cluster.address")
        code = {"ok": 32, "missing": 33, "broken": 31}[fact.sign]
        sign = f"\033[{code}m{fact.sign:<9}\033[0m" if colours else f"{fact.sign:<9}"
        print(f"{sign}{fact.name:<19}{fact.value}", flush=True)
    print(f"\nThe default job can{'' if healthy else 'not'} run here{'' if answers else f'; none can at {address}'}.")
    return 0 if healthy and answers else 1
