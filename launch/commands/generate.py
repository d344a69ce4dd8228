"""`farspan generate RUN`: continue prompts from a checkpoint."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.commands import arguments
from launch.config.model import model_of
from launch.errors import UserError
from launch.preflight.checked import cores
from launch.preflight.refusals import refusals
from launch.run.checkpoints import checkpoint_of, has_average, tokenizer_of
from launch.run.rundir import saved_config
from launch.run.signals import stop_file
from launch.world import spawn
from train.settings import INIT_WEIGHTS, InitWeights

ENTRY = "launch.commands.generate:work"
MOST_SAMPLES = 4096  # of a prompt: each has a memory of its own
MOST_WORKERS = 1024
LONGEST_PROMPT = 1 << 28  # bytes
_NAMES = {"workers": "cluster.workers"}  # a field's key, where that is another
_LISTS = ("prompt", "prompt_file", "stop")  # may be given several times


@dataclass(frozen=True, kw_only=True)
class Request:
    """prompt: texts to continue. prompt_file: files that hold one prompt each. tokens: how many to add. temperature: 0
    takes the likeliest. top_p: of the likeliest tokens, how much probability is drawn from. stop: texts that end it.
    seed: of the draws. samples: how many continuations of each prompt, drawn apart. weights: raw, those that were
    trained, or average, what train.average keeps of them. workers: processes that read a prompt together, a part of it
    each."""

    prompt: list[str] = field(default_factory=list)
    prompt_file: list[str] = field(default_factory=list)
    tokens: int = 300
    temperature: float = 0.8
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int = 0
    samples: int = 1
    weights: InitWeights = "raw"
    workers: int = 1

    def __post_init__(self) -> None:
        for key, most in {"tokens": 1 << 40, "samples": MOST_SAMPLES, "workers": MOST_WORKERS}.items():
            if not 1 <= (value := getattr(self, key)) <= most:
                raise ValueError(f"{_NAMES.get(key, key)}={value}: must be at least 1, and at most {most:,}")
        if self.weights not in INIT_WEIGHTS:
            raise ValueError(f"weights={self.weights}: must be one of {', '.join(INIT_WEIGHTS)}")
        if "" in self.stop:
            raise ValueError("stop=: must not be empty")
        self.sampling()

    def sampling(self) -> Any:
        """The way that tokens are drawn. Raises ValueError."""
        from train.inference.decode import Sampling

        return Sampling(self.temperature, self.top_p, self.seed)

    def prompts(self) -> list[bytes]:
        """Raises UserError for a file that cannot be read."""
        texts = [os.fsencode(prompt) for prompt in self.prompt]  # what a shell gives may be no UTF-8
        for name in self.prompt_file:
            try:
                with Path(name).open("rb") as file:
                    texts.append(file.read(LONGEST_PROMPT + 1))  # a device has no end
            except (OSError, ValueError) as error:
                raise UserError(f"prompt_file={name}: cannot be read ({getattr(error, 'strerror', error)})") from None
            if len(texts[-1]) > LONGEST_PROMPT:
                raise UserError(f"prompt_file={name}: must have at most {LONGEST_PROMPT:,} bytes")
        return texts or [b"import "]


def generate(given: list[str]) -> int:
    """Streams the continuations to standard output. Raises UserError."""
    from train.checkpoints.stored import DamagedError

    run, request = _parse(given)
    saved_run = checkpoint_of(run)
    saved = saved_config(saved_run)
    if request.weights == "average" and not has_average(saved_run):
        raise UserError(f"weights=average: must be raw, {saved_run} holds no averaged weights (train.average)")
    tokenizer = tokenizer_of(saved_run, f"RUN={run}")
    prompts = request.prompts()
    tokens = [_encoded(tokenizer, prompt) for prompt in prompts]
    _check_model(run, saved_run, saved["model"])
    _say_beyond(saved, max(map(len, tokens)), request.tokens)
    if request.workers == 1:
        try:
            write(saved_run, saved["model"], request, prompts, tokens, tokenizer)
        except DamagedError as error:
            raise UserError(f"RUN={run}: this checkpoint is damaged ({error})") from None
        except ValueError as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
        return 0

    with tempfile.TemporaryDirectory(prefix="farspan-generate-") as place:
        outcome = spawn.spawn(
            ENTRY,
            {"checkpoint": str(saved_run.resolve()), "model": saved["model"], "request": asdict(request)}
            | {"prompts": prompts, "tokens": tokens, "place": place},
            workers=request.workers,
            run_dir=Path(place),
            device="cpu",
            threads=max(1, cores() // request.workers),
            tick=lambda: None,
            say=lambda line: print(line, file=sys.stderr),
        )
        if not outcome.ok and outcome.exit_code != 2:
            print(f"failed: {outcome.reason}", file=sys.stderr)
    if outcome.exit_code == 2:
        raise UserError(str(outcome.reason))
    return outcome.exit_code


def _check_model(run: str, saved: Path, model: dict[str, Any]) -> None:
    """Raises UserError for a model that does not build, or is another than a checkpoint holds, before it has memory."""
    from train.checkpoints import checkpoint

    with refusals({"model": model}):
        built = model_of(model)
        shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
        if (difference := checkpoint.first_difference(saved, shapes)) is not None:
            raise UserError(f"RUN={run}: holds another model than its config.yaml says: {difference}")


def work(order: dict[str, Any]) -> None:
    """A rank of several: it reads its part of each prompt, and the last one, which has their ends, goes on alone."""
    checkpoint = Path(order["checkpoint"])
    write(
        checkpoint,
        order["model"],
        Request(**order["request"]),
        order["prompts"],
        order["tokens"],
        tokenizer_of(checkpoint, "RUN"),
        stop=stop_file(Path(order["place"])),
    )


def write(
    writer: Path,
    model: dict[str, Any],
    request: Request,
    prompts: list[bytes],
    tokens: list[list[int]],
    tokenizer: Any,
    stop: Path | None = None,
) -> None:
    """Reads the prompts and writes them with what follows. stop: of one rank of several, which read them together: the
    file that asks to end."""
    from train.inference.decode import ALONE, Decoder

    decoder, comm = Decoder.load(model, writer, average=request.weights == "average"), ALONE
    if stop is not None:
        from parallel.mesh import Groups

        groups = Groups()
        ranks = tuple(range(groups.world))
        groups.open([ranks])
        comm = groups.comm(ranks)
    read = [each for text in tokens for each in request.samples * [decoder.read(text, comm)]]
    if comm.rank != comm.size - 1:
        return
    prompts = [each for each in prompts for _ in range(request.samples)]
    tokens = [each for each in tokens for _ in range(request.samples)]
    shown = ContinuationPrinter(prompts, tokenizer, request.stop, tokens)

    def take(text: int, token: int) -> bool:
        return shown.take(text, token) and not (stop is not None and stop.exists())

    try:
        decoder.extend(read, request.tokens, request.sampling(), take, samples=request.samples)
    finally:
        shown.close()


def _say_beyond(saved: dict[str, Any], longest: int, more: int) -> None:
    """Says where texts will be longer than any that were trained on. Raises UserError where a model has no positions
    for them."""
    from train.rope_base import rotary

    known = [getattr(module.positions, "longest", None) for module in rotary(model_of(saved["model"]))]
    most = min((each for each in known if each is not None), default=None)
    if most is not None and longest + more > most:
        room = f"at most {max(0, most - longest):,}"
        raise UserError(
            f"tokens={more}: must be {room}: the longest prompt has {longest:,} tokens, of {most:,} positions"
        )
    trained = (saved.get("data") or {}).get("max_length")
    if isinstance(trained, int) and longest + more > trained:
        print(
            f"the longest prompt has {longest:,} tokens and {more:,} may follow: the model was trained on texts of at "
            f"most {trained:,}, and what lies beyond is unknown to it",
            file=sys.stderr,
        )


class ContinuationPrinter:
    """Continuations as they appear on standard output: of several one after another, each as far as it is at its turn.

    A text ends at a stop, at a token that ends texts, or where it is told to. tokens: those of the prompts, where the
    bytes of the first that follows depend on them.
    """

    def __init__(self, prompts: list[bytes], tokenizer: Any, stop: Sequence[str], tokens: Sequence[Sequence[int]] = ()):
        from data.roles import roles_of
        from data.tokenizer import writer
        from train.inference.stop_strings import StreamedText

        self.ends = roles_of(tokenizer).stop
        self.spell = [writer(tokenizer, tokens[i] if tokens else ()) for i in range(len(prompts))]
        self.texts = [StreamedText(stop) for _ in prompts]
        self.waiting = [prompt.decode("utf-8", "replace") for prompt in prompts]  # to be written at a text's turn
        self.done = [False] * len(prompts)
        self.turn = -1
        self._next()

    def take(self, text: int, token: int) -> bool:
        """The next token of a text; whether the text goes on."""
        if token in self.ends:
            self._end(text)
            return False
        self._write(text, self.texts[text].add(self.spell[text](token)))
        if self.texts[text].ended:
            self._end(text)
        return not self.texts[text].ended

    def close(self) -> None:
        """All texts end here."""
        for text, done in enumerate(self.done):
            if not done:
                self._end(text)

    def _end(self, text: int) -> None:
        self._write(text, self.texts[text].add(self.spell[text].close()) + self.texts[text].close())
        self.done[text] = True
        while self.turn < len(self.done) and self.done[self.turn]:
            sys.stdout.write("\n")
            self._next()

    def _next(self) -> None:
        self.turn += 1
        if self.turn < len(self.done):
            if len(self.done) > 1:
                sys.stdout.write(f"--- {self.turn + 1} of {len(self.done)}\n")
            self._write(self.turn, "")

    def _write(self, text: int, more: str) -> None:
        self.waiting[text] += more
        if text == self.turn:
            sys.stdout.write(self.waiting[text])
            sys.stdout.flush()
            self.waiting[text] = ""


def _encoded(tokenizer: Any, prompt: bytes) -> list[int]:
    """A prompt behind what its tokenizer puts there. Raises UserError for one that it cannot encode."""
    from data.roles import roles_of
    from data.tokenizer import encoded

    try:
        ids = [*roles_of(tokenizer).begin, *encoded(tokenizer, prompt).tolist()]
        if not ids:
            raise ValueError("must not be empty: this tokenizer puts no token in front of a text")
        return ids
    except ValueError as error:
        shown = prompt[:40].decode("utf-8", "replace") + ("…" if len(prompt) > 40 else "")
        raise UserError(f"prompt={shown}: {error}") from None


def _parse(given: list[str]) -> tuple[str, Request]:
    run, rest = arguments.run_and_rest(given, "generate RUN prompt=TEXT")
    values: dict[str, Any] = {}
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: expected key=value")
        if key == "stop":
            values.setdefault(key, []).extend(_stops(value))
        elif key in _LISTS:
            values.setdefault(key, []).append(value)
        else:
            values[key.removeprefix("generate.")] = arguments.number(value)
    return run, arguments.request(Request, values, _NAMES)


def _stops(value: str) -> list[str]:
    r"""A text, or a list of them in brackets and double quotes; \n is a new line in both. Raises UserError."""
    try:
        texts = json.loads(value if value.startswith("[") else f'["{value}"]', strict=False)
    except ValueError:
        texts = None if value.startswith("[") else [value]
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise UserError(f'stop={value}: must be a text, or a list such as \'["\\n\\n", "def "]\'')
    return texts
