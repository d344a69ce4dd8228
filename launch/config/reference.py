"""docs/configuration.md: every key of the configuration, written from the constructors and conf/ (`make reference`).

A key's type is its parameter's, its default what conf/ says, else the constructor's; its meaning stands in the class's
docstring, as "key: meaning." in running text or as a column "key   meaning", else behind the `#` of its line in conf/.
What a docstring says besides is the text above the table, but for what it raises, and for the paragraph with the shapes
of a forward pass.
"""

import inspect
import re
import typing
from collections.abc import Iterable
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.config import files
from launch.config.choices import GIVEN, accepts
from launch.config.validate import LISTS, SCALARS, SECTIONS, class_of, hints_of, parameters_of, words
from models.hub import families

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
HUB = ROOT / "docs" / "hub.md"
INTRO = """\
# Configuration

<!-- Written by `make reference` from the constructors' docstrings and conf/. Do not edit. -->

A run is described by [conf/train.yaml](../conf/train.yaml), which chooses one file of each group, and by the overrides
behind the verb:

```
farspan train data=text data.path=FOLDER optimizer.lr=1e-3 mixer@model.blocks.gla.mixer=gated_deltanet
```

- `group=option` chooses another file of conf/: `data=text` is conf/data/text.yaml. `group@place=option` puts one into
  a part of another.
- `key=value` sets one value, by its full key. Numbers may be written 1e6 or 1_000_000; lists `[a, b]`; nothing `null`.
  Text that looks like something else is quoted for both the shell and YAML: `run.name="'2027'"`.
- `~key` takes a key away, and leaves its value to the constructor's default. `+key=value` is the same as `key=value`.
- `key=${other.key}` takes the value from another key.
- The last of two overrides of the same key counts. `experiment=a` changes several keys at once, and what stands on the
  command line changes them again, wherever it stands.
- `farspan sweep` takes several values of a key, or several options of a group, separated by commas.

Every key and every value is checked before a process starts: against the signature of the class that it configures, and
by that class. `farspan train --cfg [overrides]` prints the configuration that comes of it, complete and resolved, and
starts nothing. A run keeps that in its folder as config.yaml, and `resume=RUN` starts from there: overrides beside it
change a resumed run.

In the tables, a default is that of the option chosen by default; those that other options set follow it.
"""


def page() -> str:
    """The whole text. Raises ValueError for a class without a docstring."""
    tree, placed = files.written()
    tops = [name for name in placed if "@" not in name]
    inner = sorted({name.partition("@")[0] for name in placed if "@" in name})
    scalars = [key for key in tree if key in SCALARS or key in LISTS]
    sections = [key for key in tree if key in SECTIONS and key not in tops]
    parts = {}
    for group in tops:
        parts[group] = _experiments() if files.defaults()[group] == "null" else _group(group)
        if group == "model":
            for each in inner:
                parts[each] = _placed(each, [name.partition("@")[2] for name in placed if name.startswith(f"{each}@")])
    parts[", ".join(scalars)] = _scalars(scalars)
    for key in sections:
        texts = files.comments(files.CONF / "train.yaml")
        texts = {k.removeprefix(f"{key}."): text for k, text in texts.items() if k.startswith(f"{key}.")}
        parts[key] = _described(SECTIONS[key], {"": tree[key]}, f"{key}.", texts)
    for key, hint in LISTS.items():
        (kind,) = typing.get_args(hint)
        parts[key] = _described(kind, {"": {}}, f"{key}[i].", {})
    contents = " · ".join(f"[{name}](#{name.replace(', ', '-')})" for name in parts)
    body = "\n\n".join(f"## {name}\n\n{text.strip()}" for name, text in parts.items())
    body = _PAPER.sub(r"[\1](https://arxiv.org/abs/\1)", body)
    return f"{INTRO}\n{contents}\n\n{body}\n"


def meanings(text: str, keys: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Returns what a docstring says of each key, and the rest of it."""
    keys = set(keys)
    rest: list[str] = []
    texts: dict[str, str] = {}
    for paragraph in _paragraphs(text):
        if _SHAPES.match(paragraph):
            continue
        column = _columns(paragraph, keys)
        if column:
            texts |= column
            continue
        matches = [m for m in _NAMED.finditer(paragraph) if set(_names(m[1])) <= keys]
        ends = [*(m.start() for m in matches[1:]), len(paragraph)]
        before = paragraph[: matches[0].start()] if matches else paragraph
        for match, end in zip(matches, ends, strict=True) if matches else ():
            meaning = paragraph[match.end() : end].partition("Raises ")[0]
            texts |= dict.fromkeys(_names(match[1]), " ".join(meaning.split()).removesuffix("."))
        before = before.partition("Raises ")[0].strip()
        rest += [before] if before else []
    return "\n\n".join(rest), texts


_PAPER = re.compile(r"(?<![\w./\[])(\d{4}\.\d{5})(?![\w.]?\w)")  # by its number on arXiv
_SHAPES = re.compile(r"\w+ \[[^\]]*\].* -> ")  # x [B, T, D] -> [B, T, D]
_NAMED = re.compile(r"(?:^|(?<=[.;!?)]\s))((?:\w+,\s+)*\w+):\s", re.MULTILINE)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _paragraphs(text: str) -> list[str]:
    """A docstring's paragraphs; one that does not end its sentence goes on in the next."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraphs and paragraph[:1].islower() and not paragraphs[-1].rstrip().endswith((".", ":", "!", "?")):
            paragraphs[-1] += f"\n{paragraph}"
        else:
            paragraphs.append(paragraph)
    return paragraphs


def _columns(paragraph: str, keys: set[str]) -> dict[str, str]:
    """The keys of a paragraph that is a table: names, two blanks or more, meaning; {} where it is none."""
    columns: dict[str, str] = {}
    current: list[str] = []
    for line in paragraph.splitlines():
        match = re.match(r"((?:\w+, )*\w+)\s{2,}(\S.*)", line)
        if match and set(_names(match[1])) <= keys:
            current = _names(match[1])
            columns |= dict.fromkeys(current, match[2])
        elif current and line.startswith(" "):
            columns |= {name: f"{columns[name]} {line.strip()}" for name in current}
        else:
            return {}
    return {name: text.removesuffix(".") for name, text in columns.items()}


def documentation(constructor: type) -> str:
    """A class's own docstring, after its module's first paragraph where the module is about that class alone."""
    own = constructor.__dict__.get("__doc__")
    if not own or is_dataclass(constructor) and own.startswith(f"{constructor.__name__}("):
        raise ValueError(
            f"{constructor.__module__}.{constructor.__qualname__} has no docstring: docs/configuration.md is written "
            f"from it; say what it is, and of each key what it means, as in train/settings.py"
        )
    module = inspect.getmodule(constructor)
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == constructor.__module__]
    first = _paragraphs(module.__doc__ or "")[0] if module and module.__doc__ and len(classes) == 1 else ""
    return f"{first}\n\n{inspect.cleandoc(own)}" if first else inspect.cleandoc(own)


def _group(group: str) -> str:
    """A group that is a key of its own: its options, then what they configure."""
    default = files.defaults()[group]
    options = sorted(files.groups()[group], key=lambda option: option != default)
    nodes = {option: files.written({group: option})[0][group] for option in options}
    if group in SECTIONS:
        text = _described(SECTIONS[group], nodes, f"{group}.", _comments(group, options))
    else:
        text = _by_class(group, nodes, f"{group}.")
    return _options(group, options, default) + text + _inner(group, nodes)


def _by_class(group: str, nodes: dict[str, dict[str, Any]], prefix: str) -> str:
    """The options of a group, those that build the same class together."""
    together: dict[str, dict[str, Any]] = {}
    for option, node in nodes.items():
        together.setdefault(node["_target_"], {})[option] = node
    text = ""
    for target, same in together.items():
        if len(together) > 1:
            text += f"### {', '.join(f'`{group}={option}`' for option in same)}\n\n"
        text += _described(target, same, prefix, _comments(group, list(same)))
    return text


def _inner(group: str, nodes: dict[str, dict[str, Any]]) -> str:
    """The objects inside those of a group, each class once, under the keys where it stands."""
    together: dict[str, dict[tuple[str, str], Any]] = {}
    for option, node in nodes.items():
        for path, child in _objects(node, group):
            together.setdefault(child["_target_"], {})[path, option] = child
    text = ""
    for target, same in together.items():
        paths = list(dict.fromkeys(path for path, _ in same))
        options = list(dict.fromkeys(option for _, option in same))
        of = "" if len(options) == len(nodes) else f" of {', '.join(f'`{group}={option}`' for option in options)}"
        text += f"### {', '.join(f'`{path}`' for path in paths)}{of}\n\n"
        labelled = {path if len(paths) > 1 else option: child for (path, option), child in reversed(same.items())}
        labelled = dict(reversed(labelled.items()))
        prefix = f"{paths[0]}." if len(paths) == 1 else ""
        text += _described(target, labelled, prefix, _comments(group, options, paths[0].partition(".")[2]))
    return text


def _objects(node: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects below a node, but for those that a group of their own describes."""
    placed, targets = _inside(files.stamp())
    objects = []
    for key, child in node.items():
        full = f"{path}.{key}"
        if isinstance(child, dict) and full not in placed and child.get("_target_") not in targets:
            objects += [(full, child)] if "_target_" in child else []
            objects += _objects(child, full)
    return objects


@lru_cache(maxsize=1)
def _inside(now: files.Stamp) -> tuple[set[str], set[str | None]]:
    """The places where a group is put inside others, and the classes of such groups; now: the state of the files."""
    names = [name.partition("@") for name in files.written()[1] if "@" in name]
    groups = {group for group, _, _ in names}
    targets = {files.option(group, option).get("_target_") for group in groups for option in files.groups()[group]}
    return {place for _, _, place in names}, targets


def _placed(group: str, places: list[str]) -> str:
    """A group whose options are put into a part of another."""
    options = files.groups()[group]
    where = ", ".join(f"`{group}@{place}=OPTION`" for place in places)
    nodes = {option: files.option(group, option) for option in options}
    text = f"Placed where one is wanted: {where}. Its keys are then below that place: `{places[0]}.KEY`.\n\n"
    return text + _options(group, options, None) + _by_class(group, nodes, "")


def _options(group: str, options: list[str], default: str | None) -> str:
    lines = []
    for option in options:
        path = files.CONF / group / f"{option}.yaml"
        text = files.head_comment(path)
        mark = " (default)" if option == default else ""
        lines.append(f"- [`{group}={option}`](../conf/{group}/{option}.yaml){mark}{f': {text}' if text else ''}")
    return "\n".join(lines) + "\n\n"


def _experiments() -> str:
    lines = ["None by default. Each of them sets some keys at once.", ""]
    for option in files.groups()["experiment"]:
        node = files.option("experiment", option)
        text = files.head_comment(files.CONF / "experiment" / f"{option}.yaml")
        keys = " ".join(f"{key}={files.flow(value)}" for key, value in files.leaves(node).items())
        lines.append(f"- [`experiment={option}`](../conf/experiment/{option}.yaml): {text} `{keys}`")
    return "\n".join(lines) + "\n"


def _scalars(keys: list[str]) -> str:
    tree, comments = files.written()[0], files.comments(files.CONF / "train.yaml")
    return (
        _table([(key, _kind({**SCALARS, **LISTS}[key]), f"`{tree[key]}`", comments.get(key, "")) for key in keys])
        + "\n"
    )


def _described(target: Any, nodes: dict[str, dict[str, Any]], prefix: str, comments: dict[str, str]) -> str:
    """A class: what its docstring says, and its keys, `prefix` before each.

    nodes: what conf/ says of them, by option or by place, the default first. comments: what it says behind a `#`.
    """
    constructor = class_of(prefix, target) if isinstance(target, str) else target
    if constructor.__module__.startswith("torch."):
        page = f"https://docs.pytorch.org/docs/stable/generated/{target}.html"
        rows = [
            (prefix + key, _guess(value), _default(key, nodes, ""), comments.get(key, ""))
            for key, value in next(iter(nodes.values())).items()
            if not key.startswith("_")
        ]
        text = f"Builds [`{target}`]({page}), which takes further keys, and says there what each means."
        return f"{text}\n\n{_table(rows)}\n"
    prose, rows = _rows(constructor, nodes, prefix, comments)
    parts = [f"Builds `{target}`." if isinstance(target, str) else "", prose, _table(rows) if rows else ""]
    return "\n\n".join(part.strip() for part in parts if part) + "\n\n"


Row = tuple[str, str, str, str]


def _rows(constructor: type, nodes: dict[str, Any], prefix: str, comments: dict[str, str]) -> tuple[str, list[Row]]:
    """Returns what a class's docstring says besides, and a row for each of its keys, in the order of conf/."""
    parameters, hints = parameters_of(constructor)[0], hints_of(constructor)
    partial = any(node.get("_partial_") == "true" for node in nodes.values())
    written = [key for node in nodes.values() for key in node if key in parameters]
    keys = [key for key in dict.fromkeys([*written, *parameters]) if not (partial and key in GIVEN)]
    prose, texts = meanings(documentation(constructor), parameters)
    for base in constructor.__mro__[1:-1]:
        if base.__doc__ and base.__module__.split(".")[0] == constructor.__module__.split(".")[0]:
            texts = meanings(base.__doc__, parameters)[1] | texts
    rows: list[Row] = []
    for key in keys:
        hint = hints.get(key, Any)
        if isinstance(hint, type) and is_dataclass(hint):
            within = {option: node.get(key, {}) for option, node in nodes.items()}
            inner = {k.removeprefix(f"{key}."): text for k, text in comments.items() if k.startswith(f"{key}.")}
            more, below = _rows(hint, within, f"{prefix}{key}.", inner)
            prose += f"\n\n`{prefix}{key}`: {more[:1].lower()}{more[1:]}"
            rows += below
            continue
        default = _text(constructor, parameters[key])
        kind = _type(constructor, key, hint)
        if hint is Any and any("_target_" in node.get(key, "") for node in nodes.values()):
            kind = "object or null" if default == "`null`" else "object"
        meaning = texts.get(key) or comments.get(key, "")
        rows.append((prefix + key, kind, _default(key, nodes, default), meaning))
    return prose, rows


def _comments(group: str, options: list[str], inside: str = "") -> dict[str, str]:
    """Returns what the files of options say behind the keys, of a node inside them perhaps; the first option's count
    first."""
    start = f"{inside}." if inside else ""
    lines: dict[str, str] = {}
    for option in reversed(options):
        texts = files.comments(files.CONF / group / f"{option}.yaml")
        lines |= {key.removeprefix(start): text for key, text in texts.items() if key.startswith(start)}
    return lines


def _type(constructor: type, key: str, hint: Any) -> str:
    closed = accepts(f"{constructor.__module__}.{constructor.__qualname__}", key)
    if closed:
        return " or ".join(f"`{value}`" for value in closed)
    return _kind(hint)


def _kind(hint: Any) -> str:
    text = words(hint) if hint is not Any else "anything"
    text = text.replace("an object, a section with _target_", "an object").replace("a section with keys", "a section")
    text = re.sub(r"\b(a|an) ", "", text)
    return text.replace("list of object", "list of objects").replace("list of section", "list of sections")


def _guess(value: Any) -> str:
    """The type of a value of conf/ whose class is not ours."""
    if isinstance(value, list):
        return "list"
    return "true or false" if value in ("true", "false") else "number" if re.match(r"[-\d.]", value) else "text"


def _default(key: str, nodes: dict[str, dict[str, Any]], otherwise: str) -> str:
    """Returns what the options say of a key: one value, or the default option's and those that differ."""
    shown = {option: _shown(node[key]) if key in node else otherwise for option, node in nodes.items()}
    by_value: dict[str, list[str]] = {}
    for option, value in shown.items():
        by_value.setdefault(value, []).append(option)
    (first, _), *others = by_value.items()
    return "; ".join([first, *(f"{value} ({', '.join(options)})" for value, options in others)])


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        return f"`{value['_target_'].rpartition('.')[2]}`"
    if isinstance(value, dict) and any(isinstance(child, dict) for child in value.values()):
        return ", ".join(f"`{name}`" for name in value)
    return "required" if value == "???" else f"`{files.flow(value)}`" if value != "" else "`''`"


def _text(constructor: type, parameter: inspect.Parameter) -> str:
    """A constructor's default as YAML has it."""
    default = parameter.default
    if default is inspect.Parameter.empty:
        return "required"
    factory = getattr(getattr(constructor, "__dataclass_fields__", {}).get(parameter.name), "default_factory", None)
    default = factory() if callable(factory) else default
    if default is None or isinstance(default, bool):
        return f"`{str(default).lower()}`".replace("none", "null")
    return _shown(list(default) if isinstance(default, tuple) else default)


def _table(rows: list[Row]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, meaning in rows:
        cells = (f"`{key}`", kind, default, " ".join(meaning.split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def hub_page(text: str) -> str:
    """docs/hub.md with its table of architectures as it is now."""
    begin, end = "<!-- families: written by make reference -->\n\n", "\n<!-- end -->"
    front, rest = text.split(begin)
    return front + begin + families() + end + rest.split(end, 1)[1]


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    HUB.write_text(hub_page(HUB.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}, {HUB.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
