"""Checks of `init_from`: the model that it then has, the corpora that its weights were trained on and
what was held out of them, and the tokens that they know."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cluster.find_run import run_folder
from launch.config import files
from launch.errors import UserError
from launch.paths import RUNS
from launch.run.rundir import latest, saved_config
from train.run_config import RunConfig


def model_of(overrides: list[str]) -> dict[str, Any] | None:
    """The model of what a run starts from, where the overrides choose none and it is here. Raises UserError."""
    chosen = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    init_from = _filled(chosen.get("init_from", "null").strip("'\""), chosen)
    if init_from == "null" or "model" in chosen or files.written(chosen)[1]["model"] != files.defaults()["model"]:
        return None
    from train.checkpoints import hf_reader

    for folder in (Path(init_from), RUNS / init_from):
        if (folder / "config.yaml").exists():
            return saved_config(latest(folder)).get("model")
    if not hf_reader.is_folder(Path(init_from)):
        return None
    try:
        return hf_reader.Published(Path(init_from)).model
    except ValueError as error:
        raise UserError(f"init_from={init_from}: {error}") from None


def _filled(text: str, chosen: dict[str, str]) -> str:
    """With the values of overrides in the place of `${key}`: of a sweep, `init_from='base-${seed}'` is one a member."""
    return re.sub(r"\$\{([\w.]+)\}", lambda found: chosen.get(found[1], found[0]), text)


def replayed(config: RunConfig) -> RunConfig:
    """The configuration with the corpora of the run that it starts from, where an old source of its mixture names none.

    Several take the source's place, each under a name of its own beside it. Raises UserError where that run, and so its
    corpora, are not here.
    """
    sources = config.data.get("sources")
    unnamed = [name for name, portion in (sources or {}).items() if portion["old"] and _unknown(portion["data"])]
    if not unnamed or config.init_from is None:
        return config
    value, (name, *more) = config.init_from, unnamed
    if more:
        raise UserError(
            f"data.sources.{more[0]}.data.corpus=null: must be a corpus: data.sources.{name} takes that of init_from"
        )
    folder = next((f for f in _folders(value) if (f / "config.yaml").exists()), None)
    if folder is None and not Path(value).is_dir():
        run_folder("init_from", value, config.cluster)  # which says what there is
    theirs = own_tokens(saved_config(latest(folder)), latest(folder)).get("data", {}) if folder else {}
    portion = sources[name]
    if theirs.get("_target_") == "data.Data":
        own = {name: {**portion, "data": theirs}}
    elif theirs.get("sources"):
        weights = _last_weights(theirs)
        own = {f"{name}-{other}": _part(portion, each, weights[other]) for other, each in theirs["sources"].items()}
    else:
        raise UserError(
            f"data.sources.{name}.data.corpus=null: must be a corpus: init_from={value} tells of none that is here"
        )
    others = {each: value for each, value in sources.items() if each != name}
    if both := sorted(others.keys() & own.keys()):
        raise UserError(f"data.sources.{both[0]}: must be named otherwise: {name} of init_from={value} has that name")
    return replace(config, data=config.data.having(sources=others | own))


def own_tokens(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A saved configuration whose tokenizers from elsewhere are read as its run has read them. folder: of the run.

    A run that is older than `data.roles` had one token for everything; its files say more now.
    """
    from data import reading

    file = folder / "tokenizer.json"
    try:
        card = reading.json_object(file)
    except ValueError:
        return config
    if card.get("name") != "json" or "document" not in card.get("special", {}):
        return config
    data = config.get("data") or {}
    for each in (data, *(portion["data"] for portion in (data.get("sources") or {}).values())):
        if each.get("tokenizer", "bytes") not in ("bytes", "bpe", "ids") and each.get("corpus") != "store":
            each["tokenizer"] = str(file)
    return config


def _unknown(data: dict[str, Any]) -> bool:
    return data.get("corpus", "") is None


def _part(portion: dict[str, Any], theirs: dict[str, Any], weight: float) -> dict[str, Any]:
    """A source of the other run's mixture as part of an old one, in another order than there."""
    return {**portion, "data": theirs["data"], "weight": weight, "order": theirs["order"] + portion["order"]}


def _last_weights(mixture: dict[str, Any]) -> dict[str, float]:
    """Returns what each source of a mixture had at the end, of all together."""
    replay, groups = mixture.get("replay"), dict[bool, dict[str, float]]()
    for name, portion in mixture["sources"].items():
        weight = portion["weight"][-1][1] if isinstance(portion["weight"], list) else portion["weight"]
        groups.setdefault(replay is not None and bool(portion.get("old")), {})[name] = weight
    shares = dict[str, float]()
    for old, weights in groups.items():
        share = 1.0 if replay is None else replay if old else 1 - replay
        shares |= {name: share * weight / (sum(weights.values()) or 1.0) for name, weight in weights.items()}
    return shares


def _folders(init_from: str) -> tuple[Path, ...]:
    """Returns where a run or a checkpoint of that name may be; of a checkpoint, also its run."""
    path = Path(init_from)
    return path, RUNS / init_from, path.parent.parent


def still_held_out(path: Path, batches: Any, say: Callable[[str], None]) -> None:
    """Raises ValueError where documents would count as held out that the weights were trained on; says which old
    sources are none of the corpora that they were trained on."""
    from train.checkpoints import checkpoint

    order = checkpoint.manifest(path).get("order") or {}
    known = {value: key.removesuffix(".corpus") for key, value in order.items() if key.endswith(".corpus")}
    was = order.get("data.heldout")
    for source in getattr(batches, "sources", ()):
        at = f"data.sources.{source.name}" if source.name else "data"
        now = batches.sequencing.heldout
        if source.store.fingerprint in known and was is not None and now > was:
            raise ValueError(f"data.heldout={now}: must be at most {was}: {path} was trained on the rest of {at}")
        cut = getattr(source.store, "cut", None)  # too few documents: a part of one is held out
        if cut is not None and (before := known.get(source.store.fingerprint)) is not None:
            document, train = order.get(f"{before}.cut") or (None, None)
            if document != cut[0] or train > cut[1]:
                raise ValueError(f"data.heldout={now}: must be {was}: {path} was trained on what it would hold out")
        if source.old and known and source.store.fingerprint not in known:
            say(f"{at}: is called old, and is no corpus that {path} was trained on")


def sound(path: Path, model: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Reads every number of a folder of Hugging Face's, and says where a model that came from one can no longer become
    one. Raises ValueError for a number that is not finite."""
    from models.hub import of_model
    from train.checkpoints import checkpoint, hf_reader

    if hf_reader.is_folder(path):
        published = hf_reader.Published(path)
        try:
            published.verify()
        except ValueError as error:
            raise ValueError(f"init_from={path}: {error}") from None
        for line in published.said:
            say(f"init_from={path}: {line}")
    elif not checkpoint.manifest(path).get("published"):
        return
    try:
        of_model(dict(model))
    except ValueError as error:
        say(f"this model cannot be exported: {error}")


def same_tokens(path: Path, batches: Any, say: Callable[[str], None]) -> None:
    """Says where the weights that a run starts from were trained on another tokenizer's tokens."""
    from data import reading
    from data.hf_tokenizer import card_of, differ
    from train.checkpoints import hf_reader

    file = path / "tokenizer.json"
    card = card_of(path) if hf_reader.is_folder(path) else reading.json_object(file) if file.exists() else None
    tokenizer = getattr(batches, "tokenizer", None)
    if card is not None and tokenizer is not None and differ(card, tokenizer.card()):
        say(f"init_from={path}: was trained on tokens of another tokenizer; data.tokenizer={path} takes that one")
