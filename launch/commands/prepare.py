"""`farspan prepare`: a corpus made into a token store, once and ahead of the runs that read it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from launch.cluster import nodes, package
from launch.errors import UserError
from launch.preflight.configure import configure
from launch.preflight.corpus import keep_out, stores, volume
from launch.preflight.refusals import refusals
from train.run_config import RunConfig

if TYPE_CHECKING:
    from data.corpora.files import CorpusPart
    from data.stores.parts import Runner, TokenizeJob
    from data.stores.prepare import PrepareProgress, Watch

_AHEAD = 2  # parts under way for each core of a cluster
_SHOWN_PARTS = 100  # of a preparation whose progress goes to no terminal, a line about every so many-th


def prepare(overrides: list[str]) -> int:
    """Makes the store that the overrides describe, or goes on with it, and prints its card. Raises UserError."""
    from data.stores.checks import verify
    from data.stores.store import Store

    config = configure(overrides)
    keep_out(config.data.values)
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    with refusals(config):
        data = config.data.build()
        if not hasattr(data, "prepare"):
            raise ValueError("data: a generated task has no corpus to prepare; data=text has one")
        data.check()
        try:
            with _runner(config) as runner, watching(console) as watch:
                store = data.prepare(runner, watch)
        except KeyboardInterrupt:
            console.print("interrupted: the same command goes on from here", markup=False)
            return 1
        made = [(folder, corpus.left_out(folder)) for _, corpus, folder in stores(data, store)]
        for folder, _ in made:
            verify(Store(folder))
    print("\n\n".join("\n".join(lines(folder, left)) for folder, left in made))
    return 0


def lines(folder: Path, left: dict[str, int]) -> list[str]:
    """The card of a store, for a person, with what is not in it, by reason."""
    from data.corpora.files import counted

    card = json.loads((folder / "card.json").read_text())
    percentiles = " ".join(f"{p}%: {length:,}" for p, length in card["length_percentiles"].items())
    return [
        f"store       {folder}",
        f"documents   {card['documents']:,} from {card['sources']:,} sources, {card['duplicates']:,} of them copies",
        *([f"left out    {counted(left)}"] if left else []),
        f"tokens      {card['tokens']:,} of {card['vocabulary']:,} ({card['tokenizer']}), from {card['bytes']:,} bytes",
        f"lengths     {percentiles}",
    ]


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Shows how far a preparation is: a bar in a terminal, else a line now and then."""
    if not console.is_interactive:
        yield lambda progress: _say(console, progress)
        return
    columns = BarColumn(None), TextColumn("{task.description}", markup=False), TimeRemainingColumn()
    with Bar(*columns, console=console, expand=True) as bar:
        task = bar.add_task("reading", total=None)

        def watch(progress: PrepareProgress) -> None:
            total, done = (progress.total, progress.done) if progress.total else (progress.of, progress.parts)
            bar.update(task, total=total, completed=done, description=volume(progress))

        yield watch


def _say(console: Console, progress: PrepareProgress) -> None:
    step = max(progress.of // _SHOWN_PARTS, 1)
    if progress.parts % step == 0 or progress.parts == progress.of:
        console.print(f"part {progress.parts:,} of {progress.of:,}: {volume(progress)}", markup=False)


@contextmanager
def _runner(config: RunConfig) -> Iterator[Runner | None]:
    """Who tokenises: processes of this machine, None; with cluster=ray, the cores of the cluster that it joins."""
    if config.cluster.kind != "ray":
        yield None
        return
    address = nodes.address_of(config.cluster.address)
    if nodes.is_remote(address):
        raise ValueError(
            f"cluster.address={address}: must be auto, on one of the cluster's machines, to prepare a corpus there"
        )
    import ray

    with tempfile.TemporaryDirectory(prefix="farspan-code-") as place:
        code = str(package.stage(Path(place)))
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"working_dir": code, "env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
            )
        except ConnectionError as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"cluster.address={address}: no Ray to join from this machine ({line[:200]})") from None
        try:
            yield RayTasks(_AHEAD * int(ray.cluster_resources().get("CPU", 1)))
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class RayTasks:
    """A runner over a Ray that has been joined: a task a part, each on one core, retried where a machine is lost.

    The store's folder and the corpus lie where all machines see them. ahead: how many parts are under way.
    """

    ahead: int

    def __call__(self, job: TokenizeJob, parts: Iterable[tuple[int, CorpusPart]]) -> Iterator[int]:
        import ray
        from ray.exceptions import RayTaskError

        from data.stores.parts import in_order

        shared = ray.put(job)
        make = ray.remote(num_cpus=1)(_make)

        def submit(number: int, part: CorpusPart) -> Any:
            made = make.remote(shared, number, part)
            return lambda: ray.get(made)

        try:
            yield from in_order(submit, parts, self.ahead)
        except RayTaskError as error:
            raise error.cause from None


def _make(job: TokenizeJob, number: int, part: CorpusPart) -> int:
    return job(number, part)
