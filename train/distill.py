"""The teacher of a run that distils: a second model on the same ranks, frozen, that reads the same spans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.distillation import AlignLayers, MatchLogits, read_head, read_streams
from models.lm import LM
from parallel.mesh import Meshes
from parallel.sequence.place import Placed
from train import configuration
from train.checkpoints import checkpoint
from train.checkpoints.hf_convert import rebased
from train.checkpoints.hf_reader import Published, is_folder
from train.distill_settings import DistillSettings
from train.instantiate import construct
from train.precision import dtypes
from train.run_config import RunConfig


def section_of(path: Path) -> dict[str, Any]:
    """The `model` section of a checkpoint, or of a folder of Hugging Face's. Raises ValueError."""
    if is_folder(path):
        return Published(path).model
    home = next((f for f in (path, path.parent.parent) if (f / configuration.CONFIG).exists()), path)
    model: dict[str, Any] | None = configuration.read(home).get("model")
    if model is None:
        raise ValueError(f"{path}: has no {configuration.CONFIG} that says which model it is")
    base = checkpoint.manifest(path).get("rope_theta")
    return rebased(model, base) if base else model


def unlike(teacher: LM, model: LM) -> list[int]:
    """The layers whose mixers are of another kind than the teacher's, or see another window, by their numbers."""
    pairs = zip(teacher.layers.values(), model.layers.values(), strict=True)
    return [i for i, (theirs, ours) in enumerate(pairs) if _kind(theirs) != _kind(ours)]


def _kind(layer: Any) -> tuple[type, type, int | None]:
    return type(layer.mixer), type(layer.beside), getattr(layer.mixer, "window", None)


def refuse(settings: DistillSettings, teacher: LM, model: LM) -> None:
    """Raises ValueError, without the key's section, for models that do not fit each other; both may have no weights."""
    key = f"teacher={settings.teacher}"
    if model.mtp_layers:
        raise ValueError(f"{key}: must be null with model.mtp_layers={model.mtp_layers}: modules ahead have no teacher")
    if teacher.vocabulary != model.vocabulary:
        raise ValueError(f"{key}: must have {model.vocabulary} tokens as this model, and has {teacher.vocabulary}")
    if settings.target == "logits":
        return
    for name, theirs, ours in (
        ("layers", len(teacher.kinds), len(model.kinds)),
        ("dim", teacher.dim, model.dim),
    ):
        if theirs != ours:
            raise ValueError(f"{key}: must have {name}={ours} as this model with target=hidden, and has {theirs}")
    if not unlike(teacher, model):
        raise ValueError("target=hidden: must be logits: every layer has a mixer of the teacher's kind")
    if any(each is not None for lm in (teacher, model) for each in (*lm.hands.values(), lm.depth_read, lm.hyper)):
        raise ValueError("target=hidden: must be logits: layers hand more than their stream to later ones")


class Teacher:
    """A frozen model, placed on the ranks as the run's own.

    layers: those to align, for `target=hidden`.
    """

    def __init__(self, model: LM, settings: DistillSettings, layers: list[int]):
        self.model, self.settings, self.layers = model, settings, layers

    def objective(self, placed: Placed) -> AlignLayers | MatchLogits:
        """Reads a micro-step; what the run's model is then asked for on the same tokens. Collective."""
        read = read_streams if self.settings.target == "hidden" else read_head
        with torch.no_grad():
            found = self.model(placed.tokens, placed.seq, placed.targets, objective=read)
        if self.settings.target == "hidden":
            return AlignLayers(found, self.layers)
        return MatchLogits(found, self.settings.weight, self.settings.temperature)


def place_teacher(config: RunConfig, model: LM, meshes: Meshes) -> Teacher | None:
    """Places the teacher of the run, and freezes what it does not train of `model`, which is not placed yet. None for a
    run without one. Collective."""
    settings = config.train.distill
    if settings.teacher is None:
        return None
    path = Path(settings.teacher)
    with torch.device("meta"):
        teacher: LM = construct(section_of(path))
    compute, master = dtypes(config.precision.compute, meshes.device.type)
    teacher.compute = compute
    layers: list[int] = []
    if settings.target == "hidden":
        layers = unlike(teacher, model)
        _freeze(model, layers)
    config.engine.build().prepare(teacher, meshes, seed=config.seed, dtype=master)
    checkpoint.load(path, teacher, None)
    teacher.requires_grad_(False)
    return Teacher(teacher, settings, layers)


def _freeze(model: LM, layers: list[int]) -> None:
    """Leaves the mixers of these layers to be trained: the others' work is what they are to do."""
    trained = tuple(f"layers.{i}.{part}." for i in layers for part in ("mixer", "beside"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
