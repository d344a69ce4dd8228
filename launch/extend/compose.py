"""The run that comes of a stage: a chain's configuration, with what the stage says."""

from dataclasses import asdict
from typing import Any

from launch.config.choices import parameters
from launch.config.validate import nearest
from models.hub.architecture import NO_MIXER, Node, layers, node, target
from models.positions import NoPE, RoPE
from train.distill_settings import ConvertSettings
from train.run_config import ObjectConfig, RunConfig, Stage


def configured(
    config: RunConfig,
    stage: Stage,
    number: int,
    model: ObjectConfig,
    teacher: str | None = None,
    before: int | None = None,
) -> dict[str, Any]:
    """A run's configuration, not checked: the chain's, with what the stage says. number: of the stage, from 1.

    model: that before the stage. teacher: of a stage that distils, where the configuration names none. before: the
    length trained so far; None where it is not known. Raises ValueError, a line that begins with a key of the stage,
    for a stage that does not fit the chain.
    """
    batch = config.train.batch_tokens
    if stage.batch_tokens is None and not isinstance(batch, int):
        raise ValueError("batch_tokens: missing; train.batch_tokens grows, and a stage has a number")
    settings = config.to_dict()
    settings["stages"], settings["convert"] = [], asdict(ConvertSettings())
    settings["seed"] = config.seed + number  # else a stage would read again what the one before has read
    settings["model"] = positioned(dict(model.values), stage.positions, before)
    settings["data"]["max_length"] = stage.length
    settings["train"] |= {"tokens": stage.tokens, "steps": None}
    settings["train"]["batch_tokens"] = stage.batch_tokens or max(batch, stage.length)  # type: ignore[type-var]
    if number > 1:  # from the second stage on, the chain goes on from itself
        last = config.stages[number - 2]  # whose optimizer knows the mixers alone, where it has aligned them
        optimizer = "reset" if last.distill == "hidden" and stage.distill != "hidden" else "keep"
        settings["train"] |= {"init_optimizer": optimizer, "init_weights": "raw"}
    settings["train"]["distill"] |= {"teacher": None, "target": "logits"}
    if stage.distill is not None:
        named = config.train.distill.teacher
        settings["train"]["distill"] |= {"teacher": named or teacher, "target": stage.distill}
    if stage.lr is not None:
        settings["optimizer"]["lr"] = stage.lr
    if stage.weights is not None:
        _weigh(settings["data"], stage.weights)
    return settings


def _weigh(data: Node, weights: dict[str, float]) -> None:
    sources = data.get("sources")
    if not isinstance(sources, dict):
        raise ValueError("weights: must be null, data has no sources; data=mixture has some")
    for name, weight in weights.items():
        if name not in sources:
            raise ValueError(f"weights.{name}: no such source{nearest(name, sources)}")
        sources[name]["weight"] = weight


def positioned(model: Node, positions: Any, before: int | None = None) -> Node:
    """A `model` section with this rule in all layers that have rotary positions; keys alone change the rule there is.

    Where some of these layers see the whole document, those with a window no wider than the length trained `before`
    stay as they are: within it nothing is farther away than it was. Raises ValueError where no layer has any.
    """
    if positions is None:
        return model
    rules = rules_of(model)
    if not rules:
        raise ValueError("positions: must be null, no layer of the model has rotary positions")
    wide = {(name, part): rule for (name, part), rule in rules.items() if _farther(model, name, part, before)}
    rules = wide or rules
    blocks = dict(model["blocks"])
    for (name, part), rule in rules.items():
        new = rule
        if "_target_" in positions:
            dropped = () if positions["_target_"] == target(NoPE) else ("base", "fraction")
            new = {key: rule[key] for key in dropped}
        mixer = {**blocks[name][part], "positions": new | positions}
        blocks[name] = {**blocks[name], part: mixer}
    return {**model, "blocks": blocks}


def _farther(model: Node, name: str, part: str, before: int | None) -> bool:
    """Says whether a layer would see farther than `before` in longer documents."""
    window = model["blocks"][name][part].get("window")
    return before is None or window is None or window > before


def rules_of(model: Node) -> dict[tuple[str, str], Node]:
    """The rotary rules of each kind of block that a layer is of, by its name and by the part that turns, its mixer or
    the one beside it; complete."""
    rules = {}
    for name, block in layers(model):
        for part in ("mixer", "beside"):
            mixer = block.get(part)
            if mixer and mixer["_target_"] != NO_MIXER and "positions" in parameters(mixer["_target_"]):
                rule = node(RoPE, partial=False) | mixer.get("positions", {})
                if rule["_target_"] != target(NoPE):
                    rules[name, part] = rule
    return rules
