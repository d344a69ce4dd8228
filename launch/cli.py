"""The command line: `farspan VERB [arguments]`. Everything after `train` and `plan` is a configuration override."""

import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module

from launch.user import UserError

USAGE = """\
farspan trains hybrid linear-attention / softmax / mixture-of-experts language models on long sequences.

  farspan train [overrides]      train here: Ctrl-C saves and stops, resume=RUN goes on
  farspan plan [overrides]       no training: mesh, parameters, memory per rank, the first plan
  farspan generate RUN           continue a prompt from a run's newest checkpoint
  farspan doctor                 what this machine has, and whether it works

farspan VERB --help says more.  Example:  farspan train experiment=smoke cluster=none run.name=first
"""

HELP = {
    "train": """\
farspan train [key=value ...]

A run is described by overrides of conf/train.yaml: group=option picks a file, key=value sets one number.

  farspan train                                        the default job, about three minutes on two cores
  farspan train experiment=smoke cluster=none          fifteen seconds, without Ray
  farspan train data=text data.path=my_texts optimizer.lr=1e-3 train.tokens=5e6
  farspan train resume=runs/20260101-120000            go on where it stopped
""",
    "plan": """\
farspan plan [key=value ...]

The same overrides as train; nothing is trained and no process is started.

  farspan plan cluster.workers=2 parallel.sequence=2 scheduler.tokens_per_rank=1024
""",
    "generate": """\
farspan generate RUN [prompt=TEXT] [tokens=300] [temperature=0.8] [seed=0]

Continues a prompt from the newest complete checkpoint of a run, one byte at a time, with constant memory per token in
the recurrent layers.

  farspan generate runs/first prompt="def main(" tokens=500 temperature=0.5
""",
    "doctor": """\
farspan doctor

Versions, cores and their bf16 instructions, memory, devices, backends, and whether optional packages work here.
""",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb. Exit codes: 0 done, 1 the run failed, 2 the configuration or the input is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    verb, rest = arguments[0], arguments[1:]
    try:
        run = _verb(verb)
        if {"-h", "--help"} & set(rest):
            print(HELP[verb], end="")
            if verb in ("train", "plan"):
                print(_groups(), end="")
            return 0
        return run(rest)
    except UserError as error:
        print(f"farspan {verb}: {error}" if verb in HELP else f"farspan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before anything was started", file=sys.stderr)
        return 1


def _verb(name: str) -> Callable[[list[str]], int]:
    if name not in HELP:
        close = get_close_matches(name, HELP, n=1, cutoff=0.4)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise UserError(f"{name}: no such verb; accepts {', '.join(HELP)}{nearest}")
    return getattr(import_module(f"launch.{name}"), name)


def _groups() -> str:
    from launch.compose import groups

    lines = [f"  {group:<12}{', '.join(options)}" for group, options in groups().items()]
    return "\nGroups and their options:\n" + "\n".join(lines) + "\n"
