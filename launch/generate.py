"""`farspan generate RUN`: continue a prompt from a checkpoint."""

import json
import sys
from codecs import getincrementaldecoder
from dataclasses import dataclass
from pathlib import Path

from launch.preflight import run_folder, saved_config
from launch.user import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """prompt: text to continue. tokens: how many to add. temperature: 0 takes the likeliest. seed: of the draws."""

    prompt: str = "import "
    tokens: int = 300
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must not be negative")


def generate(arguments: list[str]) -> int:
    """Streams the continuation to standard output. Raises UserError."""
    run, request = _parse(arguments)
    from data.tokenizer import from_card
    from train.generate import Decoder

    found = _checkpoint(run)
    try:
        tokenizer = from_card(json.loads((found / "tokenizer.json").read_text()))
    except ValueError as error:
        raise UserError(f"RUN={run}: {error}") from None
    decoder = Decoder.load(saved_config(found)["model"], found)
    prompt = [tokenizer.DOCUMENT, *tokenizer.encode(request.prompt.encode()).tolist()]
    text = getincrementaldecoder("utf-8")("replace")  # a character may take several bytes, and bytes may be wrong
    sys.stdout.write(request.prompt)
    for token in decoder.continue_from(prompt, request.tokens, temperature=request.temperature, seed=request.seed):
        if token == tokenizer.DOCUMENT:
            break
        sys.stdout.write(text.decode(tokenizer.decode([token])))
        sys.stdout.flush()
    sys.stdout.write(text.decode(b"", True) + "\n")
    return 0


def _checkpoint(value: str) -> Path:
    """The newest complete checkpoint of a run, or the one named itself, wherever it lies. Raises UserError."""
    from train import checkpoint

    path = Path(value)
    if (path / checkpoint.MANIFEST).exists():
        try:
            checkpoint.verify(path)
        except checkpoint.DamagedError as error:
            raise UserError(f"RUN={value}: this checkpoint is damaged ({error})") from None
        return path
    found = checkpoint.newest(run_folder("RUN", value) / "checkpoints", lambda line: print(line, file=sys.stderr))
    if found is None:
        raise UserError(f"RUN={value}: has no complete checkpoint")
    return found


def _parse(arguments: list[str]) -> tuple[str, Request]:
    from launch.config.compose import fields

    if not arguments or "=" in arguments[0] and not Path(arguments[0]).exists():
        raise UserError("RUN: missing; expected a run folder (farspan generate RUN prompt=TEXT)")
    values: dict[str, object] = {}
    for argument in arguments[1:]:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: expected key=value")
        values[key] = value if key == "prompt" else _number(value)
    try:
        return arguments[0], Request(**fields("generate", values, Request))
    except ValueError as error:
        raise UserError(str(error)) from None


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
