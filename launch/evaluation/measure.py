"""`farspan evaluate RUN`: what a trained model knows, and how far back it can reach."""

import importlib.util
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from launch.config.compose import checked, composed
from launch.config.model import model_of
from launch.errors import UserError
from launch.preflight import init_from
from launch.preflight.check import device_of
from launch.preflight.checked import cores
from launch.preflight.configure import overlay
from launch.preflight.corpus import open_batches
from launch.preflight.layout import check_layout
from launch.preflight.refusals import refusals
from launch.run import rundir
from launch.run.checkpoints import has_average
from launch.run.signals import stop_file
from launch.world import spawn
from train.run_config import RunConfig

ENTRY = "train.evaluation.run:run"
OURS = ("cluster", "parallel", "evaluate")  # sections that an evaluation has from the command line, not from the run


def measured(config: RunConfig, results: Path, folder: Path, device: str, console: Console) -> int:
    """Writes what `evaluate.parts` ask of a checkpoint to results.json in a folder. Returns the exit code; raises
    UserError where the workers refuse it, KeyboardInterrupt where it is stopped."""
    workers = config.cluster.workers
    with (
        tempfile.TemporaryDirectory(prefix="farspan-evaluate-") as place,
        EvaluationProgress(Path(place), console) as shown,
    ):
        order = {
            "config": config,
            "checkpoint": str(results.resolve()),
            "results": str((folder / "results.json").resolve()),
            "progress": str(shown.path),
            "device": device,
            "trained": trained_on(results),
        }
        outcome = spawn.spawn(
            ENTRY,
            order,
            workers=workers,
            run_dir=Path(place),
            device=device,
            threads=config.cluster.threads or max(1, cores() // workers),
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


def trained_on(saved: Path) -> int | None:
    """Tokens of the longest sequences that a checkpoint, or a folder of Hugging Face's, was trained on; None where it
    does not say."""
    from train.checkpoints import checkpoint, hf_reader
    from train.checkpoints.hf_convert import trained_length

    if hf_reader.is_folder(saved):
        return hf_reader.Published(saved).max_length
    home = saved if (saved / "config.yaml").exists() else saved.parent.parent
    facts = checkpoint.manifest(saved)
    return trained_length(rundir.saved_config(home), facts.get("places", facts["tokens"]))


def configured(saved_run: Path, overrides: list[str]) -> RunConfig:
    """The run's configuration with the overrides on top; where and how it is evaluated, from these alone."""
    settings = composed(overrides).to_dict()
    for key in ("resume", "init_from"):
        if settings[key] is not None:
            raise UserError(f"{key}={settings[key]}: not of an evaluation; RUN says which weights")
    saved = init_from.own_tokens(rundir.saved_config(saved_run), saved_run)
    if "train" not in saved:  # an import: a model, and nothing that it was trained on
        saved = {**settings, "model": saved["model"]}
    overlay(saved, settings, overrides)
    saved |= {key: settings[key] for key in OURS} | {"resume": None, "init_from": None}
    if isinstance(saved["train"]["batch_tokens"], list):  # a batch that grows: nothing here depends on its size
        saved["train"]["batch_tokens"] = saved["train"]["batch_tokens"][-1][1]
    return checked(saved)


def check_evaluation(config: RunConfig, saved_run: Path, run: str, say: Any) -> tuple[RunConfig, str]:
    """Checks everything that can be checked before a process starts. Raises UserError.

    Returns the configuration, with the transport that an evaluation has, and the device.
    """
    from data.tokenizer import Bytes, Json
    from train.checkpoints import checkpoint
    from train.evaluation.harness import MISSING
    from train.evaluation.run import check

    with refusals(config):
        cluster, settings = config.cluster, config.evaluate
        if cluster.kind == "ray":
            raise ValueError("cluster=ray: must be none or local: an evaluation runs on this machine")
        if settings.tasks and importlib.util.find_spec("lm_eval") is None:
            raise ValueError(f"evaluate.tasks=[{','.join(settings.tasks)}]: {MISSING}")
        if settings.weights == "average" and not has_average(saved_run):
            raise ValueError(
                f"evaluate.weights=average: must be raw, {saved_run} holds no averaged weights (train.average)"
            )
        config = replace(config, parallel=config.parallel.without_pipeline())
        if config.parallel.transport.recurrence == "auto":  # measured for steps of training
            transport = replace(config.parallel.transport, recurrence="gather")
            config = replace(config, parallel=replace(config.parallel, transport=transport))
        mesh = config.parallel.mesh(cluster.workers)
        model = model_of(config.model.values)
        check_layout(config, mesh, model)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if (difference := checkpoint.first_difference(saved_run, shapes)) is not None:
            raise ValueError(f"RUN={run}: holds another model: {difference}")
        batches = open_batches(config, shapes["embedding"][0], say)
        saved = _tokenizer(saved_run)
        if saved is not None and (given := batches.tokenizer.card()) != saved:
            raise ValueError(
                f"data.tokenizer={given['name']}: must be the one that the run was trained with, "
                f"{saved['name']}: {saved_run / 'tokenizer.json'}"
            )
        if settings.tasks and not isinstance(batches.tokenizer, Bytes | Json):
            raise ValueError(
                f"evaluate.tasks=[{','.join(settings.tasks)}]: must be []: this run's tokens spell no text"
            )
        check(settings, batches, model)
        return config, device_of(cluster)


def _tokenizer(saved: Path) -> dict[str, Any] | None:
    """The card of the tokenizer that a model was trained with; None where there is none beside it."""
    from data import reading
    from data.hf_tokenizer import card_of
    from train.checkpoints import hf_reader

    if hf_reader.is_folder(saved):
        return card_of(saved)
    file = saved / "tokenizer.json"
    return reading.json_object(file) if file.exists() else None


def folder_of(saved: Path, weights: str = "raw") -> Path:
    """Returns where results go: RUN/evaluation/step-N, or beside a checkpoint that has no run; those of averaged
    weights into a
    folder of their own."""
    run, suffix = saved.parent.parent, "" if weights == "raw" else f"-{weights}"
    if saved.parent.name == "checkpoints" and (run / "config.yaml").exists():
        return run / "evaluation" / f"{saved.name}{suffix}"
    return saved.with_name(f"{saved.resolve().name}-evaluation{suffix}")


class EvaluationProgress:
    """Shows how far an evaluation is, part by part: a bar in a terminal, else a line as each part begins."""

    def __init__(self, place: Path, console: Console):
        self.path, self.stop, self.console = place / "progress.jsonl", stop_file(place), console
        self._read, self._part = 0, ""
        columns = BarColumn(40), TextColumn("{task.description}", markup=False), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True) if console.is_interactive else None
        self._task = self._bar.add_task("starting", total=None) if self._bar else None

    def __enter__(self) -> "EvaluationProgress":
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
            progress = json.loads(line)
            if self._bar and self._task is not None:
                part = progress["part"].replace("_", " ")
                self._bar.update(self._task, total=progress["of"], completed=progress["done"], description=part)
            elif progress["part"] != self._part:
                self.console.print(progress["part"].replace("_", " "), markup=False)
            self._part = progress["part"]
