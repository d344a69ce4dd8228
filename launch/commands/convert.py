"""`farspan import` and `farspan export`: Hugging Face's folders in, and out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.commands.arguments import positional
from launch.errors import UserError
from launch.paths import RUNS
from launch.run import rundir
from launch.run.checkpoints import checkpoint_of
from launch.run.export import Export, _disk, _progress, _size, written
from launch.shell import command, override

if TYPE_CHECKING:
    from train.checkpoints.hf_reader import Published


@dataclass(frozen=True, kw_only=True)
class Import:
    """vocabulary: rows of the embedding wanted; null for those that there are, or the tokens of the folder's tokenizer
    where those are more. extend_vocab: whether there may be rows more than there are. document: the token behind
    documents, of the folder's tokenizer; null for the one that it ends texts with. mtp: whether modules of multi-token
    prediction come in, where the folder has any that are known here."""

    vocabulary: int | None = None
    extend_vocab: bool = False
    document: str | None = None
    mtp: bool = True


def import_(arguments: list[str]) -> int:
    """Writes a Hugging Face folder's model as a run of no steps, or lists the architectures with `--list`. Raises
    UserError before anything is written."""
    if arguments == ["--list"]:
        return _families()
    from train.checkpoints.hf_convert import take
    from train.checkpoints.hf_reader import CONFIG

    (source, *rest), request = positional(
        "import", arguments, Import, ("SOURCE", "DEST"), least=1, text=("document",), also=("run.dir",)
    )
    folder = Path(source).expanduser()
    run = Path(rest[0]).expanduser() if rest else RUNS / folder.resolve().name
    if not folder.is_dir():
        raise UserError(f"SOURCE={source}: no such folder; expected one with {CONFIG} and *.safetensors")
    _free(run, "DEST")
    with _refusals(f"SOURCE={source}"):
        card, published = _read(folder, request)
    config = {"model": published.model, "data": {"max_length": published.max_length}, "code": rundir.code_version()}
    companions = {"config.yaml": yaml.safe_dump(config, sort_keys=False)}
    if card is not None:
        companions["tokenizer.json"] = json.dumps(card, indent=2) + "\n"
    with _progress("reading") as watch, _disk(run, "DEST"), _refusals(f"SOURCE={source}"):
        take(published, run, companions, watch)
    _say(f"{published.name}, {_size(published.shapes)} parameters: {run}")
    for line in published.said:
        _say(line)
    if published.unpublishable is not None:
        _say(f"cannot be exported again as it is: {published.unpublishable}")
    if published.left_out:
        _say(f"left out: {_some(published.left_out)}, which no model here reads")
    if card is None:
        _say(f"{source} has no tokenizer.json: the tokens have no text")
    elif card["special"].get("end", 0) is None:
        _say(f"{source} names no token that ends a text: nothing stands between documents; document=TOKEN names one")
    more = [override("data.tokenizer", run)] if card is not None and card["name"] == "json" else []
    _say(f"  {command('train', override('init_from', run), *more)}  # trains it further")
    return 0


def _families() -> int:
    """Prints the architectures, and what of each is here."""
    from models.hub import ARCHITECTURES

    longest = max(map(len, ARCHITECTURES))
    for name, each in ARCHITECTURES.items():
        print(f"{name.ljust(longest)}  {each.told.replace('`', '')}")
    return 0


def _read(folder: Path, request: Import) -> tuple[dict[str, Any] | None, Published]:
    """The folder's tokenizer and model, with rows for all of its tokens. Raises ValueError."""
    from data.hf_tokenizer import card_of
    from train.checkpoints.hf_reader import Published

    card = card_of(folder, request.document)
    published = Published(folder, vocabulary=request.vocabulary, extend=request.extend_vocab, mtp=request.mtp)
    tokens, rows = (0 if card is None else card["size"]), published.model["vocabulary"]
    if tokens <= rows:
        return card, published
    if request.vocabulary is not None:
        raise ValueError(f"vocabulary={request.vocabulary}: must be at least {tokens}, the tokens of its tokenizer")
    if not request.extend_vocab:
        raise ValueError(
            f"tokenizer.json has {tokens} tokens, the model {rows}: extend_vocab=true adds rows, each the mean of those"
        )
    return card, Published(folder, vocabulary=tokens, extend=True, mtp=request.mtp)


def export(arguments: list[str]) -> int:
    """Writes a checkpoint as a folder that transformers loads. Raises UserError before anything is written."""
    (run, to), request = positional("export", arguments, Export, ("RUN", "DEST"), least=2, text=("document",))
    dest = Path(to).expanduser()
    _free(dest, "DEST")
    with _refusals(f"RUN={run}"):
        saved = checkpoint_of(run)
        lines = written(saved, dest, request)
    for line in lines:
        _say(line)
    return 0


def _free(path: Path, key: str) -> None:
    rundir.keep_out(path, key)
    if path.exists() or path.is_symlink():
        raise UserError(f"{key}={path}: is there already; expected a folder to be made")


@contextmanager
def _refusals(prefix: str) -> Iterator[None]:
    """Turns a ValueError into one line about what was given."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}: {' '.join(str(error).split())}") from None


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} others"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
