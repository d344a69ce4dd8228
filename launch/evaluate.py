"""`farspan evaluate RUN`: what a trained model knows, and how far back it can reach."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from launch import local, origin, preflight, rundir
from launch.evaluated import draw, table
from launch.generate import checkpoint_of, has_average
from launch.stopping import stop_file
from launch.user import UserError

ENTRY = "train.evaluation.run:run"
OURS = ("cluster", "parallel", "evaluate")  # sections that an evaluation has from the command line, not from the run


def evaluate(arguments: list[str]) -> int:
    """Measures, prints a table, and leaves results.json and pictures in the run. Raises UserError."""
    if not arguments or "=" in arguments[0] and not Path(arguments[0]).exists():
        raise UserError("RUN: missing; expected a run folder (farspan evaluate RUN evaluate.parts=[loss])")
    run, overrides = arguments[0], arguments[1:]
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    found = checkpoint_of(run)
    config = configured(found, overrides)
    device = clear(config, found, run, lambda line: console.print(line, markup=False))
    folder = folder_of(found, config["evaluate"]["weights"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"RUN={run}: results cannot be written to {folder} ({error.strerror})") from None
    workers = config["cluster"]["workers"]
    console.print(f"evaluating {found} on {workers} {'worker' if workers == 1 else 'workers'} ({device})", markup=False)
    if code := measured(config, found, folder, device, console):
        return code
    results = json.loads((folder / "results.json").read_text())
    asked = [*config["evaluate"]["parts"], *(["tasks"] if config["evaluate"]["tasks"] else [])]
    print("\n".join(table(results, asked)))
    pictures = draw(folder, results)
    console.print(f"in {folder}: results.json, {', '.join(pictures)}" if pictures else f"in {folder}: results.json")
    return 0


def measured(config: dict[str, Any], found: Path, folder: Path, device: str, console: Console) -> int:
    """Writes what `evaluate.parts` ask of a checkpoint to results.json in a folder. Returns the exit code; raises
    UserError where the workers refuse it, KeyboardInterrupt where it is stopped."""
    workers = config["cluster"]["workers"]
    with tempfile.TemporaryDirectory(prefix="farspan-evaluate-") as place, Shown(Path(place), console) as shown:
        order = {
            "config": config,
            "checkpoint": str(found.resolve()),
            "results": str((folder / "results.json").resolve()),
            "progress": str(shown.path),
            "device": device,
            "trained": trained_on(found),
        }
        outcome = local.spawn(
            ENTRY,
            order,
            workers=workers,
            run_dir=Path(place),
            device=device,
            threads=config["cluster"]["threads"] or max(1, preflight.cores() // workers),
            tick=shown.tick,
            say=lambda line: None,
        )
        trace = Path(place, "error.txt")
        if trace.exists() and outcome.exit_code == 1:
            (folder / "error.txt").write_text(trace.read_text())
    if outcome.ok:
        return 0
    if outcome.exit_code == 2:
        raise UserError(str(outcome.reason))
    console.print(f"failed: {str(outcome.reason).replace(place, str(folder))}", markup=False)
    return outcome.exit_code


def trained_on(found: Path) -> int | None:
    """Tokens of the longest sequences that a checkpoint, or a folder of Hugging Face's, was trained on; None where it
    does not say."""
    from train import checkpoint, published
    from train.exchange import trained_length

    if published.is_folder(found):
        return published.Published(found).max_length
    home = found if (found / "config.yaml").exists() else found.parent.parent
    facts = checkpoint.manifest(found)
    return trained_length(rundir.saved_config(home), facts.get("places", facts["tokens"]))


def configured(found: Path, overrides: list[str]) -> dict[str, Any]:
    """The run's configuration with the overrides on top; where and how it is evaluated, from these alone."""
    asked = preflight.composed(overrides)
    for key in ("resume", "init_from"):
        if asked[key] is not None:
            raise UserError(f"{key}={asked[key]}: not of an evaluation; RUN says which weights")
    config = origin.own_tokens(rundir.saved_config(found), found)
    if "train" not in config:  # an import: a model, and nothing that it was trained on
        config = {**asked, "model": config["model"]}
    preflight.overlay(config, asked, overrides)
    config |= {key: asked[key] for key in OURS} | {"resume": None, "init_from": None}
    if isinstance(config["train"]["batch_tokens"], list):  # a batch that grows: nothing here depends on its size
        config["train"]["batch_tokens"] = config["train"]["batch_tokens"][-1][1]
    return preflight.checked(config)


def clear(config: dict[str, Any], found: Path, run: str, say: Any) -> str:
    """Checks everything that can be checked before a process starts, and returns the device. Raises UserError."""
    from data.tokenizer import Bytes, Json
    from launch import prepare
    from train import checkpoint
    from train.evaluation.harness import MISSING
    from train.evaluation.run import check
    from train.settings import ClusterSettings, EvaluateSettings, ParallelSettings, section

    with preflight.refusals(config):
        cluster = section(ClusterSettings, config["cluster"])
        if cluster.kind == "ray":
            raise ValueError("cluster=ray: must be none or local: an evaluation runs on this machine")
        settings = section(EvaluateSettings, config["evaluate"])
        if settings.tasks and importlib.util.find_spec("lm_eval") is None:
            raise ValueError(f"evaluate.tasks=[{','.join(settings.tasks)}]: {MISSING}")
        if settings.weights == "average" and not has_average(found):
            raise ValueError(
                f"evaluate.weights=average: must be raw, {found} holds no averaged weights (train.average)"
            )
        transport = config["parallel"]["transport"]
        if transport["recurrence"] == "auto":  # measured for steps of training
            transport["recurrence"] = "gather"
        section(ParallelSettings, config["parallel"]).sizes(cluster.workers)
        model = preflight.model_of(config["model"])
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if (difference := checkpoint.first_difference(found, shapes)) is not None:
            raise ValueError(f"RUN={run}: holds another model: {difference}")
        batches = prepare.batches(config, config["train"]["batch_tokens"], shapes["embedding"][0], say)
        saved = _tokenizer(found)
        if saved is not None and (given := batches.tokenizer.card()) != saved:
            raise ValueError(
                f"data.tokenizer={given['name']}: must be the one that the run was trained with, "
                f"{saved['name']}: {found / 'tokenizer.json'}"
            )
        if settings.tasks and not isinstance(batches.tokenizer, Bytes | Json):
            raise ValueError(
                f"evaluate.tasks=[{','.join(settings.tasks)}]: must be []: this run's tokens spell no text"
            )
        check(settings, batches, model)
        return preflight.device_of(cluster)


def _tokenizer(found: Path) -> dict[str, Any] | None:
    """The card of the tokenizer that a model was trained with; None where there is none beside it."""
    from data import reading
    from data.tokenizer_files import card_of
    from train import published

    if published.is_folder(found):
        return card_of(found)
    file = found / "tokenizer.json"
    return reading.json_object(file) if file.exists() else None


def folder_of(found: Path, weights: str = "raw") -> Path:
    """Where results go: RUN/evaluation/step-N, or beside a checkpoint that has no run; those of averaged weights into a
    folder of their own."""
    run, suffix = found.parent.parent, "" if weights == "raw" else f"-{weights}"
    if found.parent.name == "checkpoints" and (run / "config.yaml").exists():
        return run / "evaluation" / f"{found.name}{suffix}"
    return found.with_name(f"{found.resolve().name}-evaluation{suffix}")


class Shown:
    """How far an evaluation is, part by part: a bar in a terminal, else a line as each part begins."""

    def __init__(self, place: Path, console: Console):
        self.path, self.stop, self.console = place / "progress.jsonl", stop_file(place), console
        self._read, self._part = 0, ""
        columns = BarColumn(40), TextColumn("{task.description}", markup=False), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True) if console.is_interactive else None
        self._task = self._bar.add_task("starting", total=None) if self._bar else None

    def __enter__(self) -> "Shown":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def tick(self) -> None:
        """Shows what is new. Raises KeyboardInterrupt where a stop is asked for: there is nothing to save."""
        if self.stop.exists():
            raise KeyboardInterrupt
        if not self.path.exists():
            return
        with self.path.open() as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind("\n") + 1]
        self._read += len(whole.encode())
        for line in whole.splitlines():
            told = json.loads(line)
            if self._bar and self._task is not None:
                part = told["part"].replace("_", " ")
                self._bar.update(self._task, total=told["of"], completed=told["done"], description=part)
            elif told["part"] != self._part:
                self.console.print(told["part"].replace("_", " "), markup=False)
            self._part = told["part"]
