"""The worker of `farspan evaluate`: the model of a checkpoint over all ranks, the parts one after another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.batches import Batches
from models.lm import LM
from parallel.mesh import Groups, Meshes
from train.checkpoints import checkpoint
from train.evaluation import documents, examples
from train.evaluation.score import OnProgress, Scorer
from train.evaluation.texts import texts
from train.execute import Executor
from train.precision import dtypes
from train.rope_base import rebase, rotary
from train.run_config import RunConfig
from train.settings import EvaluateSettings
from train.time_spans import Spans

SHORTEST = 128  # of the lengths that are taken where none are given: a needle and its question in bytes


def run(order: dict[str, Any]) -> None:
    """The entry that a launcher calls on every rank, torch.distributed being initialised.

    order: `config` (a RunConfig), `checkpoint`, `results` (a JSON file: parts that are measured replace those that it
    has), `progress` (a file that gets a JSON object a line), `device`, `trained` (tokens of the longest sequences that
    the weights were trained on, None where that is not known).
    """
    config: RunConfig = order["config"]
    path, settings = Path(order["checkpoint"]), config.evaluate
    first = dist.get_rank() == 0
    device = torch.device("cuda", torch.cuda.current_device()) if order["device"] == "cuda" else torch.device("cpu")
    tell = _teller(Path(order["progress"])) if first else lambda part, done, of: None
    model, scorer = assemble(config, path, device, settings)
    batches = open_batches(config)
    length = reach(settings, batches)
    results = measure(scorer, batches, settings, tell, _beyond(settings, model, order["trained"]))
    if settings.tasks:
        from train.evaluation.harness import harness

        results["tasks"] = harness(model, scorer, batches.tokenizer, settings, length, tell)
    if first:
        write(Path(order["results"]), {"checkpoint": path.name, "length": length}, results)


def assemble(config: RunConfig, path: Path, device: torch.device, settings: EvaluateSettings) -> tuple[LM, Scorer]:
    """The model with a checkpoint's weights, sharded as in training, and what scores with it. Collective."""
    compute, master = dtypes(config.precision.compute, device.type)
    with torch.device("meta"):
        model: LM = config.model.build()
    model.compute = compute
    model.loss_chunk = config.train.loss_chunk
    mesh = config.parallel.mesh(dist.get_world_size())
    config.engine.build().prepare(model, Meshes(mesh, device), seed=config.seed, dtype=master)
    facts = checkpoint.load(path, model, None)
    if settings.weights == "average":
        checkpoint.load_average(path, model)
    rebase(model, facts.get("rope_theta"))
    model.eval()
    data, sequence = mesh.split
    spans = None if settings.span_tokens is None else Spans(settings.span_tokens)
    executor = Executor(model, Groups(mesh), device, *config.parallel.transport.build(), 0.0, spans=spans)
    return model, Scorer(executor, data, sequence)


def open_batches(config: RunConfig) -> Any:
    """The run's corpus, for what it holds out."""
    return config.data.build().open(config.train.batch_tokens, config.curriculum.build())


def reach(settings: EvaluateSettings, batches: Any) -> int:
    """Tokens of a document that are read, at most."""
    if settings.length is not None:
        return settings.length
    return batches.sequencing.max_length if isinstance(batches, Batches) else batches.task.max_length


def lengths(settings: EvaluateSettings, length: int) -> list[int]:
    """Measures the parts that generated examples answer."""
    return settings.lengths or [n for n in (length >> 3, length >> 2, length >> 1) if n >= SHORTEST] + [length]


def check(settings: EvaluateSettings, batches: Any, model: LM) -> None:
    """Raises ValueError for a length that the positions or a needle do not allow."""
    length = reach(settings, batches)
    longest = max([length, *(settings.lengths or [])])
    for module in rotary(model):
        most = getattr(module.positions, "longest", None)
        if most is not None and longest > most:
            key = "length" if longest == length else "lengths"
            raise ValueError(f"evaluate.{key}={longest}: must be at most {most}, the positions that the model knows")
    if "needle" in settings.parts and settings.lengths is not None:
        needles = examples.NeedleExamples(batches, max(settings.lengths))
        for each in settings.lengths:
            needles.example(examples.Draw(0, 0), each, 0.0)


def _beyond(settings: EvaluateSettings, model: LM, trained: int | None) -> tuple[int, int] | None:
    """(trained length, how many times it extrapolation reads): no farther than the positions that the model knows."""
    known = [longest for module in rotary(model) if (longest := getattr(module.positions, "longest", None))]
    if trained is None:
        return None
    beyond = min([settings.beyond, *(longest // trained for longest in known)])
    return (trained, beyond) if beyond > 1 else None


def measure(
    scorer: Scorer,
    batches: Any,
    settings: EvaluateSettings,
    tell: Callable[[str, int, int], None],
    beyond: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The parts, by name. beyond: the trained length, and how many times it extrapolation reads; without it that part
    is left out. Collective; the same on every rank."""
    length = reach(settings, batches)
    made = lengths(settings, length)

    def told(part: str) -> OnProgress:
        tell(part, 0, 1)
        return lambda done, of: tell(part, done, of)

    results: dict[str, Any] = {}
    parts = settings.parts
    if {"loss", "positions"} & set(parts):
        held = texts(batches, settings.tokens, length)
        name = "loss" if "loss" in parts else "positions"
        scored = list(zip(held, scorer([text.packed for text in held], told(name)), strict=True))
        if "loss" in parts:
            results["loss"] = documents.loss(scored, batches.tokenizer)
        if "positions" in parts:
            results["positions"] = documents.positions(scored)
    drawn: dict[str, Any] = {"lengths": made, "samples": settings.samples}
    if "needle" in parts:
        grid = {**drawn, "depths": settings.depths, "all_fit": settings.lengths is not None}
        results["needle"] = examples.needle(scorer, batches, **grid, tell=told("needle"))
    drawn["symbols"] = settings.symbols
    if "recall" in parts:
        results["recall"] = examples.recall(scorer, batches, **drawn, pairs=settings.pairs, tell=told("recall"))
    if "copy" in parts:
        results["copy"] = examples.copy(scorer, batches, **drawn, tell=told("copy"))
    if "long_range" in parts:
        far = {"length": length, "context": settings.context, "most": settings.documents}
        results["long_range"] = documents.long_range(scorer, batches, **far, tell=told("long_range"))
    if "extrapolation" in parts and beyond is not None:
        far = {"trained": beyond[0], "beyond": beyond[1], "most": settings.documents, "tokens": settings.tokens}
        results["extrapolation"] = documents.extrapolation(scorer, batches, **far, tell=told("extrapolation"))
    return results


def write(path: Path, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """The results, beside those of parts that were measured before at the same length; complete or not at all."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    if any(before.get(key) != value for key, value in facts.items()):
        before = {}
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps({**before, **facts, **results}, indent=1) + "\n")
    aside.rename(path)


def _teller(path: Path) -> Callable[[str, int, int], None]:
    def tell(part: str, done: int, of: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"part": part, "done": done, "of": of}) + "\n")

    return tell
