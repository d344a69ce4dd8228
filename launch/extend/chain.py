"""`farspan train` with stages: a run for each, one after another, measured before the first and after each of them.

The chain is a folder: its configuration, a run folder for each stage, `extension.json` and `extension.png`, and in the
end `export`, a folder that `transformers` loads. A stage that is done is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from launch import paths
from launch.config.compose import checked
from launch.config.model import model_of
from launch.errors import UserError
from launch.evaluation.measure import check_evaluation, folder_of, measured
from launch.extend import stages
from launch.extend.record import Record
from launch.extend.stages import Parent, StagePlan
from launch.paths import RUNS
from launch.preflight.configure import configure
from launch.run import rundir, status
from launch.run.export import written
from launch.run.signals import SignalLatch
from launch.runner.dispatch import run
from launch.runner.result import RunResult
from launch.shell import command, override, quote
from train.distill_settings import ConvertSettings
from train.run_config import ObjectConfig, RunConfig, Stage
from train.settings import RunSettings

CONVERTED = "converted"  # the folder, in a chain's, of the model between its parent and its first stage
SHORTEST = 128  # tokens of a needle's text, in bytes, for it and its question to have room


def is_chain(config: RunConfig) -> bool:
    """Says whether a configuration is that of a chain, or goes on with one. Raises UserError for stages of a single
    run."""
    resumed = config.resume is not None and bool(rundir.saved_config(Path(config.resume)).get("stages"))
    if config.resume is not None and bool(config.stages) != resumed:
        what = f"the stages of {config.resume}" if resumed else "[], it is a single run; init_from= extends one"
        raise UserError(f"stages: must be {what} with resume={config.resume}")
    return bool(config.stages)


def extend(config: RunConfig, overrides: list[str], console: Console) -> RunResult:
    """Runs a chain, or goes on with it. Raises UserError before anything is written."""

    def say(line: str) -> None:
        console.print(line, markup=False)

    folder: Path | None = None
    with SignalLatch() as latch:
        try:
            resumed = None if config.resume is None else Path(config.resume)
            if resumed is not None:
                before = rundir.saved_config(resumed)
                config = replace(config, init_from=before["init_from"])
                _same_stages(config.stages, before["stages"], resumed)
                _same_conversion(config, before.get("convert"), resumed)
                overrides = [each for each in overrides if not _is_own(each)]
            parent, legs = stages.legs(config, overrides)
            if parent.scores:  # measured once, whatever the next start would find
                config = replace(config, convert=parent.settings)
            _check_folder(config, legs)
            code = rundir.code_version()
            claimed, lock = rundir.claim(config.run, resumed=resumed is not None)
            folder = Path(str(claimed.dir))
            with lock:
                config = paths.with_absolute_paths(replace(config, run=claimed))
                rundir.write_config(folder, config, code)
                say(f"chain {folder}: {len(legs)} stages, all checked before the first starts")
                for line in stages.table(parent, legs):
                    say(line)
                ended = StagedRun(config, overrides, folder, parent, legs, console, latch).run()
        except KeyboardInterrupt:
            if folder is None:
                say("stopped before the chain started: nothing was written")
            ended = RunResult(0, folder, True)
    if folder is not None and (ended.code or ended.stopped):
        say(f"{command('train', override('resume', folder))} goes on with the stage that was reached")
    return ended


class StagedRun:
    """A chain that has been checked, in its folder."""

    def __init__(
        self,
        config: RunConfig,
        overrides: list[str],
        folder: Path,
        parent: Parent,
        legs: list[StagePlan],
        console: Console,
        latch: SignalLatch,
    ):
        self.config, self.overrides, self.folder, self.parent, self.legs = config, overrides, folder, parent, legs
        self.console, self.heard = console, latch
        self.record = Record(folder, parent.trained, [leg.stage.length for leg in legs])

    def run(self) -> RunResult:
        """The stages that are not done, and everything that is measured of them."""
        if code := self._measure("before", self.parent.path, self.parent.model, None):
            return RunResult(code, self.folder)
        source: Path = self.parent.path
        if self.parent.converted is not None:
            source = self._converted(self.parent.converted)
            if code := self._measure(CONVERTED, source, self.parent.converted, None):
                return RunResult(code, self.folder)
        for leg in self.legs:
            place, began = self.folder / leg.name, time.monotonic()
            if not _is_done(place):
                self.console.print(f"stage {leg.name}", style="bold", markup=False)
                ended = run(self._configured(leg, source), self.console, brief=True, again=self._again)
                if ended.code or ended.stopped:
                    return ended
                self.record.took(leg.name, time.monotonic() - began)
            source = _checkpoint(place)
            if self.heard():
                return RunResult(0, self.folder, True)
            if code := self._measure(leg.name, source, leg.config.model, leg):
                return RunResult(code, self.folder)
        self._end(source)
        return RunResult(0, self.folder)

    @property
    def _again(self) -> str:
        return command("train", override("resume", self.folder))

    def _configured(self, leg: StagePlan, source: Path) -> RunConfig:
        """The configuration of a stage's run: from its folder, where it has begun."""
        place = self.folder / leg.name
        if (place / "config.yaml").exists():
            return configure([*self.overrides, f"resume={quote(str(place))}"])
        name, tracking = str(self.config.run.name), leg.config.tracking
        if tracking.get("group", "") is None:
            tracking = tracking.having(group=name)
        own = RunSettings(name=f"{name}/{leg.name}", dir=str(place))
        config = replace(leg.config, init_from=str(source), resume=None, run=own, tracking=tracking)
        return checked(config.to_dict())

    def _converted(self, model: ObjectConfig) -> Path:
        """The checkpoint of the model whose layers have been converted and not trained yet."""
        from train.conversion import ConvertedWeights, part_of, write

        place = self.folder / CONVERTED
        if not place.exists():
            parent, after = self.parent, dict(model.values)
            before, part = dict(parent.model.values), part_of(self.config.convert)
            weights = ConvertedWeights(parent.path, before, after, list(parent.layers), self.config.seed, part)
            own = {"model": after, "data": {"max_length": parent.trained}, "code": rundir.code_version()}
            files = {"config.yaml": yaml.safe_dump(own, sort_keys=False)} | _tokenizer(parent.path)
            write(weights, place, files, lambda name: None)
        return _checkpoint(place)

    def _measure(self, name: str, saved: Path, model: ObjectConfig, leg: StagePlan | None) -> int:
        """Evaluates a checkpoint at the chain's lengths, unless that is done. Returns the exit code."""
        if name in self.record:
            return 0
        config = evaluation_of(self.legs, self.parent, model)
        config, device = check_evaluation(config, saved, str(saved), lambda line: None)
        folder = self.folder / "evaluation" / name if leg is None else folder_of(saved)
        folder.mkdir(parents=True, exist_ok=True)
        self.console.print(f"measuring {_called(name) if leg is None else f'stage {leg.name}'}", markup=False)
        if code := measured(config, saved, folder, device, self.console):
            return code
        self.record.add(name, folder / "results.json", leg)
        return 0

    def _end(self, source: Path) -> None:
        """The table, the picture and the export."""
        from launch.extend.plot import draw, table

        print("\n".join(table(self.record.facts)))
        files = ["extension.json"]
        try:
            draw(self.folder / "extension.png", self.record.facts)
            files.append("extension.png")
        except Exception as error:  # a picture is not worth the exit code of a week
            self.console.print(f"no picture: {type(error).__name__}: {error}", markup=False)
        if self._export(source):
            files.append("export")
        last = source.parent.parent
        self.console.print(f"in {self.folder}: {', '.join(files)}; the last stage is {last}", markup=False)

    def _export(self, source: Path) -> bool:
        """Writes the last stage for `transformers`; whether there is something."""

        dest = self.folder / "export"
        if dest.exists():
            return True
        try:
            for line in written(source, dest):
                self.console.print(line, markup=False)
        except (UserError, ValueError) as error:
            self.console.print(f"not exported: {error}", markup=False)
            return False
        return True


def evaluation_of(legs: list[StagePlan], parent: Parent, model: ObjectConfig) -> RunConfig:
    """An evaluation's request: documents as the last stage reads them, needles as long as each stage's sequences."""
    config, last = legs[-1].config, legs[-1].stage.length
    most = min([last, *_known(model)])
    length, lengths = config.evaluate.length, config.evaluate.lengths
    if lengths is None:
        trained = {parent.trained or last, *(leg.stage.length for leg in legs)}
        lengths = sorted(n for n in trained if SHORTEST <= n <= most) or None
    evaluate = replace(config.evaluate, length=most if length is None else length, lengths=lengths)
    return replace(config, model=model, evaluate=evaluate)


def _known(model: ObjectConfig) -> list[int]:
    """The positions that layers know, of rules that draw them at random."""
    from train.rope_base import rotary

    lengths = (getattr(module.positions, "longest", None) for module in rotary(model_of(model.values)))
    return [longest for longest in lengths if longest is not None]


def _check_folder(config: RunConfig, legs: list[StagePlan]) -> None:
    """Raises UserError where another run has the folder of a stage."""
    run = config.run
    folder = Path(run.dir) if run.dir else RUNS / run.name if run.name else None
    if folder is None or config.resume is not None:
        return
    for leg in legs:
        if (folder / leg.name / "config.yaml").exists():
            raise UserError(f"run.dir={folder}: already holds a run, {leg.name}")


def _same_stages(now: Sequence[Stage], before: list[Any], folder: Path) -> None:
    """Raises UserError where a stage that has begun would be another one."""
    for i, values in enumerate(before):
        name = rundir.stage_name(i + 1, values["length"])
        if (folder / name / "config.yaml").exists() and [asdict(stage) for stage in now[i : i + 1]] != [values]:
            raise UserError(f"stages[{i}]: must be as it was: {folder / name} has begun")


def _same_conversion(config: RunConfig, before: dict[str, Any] | None, folder: Path) -> None:
    """Raises UserError where layers have been converted, and not as the configuration says now."""
    if (folder / CONVERTED).exists() and asdict(config.convert) != asdict(ConvertSettings()) | (before or {}):
        override = config.convert.override or "convert.mixer=null"
        raise UserError(f"{override}: must be as it was, {before}: {folder / CONVERTED} is there")


def _is_own(override: str) -> bool:
    """Says whether an override is of the chain as a whole, and not of each of its runs."""
    key = override.lstrip("+~").partition("=")[0]
    return key in ("resume", "stages", "init_from") or key.startswith(("run.", "convert"))


def _tokenizer(parent: Path) -> dict[str, str]:
    """The file that says which tokens a model knows, by its name; {} where there is none."""
    from data.hf_tokenizer import card_of
    from train.checkpoints.hf_reader import is_folder

    file = parent / "tokenizer.json"
    if not file.exists():
        return {}
    return {file.name: json.dumps(card_of(parent)) if is_folder(parent) else file.read_text()}


def _called(name: str) -> str:
    return "the converted model" if name == CONVERTED else "what is extended"


def _is_done(place: Path) -> bool:
    return (place / "config.yaml").exists() and status.read(place, running=False).state == "complete"


def _checkpoint(place: Path) -> Path:
    from train.checkpoints import checkpoint

    path = checkpoint.newest(place / "checkpoints", lambda line: None)
    if path is None:
        raise UserError(f"{place}: is done, and has no complete checkpoint")
    return path
