"""config.yaml of a run or a checkpoint, which may come from elsewhere: plain values, and classes where they belong."""

from pathlib import Path
from typing import Any

from data import reading
from train.renamed import with_canonical_names

CONFIG = "config.yaml"
LONGEST = 1 << 19  # bytes; a run's has some thousand
DEEPEST, MOST = 64, 10_000  # levels, and values
# Where the classes of each section lie: one of another room may write files when it is built.
ROOMS = {
    "model": ("models.",),
    "data": ("data.",),
    "curriculum": ("data.",),
    "scheduler": ("parallel.schedule.",),
    "engine": ("train.engines.",),
    "optimizer": ("torch.optim.", "train.optim."),
    "schedule": ("train.schedules.",),
    "tracking": ("train.tracking.Tracking",),
    "cluster": ("launch.templates.",),
}


def read(folder: Path) -> dict[str, Any]:
    """The configuration in a folder, {} for an empty one.

    Raises ValueError, one line that starts with the file's name, for what is no such file: aliases that unfold to more
    than a run has (a kilobyte of them may be gigabytes), a tag, an interpolation, or a class of another room than its
    section's.
    """
    try:
        config = with_canonical_names(_read(reading.text(folder / CONFIG, LONGEST)))
    except ValueError as error:
        line = " ".join(str(error).split())
        raise ValueError(line if line.startswith(CONFIG) else f"{CONFIG}: {line}") from None
    for key, rooms in ROOMS.items():
        for target in _targets(config.get(key)):
            if not isinstance(target, str) or not target.startswith(rooms):
                raise ValueError(f"{CONFIG}: {key}: _target_={str(target)[:80]}: must be a class of {', '.join(rooms)}")
    return config


def _read(text: str) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if "\0" in text:
        raise ValueError("has a NUL")
    try:
        _check(text)
        config = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"is no YAML ({getattr(error, 'problem', None) or 'unreadable'}{where})") from None
    except (OmegaConfBaseException, RecursionError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"is no configuration ({(str(error).splitlines() or [''])[0][:120]})") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError("is not a section with keys")
    return {str(key): value for key, value in config.items()}


def _check(text: str) -> None:
    """Raises ValueError for what no run's configuration has, before anything of it is built."""
    import yaml

    open_at: list[tuple[str | None, int]] = []  # of each collection: its anchor, and how many values came before
    anchored: dict[str, int] = {}  # values below an anchor, aliases unfolded
    count = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_at.pop()
            if anchor is not None:
                anchored[anchor] = count - before
        if not isinstance(event, yaml.NodeEvent):
            continue
        count += 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored:
                raise ValueError("has an alias to what is around it")
            count += anchored[event.anchor]
        elif event.tag is not None and event.tag != "!":
            raise ValueError("has a tag, which no run's has")
        elif isinstance(event, yaml.CollectionStartEvent):
            open_at.append((event.anchor, count))
        elif event.anchor is not None:
            anchored[event.anchor] = 0
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise ValueError("has an interpolation, which no run's has")
        if len(open_at) > DEEPEST:
            raise ValueError("is nested too deep")
        if count > MOST:
            raise ValueError(f"has more than {MOST:,} values")


def _targets(node: Any) -> list[Any]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for child in node.values() for t in _targets(child)]
    return [t for child in node for t in _targets(child)] if isinstance(node, list) else []
