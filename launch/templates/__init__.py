"""Clusters that do not run yet, as text: one file a kind of machine room, each a class that validates and renders.

What a rendered job runs is `farspan train` again, with `cluster=ray` and where that Ray is. What the template's own
keys have said by then (which machines, how many workers) is given explicitly; the user's other words travel as they
were written.

HOMES: the module of each class that a configuration names as `launch.templates.NAME`.
"""

import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import yaml

from launch.cluster.placement import Node
from train.run_config import RunConfig

HOMES = {
    "KubeRay": "launch.templates.kuberay",
    "RayUp": "launch.templates.ray_up",
    "Slurm": "launch.templates.slurm",
}
PATH = "cluster.template"  # where the keys of these classes are in a configuration
LINE = r"[^\x00-\x1f\x7f]+"  # text that stays on its line


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Machines of one kind.

    gpus_per_node: GPUs of each machine; 0 where the workers are to run on cores. cpus_per_node: cores of each machine.
    """

    gpus_per_node: int = 8
    cpus_per_node: int = 64

    def __post_init__(self) -> None:
        at_least("gpus_per_node", self.gpus_per_node, 0)
        at_least("cpus_per_node", self.cpus_per_node, 1)

    def names(self) -> list[str]:
        """The machines in the order in which ranks will be placed on them."""
        raise NotImplementedError

    def device(self, wanted: str) -> str:
        """Returns what `cluster.device` comes to on these machines. Raises ValueError for CUDA without a GPU."""
        if wanted == "cuda" and not self.gpus_per_node:
            raise ValueError(f"cluster.device=cuda: {PATH}.gpus_per_node=0; accepts auto or cpu")
        return "cuda" if wanted != "cpu" and self.gpus_per_node else "cpu"

    def nodes_planned(self, device: str = "auto") -> list[Node]:
        """The machines that there will be, with one worker a GPU or, on CPUs, one a core."""
        slots = self.gpus_per_node if self.device(device) == "cuda" else self.cpus_per_node
        return [Node(name, name, slots) for name in self.names()]

    def render(self, config: RunConfig, overrides: list[str]) -> str:
        """The file to hand to the machine room, for a run's configuration and its words (see `own_words`)."""
        raise NotImplementedError

    def cluster_words(self, config: RunConfig, address: str | None) -> list[str]:
        """`cluster.*` of the rendered command: what the configuration and these machines have settled."""
        cluster = config.cluster
        words = ["cluster=ray", *([f"cluster.address={address}"] if address else [])]
        words += [f"cluster.workers={cluster.workers}", f"cluster.device={self.device(cluster.device)}"]
        words += [f"cluster.restarts={cluster.restarts}"]
        optional = ("threads", "timeout")
        given = {name: getattr(cluster, name) for name in optional}
        return words + [f"cluster.{name}={value}" for name, value in given.items() if value is not None]


def own_words(overrides: list[str], *dropped: str) -> list[str]:
    """The words that travel: all but those of the cluster section, and of the keys in `dropped`."""
    return [word for word in overrides if key_of(word).split(".")[0] != "cluster" and key_of(word) not in dropped]


def key_of(word: str) -> str:
    """`run.dir` of ++run.dir=here, `mixer` of mixer@model.blocks.gla.mixer=gla."""
    return word.lstrip("+~").split("=")[0].split("@")[0]


def command(*words: str) -> str:
    """Words as a shell reads them back."""
    return shlex.join(words)


def commented(*lines: str) -> str:
    """Lines of a comment, in shell and in YAML; whatever they hold, nothing of it leaves the comment."""
    return "".join(f"# {part}".rstrip() + "\n" for line in lines for part in line.splitlines() or [""])


def as_yaml(value: dict[str, Any]) -> str:
    """YAML in the order of the keys, texts of several lines as such."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, without its marks for what occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def at_least(key: str, value: int, least: int) -> None:
    """Raises ValueError naming the key."""
    if value < least:
        raise ValueError(f"{PATH}.{key}={value}: must be at least {least}")


def matching(key: str, value: Any, pattern: str, accepts: str) -> str:
    """The value as text, if the pattern matches all of it. Raises ValueError naming the key and what it accepts."""
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(pattern, text):
        raise ValueError(f"{PATH}.{key}={' '.join(text.split())}: expected {accepts}")
    return text


def on_lines(key: str, lines: list[str] | None) -> list[str]:
    """A list of shell lines. Raises ValueError naming the one that is not a line."""
    return [matching(f"{key}[{i}]", line, LINE, "one line of shell") for i, line in enumerate(lines or [])]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
