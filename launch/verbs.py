"""The verbs of `farspan`: the function that each of them runs (imported when it is run), and their help."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from launch.config import files

_WIDTH = 118
_INDENT = 20  # of what stands behind a group's name


@dataclass(frozen=True, kw_only=True)
class Verb:
    """function: MODULE:NAME, called with the arguments, returns the exit code. synopsis: what may follow the verb.

    line: the verb in one line. text: the rest of its help. overrides: whether its arguments describe a run. first: the
    choice of a group that it makes where the arguments make none.
    """

    function: str
    synopsis: str
    line: str
    text: str
    overrides: bool = False
    first: str | None = None

    def load(self) -> Callable[[list[str]], int]:
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)

    def arguments(self, given: list[str]) -> list[str]:
        """The arguments, with the verb's own choice before them where they make none."""
        if self.first is None or any(g.lstrip("+").startswith(f"{self.first.partition('=')[0]}=") for g in given):
            return given
        return [self.first, *given]


VERBS: dict[str, Verb] = {
    "train": Verb(
        function="launch.commands.train:train",
        synopsis="[key=value ...]",
        line="train here: Ctrl-C saves and stops, resume=RUN goes on",
        overrides=True,
        text="""\
A run is described by overrides of conf/train.yaml: group=option picks a file, key=value sets one value. Every key and
every value is checked before a process starts. --cfg prints the resolved configuration instead of training.

  farspan train                                        the default job, about three minutes on two cores
  farspan train experiment=smoke cluster=none          fifteen seconds, without Ray
  farspan train data=text data.path=my_texts optimizer.lr=1e-3 train.tokens=5e6
  farspan train resume=runs/20260101-120000            go on where it stopped
""",
    ),
    "sweep": Verb(
        function="launch.sweep.sweep:sweep",
        synopsis="[key=value,value,... ...]",
        line="a run for every combination of values, a table and a plot at the end",
        overrides=True,
        text="""\
The same overrides as train, any of them with several values: a list, range(1,4), or several options of a group. Every
combination is a run with a folder of its own, inside the sweep's.

  farspan sweep optimizer.lr=1e-3,3e-3,1e-2 mixer@model.blocks.gla.mixer=gla,gated_deltanet
  farspan sweep resume=runs/20260101-120000            go on with what is not done
""",
    ),
    "prepare": Verb(
        function="launch.commands.prepare:prepare",
        synopsis="[key=value ...]",
        line="make a corpus into a token store, with its card",
        overrides=True,
        text="""\
The same overrides as train, of which data decides. Runs that read the corpus later find it done; interrupted, the same
command goes on. With cluster=ray cluster.address=auto, on one of its machines, all cores of a cluster take part.

  farspan prepare data=jsonl data.path='"shards/*.jsonl"' data.store=corpus data.tokenizer=bpe data.vocabulary=8192
  farspan train data=store data.store=corpus model.vocabulary=8192
""",
    ),
    "plan": Verb(
        function="launch.commands.plan:plan",
        synopsis="[key=value ...]",
        line="no training: mesh, parameters, memory per rank, the first plan",
        overrides=True,
        text="""\
The same overrides as train; nothing is trained and no process is started.

  farspan plan cluster.workers=2 parallel.sequence=2 scheduler.tokens_per_rank=1024

scheduler.simulate=N plans N steps with every scheduler on a cluster that simulation.* describes; it need not exist:

  farspan plan scheduler.simulate=40 simulation.model=7b simulation.lengths=lengths.npy run.plot=step.png
""",
    ),
    "verify": Verb(
        function="launch.commands.verify:verify",
        synopsis="[RUN] [key=value ...]",
        line="this layout, shrunk, against one process: right, or what parts first",
        overrides=True,
        text="""\
The same overrides as train, or a run whose configuration is taken. The model keeps every kind of layer and the layout
all its parts; sizes are cut. Three steps of packed, unequal documents run on processes here and in one process, fp64:
losses, every gradient and every weight must agree but for rounding. Exit code 0: right. 1: wrong, with the first
tensor that parts, its layer and the axis of the mesh.

  farspan verify model=qwen3_next_tiny cluster.workers=4 parallel.data=2 parallel.transport.attention=ring
  farspan verify runs/first engine.recompute=full
""",
    ),
    "submit": Verb(
        function="launch.runner.submit:submit",
        synopsis="[key=value ...]",
        line="the same job on a running cluster; prints its id",
        overrides=True,
        first="cluster=ray",
        text="""\
The same overrides as train. Code and configuration travel to the cluster; the corpus and the run's folder are the
cluster's. The job's id alone is printed to standard output.

  farspan submit cluster.address=http://HEAD:8265 cluster.workers=16
  farspan logs JOB --follow
""",
    ),
    "status": Verb(
        function="launch.commands.jobs:status",
        synopsis="JOB|RUN [cluster.address=http://HOST:8265]",
        line="step, tokens, loss, rate, time left, last checkpoint, restarts",
        text="""\
Of a job on a cluster, or of a run's folder here. The address is otherwise what RAY_ADDRESS says.

  farspan status first cluster.address=http://HEAD:8265
""",
    ),
    "logs": Verb(
        function="launch.commands.jobs:logs",
        synopsis="JOB [--follow] [cluster.address=http://HOST:8265]",
        line="what a job has said",
        text="""\
--follow goes on to the job's end.

  farspan logs first --follow
""",
    ),
    "stop": Verb(
        function="launch.commands.jobs:stop",
        synopsis="JOB|RUN [cluster.address=http://HOST:8265]",
        line="save a checkpoint, then end",
        text="""\
A job, or a run here, ends after the step that it is in, with a checkpoint to go on from.

  farspan stop first
  farspan submit resume=first
""",
    ),
    "list": Verb(
        function="launch.commands.jobs:list_",
        synopsis="[cluster.address=http://HOST:8265]",
        line="the jobs of a cluster",
        text="""\
  farspan list cluster.address=http://HEAD:8265
""",
    ),
    "template": Verb(
        function="launch.commands.template:template",
        synopsis="[key=value ...]",
        line="what starts the machines of a cluster, for a scheduler such as Slurm",
        overrides=True,
        text="""\
The same overrides as train, with a cluster that has a template. Prints a file to hand to the cluster's own scheduler.

  farspan template cluster=slurm cluster.workers=16 cluster.template.nodes=2 train.tokens=1e9 > job.sh; sbatch job.sh
  farspan template cluster=kuberay cluster.template.image=IMAGE cluster.template.claim=CLAIM > job.yaml
  farspan template cluster=ray_up cluster.template.head_ip=HOST > cluster.yaml
""",
    ),
    "generate": Verb(
        function="launch.commands.generate:generate",
        synopsis="RUN [prompt=TEXT] [prompt_file=FILE] [tokens=300] [temperature=0.8] [top_p=1] [stop=TEXT] [seed=0] "
        "[samples=1] [weights=average] [cluster.workers=1]",
        line="continue prompts from a run's newest checkpoint",
        text="""\
A token at a time, as it comes, with constant memory per token in the recurrent layers. prompt=, prompt_file= (a file
that is one prompt) and stop= may be given several times; several prompts are continued together. A text ends before the
first of the stops. samples: continuations of each prompt. cluster.workers: processes that read a long prompt together,
a part of it each. weights=average: those that train.average kept.

  farspan generate runs/first prompt="def main(" tokens=500 temperature=0.5 top_p=0.9
  farspan generate runs/first prompt="class " prompt="import " stop='["\\n\\n", "\\ndef "]'
  farspan generate runs/first prompt_file=book.txt cluster.workers=2
""",
    ),
    "evaluate": Verb(
        function="launch.commands.evaluate:evaluate",
        synopsis="RUN [evaluate.parts=[loss,needle]] [cluster.workers=2] [key=value ...]",
        line="held-out loss by source, length, position; needles, recall, long range",
        text="""\
Of the newest checkpoint: what held-out documents cost by source, by length and by position, whether a needle is found
by depth and length, what can be recalled and copied, and what far context is worth. A table, and results.json with
pictures in RUN/evaluation/. Every sequence is spread over the workers: it can be longer than one of them holds. The
configuration is the run's; cluster, parallel and evaluate are what is given here. evaluate.tasks: those of lm-eval.

  farspan evaluate runs/first
  farspan evaluate runs/first evaluate.parts=[needle,long_range] evaluate.length=65536 cluster.workers=4
  farspan evaluate runs/first data=text data.path=other_texts evaluate.parts=[loss,positions]
""",
    ),
    "import": Verb(
        function="launch.commands.convert:import_",
        synopsis="SOURCE [DEST] [extend_vocab=true] [vocabulary=N] [document=TOKEN], or --list",
        line="a model from Hugging Face's format, to go on from with init_from",
        text="""\
SOURCE is a folder with config.json and *.safetensors, of an architecture that --list names. It becomes DEST, a run
of no steps (default: runs/ and the name of SOURCE), one stretch of a tensor after another. The model and its tokenizer
come with it. Rows for more tokens than the folder has, on request: each is the mean of those that there are.

  farspan import --list
  farspan import models/Qwen3-30B-A3B-Base runs/qwen
  farspan train init_from=runs/qwen data.tokenizer=runs/qwen data=text data.path=my_texts data.max_length=65536
""",
    ),
    "export": Verb(
        function="launch.commands.convert:export",
        synopsis="RUN DEST [max_shard=5GB] [dtype=fp32|bf16|fp16]",
        line="a checkpoint in Hugging Face's format, for transformers and whatever reads it",
        text="""\
RUN is a run, whose newest checkpoint is taken, or a checkpoint. DEST gets safetensors, config.json with the length that
the run trained at, and the tokenizer. A model that none of the architectures can express is refused, with the reason.

  farspan export runs/first hub/first
  python -c 'from transformers import AutoModelForCausalLM as M; print(M.from_pretrained("hub/first"))'
""",
    ),
    "doctor": Verb(
        function="launch.commands.doctor:doctor",
        synopsis="[run.dir=FOLDER] [cluster.address=ADDRESS]",
        line="what this machine has, and whether it works",
        text="""\
Devices, cores and their instruction sets, memory, torch and its backends, the packages that farspan needs and those
that it can use, the speed of the disk where runs are written, and whether a Ray answers at an address. Each is tried,
not looked up: ok, missing, or broken and why. Exit code 0: the default job can run here.

  farspan doctor run.dir=/scratch/runs cluster.address=http://HEAD:8265
""",
    ),
    "completion": Verb(
        function="launch.commands.completion:completion",
        synopsis="SHELL",
        line="completion of verbs, keys and values by the shell",
        text="""\
Prints a script for the shell to read: bash, zsh or fish.

  eval "$(farspan completion bash)"            in ~/.bashrc; the same for zsh, in ~/.zshrc
  farspan completion fish | source             in ~/.config/fish/config.fish
""",
    ),
}


def usage() -> str:
    """All verbs, on one screen."""
    heads = {
        name: f"{name} [overrides]" if verb.overrides else f"{name} {verb.synopsis.partition('[')[0]}"
        for name, verb in VERBS.items()
    }
    lines = "\n".join(f"  farspan {heads[name]:<23}{verb.line}" for name, verb in VERBS.items())
    return f"""\
farspan trains hybrid linear-attention / softmax / mixture-of-experts language models on long sequences.

{lines}

farspan VERB --help says more; with overrides, --cfg prints the configuration that they make.
farspan --version says which one this is.
Example:  farspan train experiment=smoke cluster=none run.name=first
"""


def help_of(name: str, overrides: list[str]) -> str:
    """A verb's help; of one that describes a run, also the groups, their options, and each section's keys."""
    verb = VERBS[name]
    synopsis = f"farspan {name} {verb.synopsis}" + (" [--cfg]" if verb.overrides else "")
    synopsis = textwrap.fill(synopsis, 110, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
    return f"{synopsis}\n\n{verb.text}" + (_choices(overrides) if verb.overrides else "")


def _choices(overrides: list[str]) -> str:
    """The groups with their options, and the keys with the values that they have under the chosen ones."""
    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    tree, placed = files.written(given)
    lines = ["", "Groups and their options, the chosen ones in brackets:"]
    for group, options in sorted(files.groups().items(), key=lambda item: [*placed, item[0]].index(item[0])):
        if group in placed:
            lines += _wrapped(f"{group}=", [f"[{o}]" if o == placed[group] else o for o in options])
        else:
            places = [name.partition("@")[2] for name in placed if name.startswith(f"{group}@")]
            lines += _wrapped(f"{group}@PLACE=", [*options, f"(PLACE: {', '.join(places)})" if places else ""])
    lines += ["", "Keys and the values that they have there:"]
    lines += _wrapped("", [f"{key}={files.flow(value)}" for key, value in tree.items() if not isinstance(value, dict)])
    for section, node in tree.items():
        if isinstance(node, dict):
            lines += _wrapped(f"{section}.", [_key(k, v) for k, v in node.items() if not k.startswith("_")])
    lines += ["", "docs/configuration.md has every key, what it means and what it accepts."]
    return "\n".join(lines) + "\n"


def _key(key: str, value: object) -> str:
    """A key with its value; the keys of an object one by one, but of objects by name only the names."""
    if not isinstance(value, dict) or not value:
        return f"{key}={files.flow(value)}".replace(", ", ",")
    if all(isinstance(child, dict) for child in value.values()):
        return " ".join(f"{key}.{name}.…" for name in value)
    return " ".join(_key(f"{key}.{name}", child) for name, child in value.items() if not name.startswith("_"))


def _wrapped(head: str, words: list[str]) -> list[str]:
    text = textwrap.wrap(" ".join(words), _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
    return [f"{f'  {head} ' if i == 0 else '':<{_INDENT}}{line}" for i, line in enumerate(text)]
