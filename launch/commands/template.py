"""`farspan template`: a cluster that does not run yet, as a file for whoever starts machines."""

import sys

import yaml

from launch.cluster.placement import place
from launch.config.compose import CONF, composed, groups
from launch.errors import UserError
from launch.preflight.check import check_run
from launch.preflight.refusals import refusals
from launch.templates import Machines
from train.run_config import ObjectConfig, RunConfig


def template(overrides: list[str]) -> int:
    """Prints the file for a run and its machines. Raises UserError.

    The run is checked as far as it can be from here: its data, and what it continues from, may be on the cluster only.
    """
    config = composed(overrides)
    rendered = machines(config)
    if rendered is None:
        accepted = ", ".join(f"cluster={name}" if i == 0 else name for i, name in enumerate(_with_template()))
        raise UserError(f"cluster={_chosen(overrides)}: describes no machines; accepts {accepted}")
    with refusals(config):
        device = rendered.device(config.cluster.device)
    flight = check_run(config, lambda line: print(line, file=sys.stderr), device=device, data_here=False)
    with refusals(config):
        place(flight.cluster.workers, rendered.nodes_planned(device), flight.sizes)
        text = rendered.render(config, overrides)
    print(text, end="")
    return 0


def machines(config: RunConfig) -> Machines | None:
    """The machines that a configuration's template describes, or None. Raises UserError."""
    node = config.cluster.template
    if node is None:
        return None
    with refusals(config):
        template = ObjectConfig(node).build()
    if not isinstance(template, Machines):
        target = node.get("_target_") if isinstance(node, dict) else node
        raise UserError(f"cluster.template._target_={target}: must be a class of launch.templates")
    return template


def _with_template() -> list[str]:
    """The options of `cluster` that describe machines."""
    return [
        name
        for name in groups()["cluster"]
        if yaml.safe_load((CONF / "cluster" / f"{name}.yaml").read_text()).get("template")
    ]


def _chosen(overrides: list[str]) -> str:
    """The option of `cluster` that the words choose."""
    defaults = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    chosen = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("cluster=")]
    return chosen[-1] if chosen else next(default["cluster"] for default in defaults if "cluster" in default)
