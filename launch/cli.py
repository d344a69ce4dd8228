"""The command line: `farspan VERB [arguments]`. `launch.verbs` lists the verbs, and what each of them runs."""

import os
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import FrameType

from launch import apart, collection, terminal
from launch.commands.arguments import asks_for_configuration
from launch.errors import UserError
from launch.run import signals
from launch.verbs import VERBS, Verb, help_of, usage

TRACEBACK = "FARSPAN_TRACEBACK"  # set, an error that nobody has foreseen is shown whole
_OURS = Path(__file__).resolve().parents[1]
_interrupted = False  # by a signal, before a launcher took them over


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; by default the process's own. Exit codes: 0 done, 1 failed, 2 a wrong configuration or input.

    A process of ours hears SIGTERM and SIGHUP like Ctrl-C, until a launcher takes them over, and none once it has
    ended: its exit code is decided.
    """
    if arguments is not None:
        return _run(arguments)
    collection.seldom()
    apart.shield()
    terminal.outlive()
    with signals.interrupted(_interrupt):
        return _run(sys.argv[1:])


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    signals.interrupt(number, frame)


def _run(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if name in ("-h", "--help", "help"):
            print(usage(), end="")
            return 0
        if name in ("-V", "--version", "version"):
            print(f"farspan {_version()}")
            return 0
        if name == "complete":  # asked by the shell, between two keys
            from launch.commands.completion import complete

            return complete(rest)
        verb = _verb(name)
        if {"-h", "--help"} & set(rest):
            print(help_of(name, rest), end="")
            return 0
        overrides = asks_for_configuration(rest) if verb.overrides else None
        if overrides is not None:
            print(_configuration(verb, overrides), end="")
            return 0
        return verb.load()(rest)
    except UserError as error:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))  # of a value
        print(f"farspan {name}: {line}" if name in VERBS else f"farspan: {line}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Exception) as error:
        if terminal.gone(error):  # whoever reads standard output has read enough
            return 1
        # Code that is being imported may swallow an interrupt, and then fail at what it has not defined.
        if not (isinstance(error, KeyboardInterrupt) or _interrupted):
            if os.environ.get(TRACEBACK):
                raise
            print(f"farspan {name}: {_unexpected(error)}", file=sys.stderr)
            return 1
        if name in ("train", "sweep"):  # a stop is no failure, however early
            print("stopped before the run started: nothing was written", file=sys.stderr)
            return 0
        print(f"farspan {name}: interrupted", file=sys.stderr)
        return 1


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("farspan")
    except PackageNotFoundError:  # a checkout that is not installed
        return "of a checkout"


def _unexpected(error: BaseException) -> str:
    """Puts an unforeseen error into one line: a disk's or a device's own words, else also its place in the code."""
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"failed: {error.strerror}" + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, MemoryError):
        return "failed: this machine's memory does not hold it"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if Path(f.filename).is_relative_to(_OURS)), frames[-1])
    name = Path(place.filename)
    shown = name.relative_to(_OURS) if name.is_relative_to(_OURS) else name.name
    where = f"a fault of farspan, in {shown}:{place.lineno}; {TRACEBACK}=1 shows all"
    return f"failed: {type(error).__name__}: {text} ({where})"


def _verb(name: str) -> Verb:
    if name not in VERBS:
        close = get_close_matches(name, VERBS, n=1, cutoff=0.4)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise UserError(f"{name}: no such verb; accepts {', '.join(VERBS)}{nearest}")
    return VERBS[name]


def _configuration(verb: Verb, overrides: list[str]) -> str:
    """The resolved configuration as YAML, checked, the model built on the meta device; of a sweep, one a run."""
    from omegaconf import OmegaConf

    from launch.config import validate
    from launch.preflight.configure import configure
    from launch.preflight.refusals import refusals

    jobs = [verb.arguments(overrides)]
    if verb is VERBS["sweep"]:
        from launch.sweep.members import expand

        jobs = [member.overrides for member in expand(overrides)[1]]
    texts = []
    for job in jobs:
        config = configure(job)
        with refusals(config):
            validate.build(config)
        texts.append(OmegaConf.to_yaml(OmegaConf.create(config.to_dict())))
    return "---\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
