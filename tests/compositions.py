"""Ways of dividing a run, composed with each other: every pair of them and some triples, each against one process.

`make compositions` (`python -m tests.compositions [word …]`) runs all, or those whose name has a word. A composition is
a command line of `farspan verify`: the product's own checks refuse it or shrink it, ranks of a gloo world and one
process run the small one, and every tensor of three steps is compared in fp64. Unlike there, a tensor may differ by
1e-10 of its norm, whatever rounding explains. With `--write` the results go to docs/compositions.json, and from there
into the tables of docs/compositions.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations, groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from launch.commands.verify import checked, configured
from launch.errors import UserError
from launch.verify.shrink import Shrunk
from tests.parallel.parity_table import DOCS, commit
from tests.world import run_world
from train.verify import alone, world
from train.verify.trace import Place, Trace, compare

TOLERANCE = 1e-10  # of a tensor's norm
STEPS = 3
LIMIT_S = 300  # for a composition
TOGETHER = 12  # compositions that a world runs, one after another: to start it costs as much as two
SIZES = ("replicate", "data", "pipeline", "expert", "sequence", "tensor")


class Way(NamedTuple):
    """A way of dividing a run. kind: ways of one kind exclude each other. sizes: of the mesh. rest: other overrides."""

    kind: str
    sizes: Mapping[str, int] = {}
    rest: tuple[str, ...] = ()


def _sequence(ranks: int, recurrence: str, attention: str) -> Way:
    rest = (f"parallel.transport.recurrence={recurrence}", f"parallel.transport.attention={attention}")
    return Way("SP", {"sequence": ranks}, rest)


def _pipeline(name: str, each: int = 1) -> Way:
    rest = (f"parallel.pipeline_schedule={name}", f"parallel.stages_per_rank={each}")
    return Way("PP", {"pipeline": 2}, (*rest, f"parallel.pipeline_layers={[4 // (2 * each)] * 2 * each}"))


PADDED = ("parallel.transport.experts=padded", "model.blocks.gla.ffn.capacity_factor=1.5")
WAYS: dict[str, Way] = {
    "FSDP": Way("FSDP", {"data": 2}),
    "HSDP": Way("HSDP", {"replicate": 2}),
    "TP": Way("TP", {"tensor": 2}),
    "PP 1f1b": _pipeline("1f1b"),
    "PP interleaved": _pipeline("interleaved", 2),
    "PP zero bubble": _pipeline("zero_bubble"),
    "EP": Way("EP", {"expert": 2}),
    "EP padded": Way("EP", {"expert": 2}, PADDED),
    "SP gather": _sequence(2, "gather", "gather"),
    "SP relay, ring": _sequence(2, "relay", "ring"),
    "SP allscan, ulysses": _sequence(2, "allscan", "ulysses"),
    "SP usp": _sequence(4, "gather", "usp"),
    "recompute full": Way("recomputation", rest=("engine.recompute=full",)),
    "recompute selective": Way("recomputation", rest=("engine.recompute=selective",)),
    "accumulation": Way("accumulation", rest=("scheduler.tokens_per_rank=4096",)),
    "chunked loss": Way("chunked loss", rest=("train.loss_chunk=2048",)),
    "spans in time": Way("spans in time", rest=("train.span_tokens=512",)),
}
Composition = tuple[str, ...]  # names of ways
TRIPLES: tuple[Composition, ...] = (
    ("FSDP", "EP", "SP gather"),
    ("FSDP", "EP padded", "SP relay, ring"),
    ("FSDP", "TP", "SP gather"),
    ("FSDP", "TP", "SP allscan, ulysses"),
    ("FSDP", "PP 1f1b", "SP gather"),
    ("FSDP", "PP zero bubble", "SP relay, ring"),
    ("FSDP", "PP interleaved", "EP"),
    ("FSDP", "TP", "EP"),
    ("FSDP", "accumulation", "chunked loss"),
    ("HSDP", "recompute full", "accumulation"),
    ("HSDP", "recompute selective", "accumulation"),
    ("HSDP", "TP", "accumulation"),
    ("HSDP", "EP", "SP relay, ring"),
    ("HSDP", "PP 1f1b", "recompute full"),
    ("TP", "PP 1f1b", "SP gather"),
    ("TP", "PP zero bubble", "EP"),
    ("TP", "EP", "SP gather"),
    ("TP", "EP", "accumulation"),
    ("TP", "SP relay, ring", "chunked loss"),
    ("TP", "recompute full", "spans in time"),
    ("PP 1f1b", "EP", "SP gather"),
    ("PP zero bubble", "EP", "recompute full"),
    ("PP interleaved", "recompute selective", "chunked loss"),
    ("EP", "SP gather", "spans in time"),
    ("EP padded", "recompute full", "accumulation"),
    ("SP allscan, ulysses", "accumulation", "spans in time"),
)


def pairs() -> list[Composition]:
    """Every pair of ways that do not exclude each other."""
    return [pair for pair in combinations(WAYS, 2) if WAYS[pair[0]].kind != WAYS[pair[1]].kind]


def compositions() -> list[Composition]:
    """All that the command runs, in the order of the tables."""
    return [*pairs(), *TRIPLES]


def named(composition: Composition) -> str:
    return " × ".join(composition)


def sizes(composition: Composition) -> dict[str, int]:
    """The mesh: what the ways ask for. Replicas are copies of shards, and options alone are those of some run: where
    nothing else shards the weights, two ranks of FSDP do."""
    mesh = dict.fromkeys(SIZES, 1)
    for way in composition:
        mesh |= WAYS[way].sizes
    if prod(mesh.values()) == mesh["replicate"]:
        mesh["data"] = 2
    elif mesh["replicate"] > 1 and mesh["data"] * mesh["expert"] * mesh["sequence"] == 1:
        mesh["data"] = 2
    return mesh


def overrides(composition: Composition) -> list[str]:
    """The command line behind `farspan verify`."""
    mesh = sizes(composition)
    words = [f"cluster.workers={prod(mesh.values())}", *(f"parallel.{name}={size}" for name, size in mesh.items())]
    words.append("train.loss_chunk=null")
    if "SP usp" in composition:  # two heads a tensor rank, so that four ranks are two rows of two
        words.append(f"model.blocks.attn.mixer.heads={2 * mesh['tensor']}")
    return words + [override for way in composition for override in WAYS[way].rest]


class Result(NamedTuple):
    """state: passed, refused or failed. worst: the largest error of a tensor, relative to its norm. said: the tensor
    with that error, the product's line of refusal, or why it does not run."""

    state: str
    said: str
    worst: float | None = None
    commit: str = ""

    @property
    def shown(self) -> str:
        return f"{self.state:<8}" if self.worst is None else f"{self.state:<8}{self.worst:.0e}"


def prepared(composition: Composition) -> Shrunk:
    """The small run. Raises UserError with one line where the product refuses this composition."""
    shrunk = checked(configured(overrides(composition)))
    config = shrunk.config
    if config.parallel.pipeline == 1:
        return shrunk
    stages, layers = config.parallel.stages, config.model["layers"]  # each rank would take seconds to weigh them
    given = [layers * (s + 1) // stages - layers * s // stages for s in range(stages)]
    parallel: dict[str, Any] = {"pipeline_layers": given}
    return replace(shrunk, config=replace(config, parallel=replace(config.parallel, **parallel)))


_REFERENCES: dict[str, Trace] = {}


def reference(shrunk: Shrunk, steps: int) -> Trace:
    """The trace of one process, each document by itself. Compositions with one model and one batch share it."""
    config = shrunk.config
    key = json.dumps([dict(config.model.values), dict(config.data.values), steps], sort_keys=True)
    if key not in _REFERENCES:
        _REFERENCES[key] = alone.trace(config, steps)
    return _REFERENCES[key]


def limits(want: Trace) -> dict[Place, float]:
    """The bound of each tensor. One that is zero in theory is held to all of its kind in its layer."""
    norms = {place: float(x.norm()) for place, x in want.items()}
    layers: dict[tuple[int, str, str | None], float] = {}
    for place, norm in norms.items():
        key = (place.step, place.kind, place.layer)
        layers[key] = (layers.get(key, 0.0) ** 2 + norm**2) ** 0.5
    bounds = {}
    for place, norm in norms.items():
        layer = layers[place.step, place.kind, place.layer]
        bounds[place] = TOLERANCE * (norm if norm > 1e-6 * layer else layer)
    return bounds


def traced(orders: list[dict[str, Any]]) -> None:
    """Runs the compositions of a world, on this rank; each leaves its trace in a folder of its own."""
    for order in orders:
        world.run(order)
        _mark(Path(order["run_dir"]), dist.get_rank()).touch()


def _mark(folder: Path, rank: int) -> Path:
    """The file that says that a rank's trace is whole."""
    return folder / f"done-{rank}"


def judged(shrunk: Shrunk, folder: Path, steps: int) -> Result:
    """The result of a composition that has run."""
    workers, want = shrunk.config.cluster.workers, reference(shrunk, steps)
    ranks = [torch.load(world.file_of(folder, rank), weights_only=False) for rank in range(workers)]
    try:
        verdict = compare(want, limits(want), ranks)
    except ValueError as error:
        return Result("failed", str(error))
    worst = verdict.first or verdict.worst
    return Result("passed" if verdict.first is None else "failed", str(worst.place), worst.excess * TOLERANCE)


def run(chosen: Mapping[Composition, Shrunk], steps: int = STEPS) -> Iterator[tuple[Composition, Result]]:
    """The results of compositions of as many processes each, in one world; in another one behind one that stops it."""
    waiting = dict(chosen)
    (workers,) = {shrunk.config.cluster.workers for shrunk in chosen.values()}
    while waiting:
        with tempfile.TemporaryDirectory(prefix="compositions-") as place, ThreadPoolExecutor(1) as pool:
            folders = {name: Path(place) / str(i) for i, name in enumerate(waiting)}
            orders = []
            for name, folder in folders.items():
                folder.mkdir()
                config = waiting[name].config
                orders.append({"config": config, "run_dir": str(folder), "device": "cpu", "steps": steps})
            running = pool.submit(run_world, workers, traced, orders, timeout=LIMIT_S * (1 + len(orders)))
            for name, folder in folders.items():
                marks = [_mark(folder, rank) for rank in range(workers)]
                while not (ended := all(mark.exists() for mark in marks)) and not running.done():
                    time.sleep(0.05)
                if not ended and not all(mark.exists() for mark in marks):
                    stopped = str(running.exception() or "no rank has left a trace")
                    yield name, Result("failed", stopped.strip().splitlines()[-1])
                    del waiting[name]
                    break
                yield name, judged(waiting.pop(name), folder, steps)


def results(chosen: Iterable[Composition]) -> Iterator[tuple[Composition, Result]]:
    """The result of each composition, those of few processes first."""

    def ranks(composition: Composition) -> int:
        return prod(sizes(composition).values())

    for _, same in groupby(sorted(chosen, key=ranks), key=ranks):
        several = list(same)
        for at in range(0, len(several), TOGETHER):
            runs: dict[Composition, Shrunk] = {}
            for composition in several[at : at + TOGETHER]:
                try:
                    runs[composition] = prepared(composition)
                except UserError as error:
                    yield composition, Result("refused", str(error))
            if runs:
                yield from run(runs)


# --- the page ---

RECORD, PAGE = DOCS / "compositions.json", DOCS / "compositions.md"
BEGIN, END = "<!-- begin: written by make compositions -->", "<!-- end -->"


def recorded() -> dict[Composition, Result]:
    """Reads the measured results, in the order of the tables."""
    rows = {tuple(names): Result(**rest) for names, rest in json.loads(RECORD.read_text())} if RECORD.exists() else {}
    return {composition: rows[composition] for composition in compositions() if composition in rows}


def record(fresh: Mapping[Composition, Result]) -> None:
    """Puts these results in the place of what was measured before, and writes the page."""
    every = recorded() | dict(fresh)
    lines = [json.dumps([list(name), every[name]._asdict()]) for name in compositions() if name in every]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(every)}\n{END}{rest.partition(END)[2]}")


def tables(every: Mapping[Composition, Result]) -> str:
    """The tables of docs/compositions.md."""
    refusals = sorted({result.said for result in every.values() if result.state == "refused"})

    def cell(composition: Composition) -> str:
        result = every.get(composition)
        if result is None:
            return ""
        if result.state == "refused":
            return f"refused ({refusals.index(result.said) + 1})"
        mark = "✓" if result.state == "passed" else "✗"
        return mark if result.worst is None else f"{mark} {result.worst:.0e}"

    count = {state: sum(r.state == state for r in every.values()) for state in ("passed", "refused", "failed")}
    worst = max((r.worst for r in every.values() if r.worst is not None), default=0.0)
    names, possible = list(WAYS), set(pairs())
    lines = [f"{', '.join(f'{n} {state}' for state, n in count.items())}; the worst figure is {worst:.0e}."]
    lines += ["", f"| | {' | '.join(names[1:])} |", "|---" * len(names) + "|"]
    for i, row in enumerate(names[:-1]):
        cells = ["" for _ in names[1 : i + 1]]
        cells += [cell((row, name)) if (row, name) in possible else "–" for name in names[i + 1 :]]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", "| triple | processes | |", "|---|---|---|"]
    lines += [f"| {named(triple)} | {prod(sizes(triple).values())} | {cell(triple)} |" for triple in TRIPLES]
    lines += ["", *(f"{i}. `{line}`" for i, line in enumerate(refusals, 1))]
    failed = [f"- {named(name)}: {r.said}" for name, r in every.items() if r.state == "failed"]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])])


def main(arguments: Sequence[str]) -> int:
    """Runs compositions and prints a line for each. Returns 1 where one is neither passed nor refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.compositions")
    parser.add_argument("words", nargs="*", help="of the names of those to run")
    parser.add_argument("--write", action="store_true", help="writes docs/compositions.json and .md after each")
    parser.add_argument("--missing", action="store_true", help="runs those alone that docs/compositions.json lacks")
    options = parser.parse_args(arguments)
    known = recorded() if options.missing else {}
    chosen = [c for c in compositions() if c not in known and any(word in named(c) for word in options.words or [""])]
    at, began, states = commit(), time.monotonic(), list[str]()
    for composition, result in results(chosen):
        states.append(result.state)
        after = f"({len(states)} of {len(chosen)}, {time.monotonic() - began:.0f} s)"
        print(f"{result.shown}  {named(composition)}: {result.said} {after}", flush=True)
        if options.write:
            record({composition: result._replace(commit=at)})
    print(", ".join(f"{states.count(state)} {state}" for state in ("passed", "refused", "failed")))
    return int("failed" in states)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
