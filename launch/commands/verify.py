"""`farspan verify`: a layout, shrunk, against one process: right, or the first tensor, layer and axis that part."""

import sys
import time
from dataclasses import replace

from launch.errors import UserError
from launch.preflight.check import check_run
from launch.preflight.configure import configure
from launch.preflight.refusals import refusals
from launch.verify.shrink import Shrunk, shrink
from launch.world.spawn import warm
from parallel.schedule.mesh import Mesh
from train.engines.refusals import plain
from train.run_config import RunConfig


def verify(arguments: list[str]) -> int:
    """Prints the verdict. Returns 0 where the layout is right, 1 where it is wrong. Raises UserError."""
    began = time.monotonic()
    config = configured(arguments)
    warm("train.build", "train.verify.world")
    shrunk = checked(config)
    from launch.verify.proof import blame, both

    print("\n".join(_head(shrunk)), flush=True)
    held, ranks = both(shrunk)
    if isinstance(ranks, str):
        print(f"wrong       the layout does not run: {ranks}")
        return 1
    worst = ranks.worst
    if ranks.first is None:
        print(
            f"right       {ranks.compared:,} tensors; worst: {worst.place}, by {worst.error:.1e} of its norm, which is "
            f"{worst.excess:.1e} of what rounding may ({time.monotonic() - began:.0f} s)"
        )
        return 0
    first = ranks.first
    print(
        f"wrong       {first.place}: differs by {first.error:.1e} of its norm on rank {first.rank}, {first.excess:.1e} "
        f"times what rounding may"
    )
    print(f"layer       {_layer(shrunk, first.place.suspect)}", flush=True)
    wrong = blame(shrunk, held, first.place.step + 1, lambda line: print(line, file=sys.stderr))
    axes = (" and " if wrong.alone else " × ").join(wrong.axes)
    print(f"axis        {axes or 'none: one rank alone differs from the plain model'}")
    for option in wrong.options:
        print(f"option      right without {option}")
    return 1


def configured(arguments: list[str]) -> RunConfig:
    """The configuration that the overrides describe, or that of a run with the overrides on top. Raises UserError."""
    run = arguments[0] if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "~")) else None
    if run is None:
        return configure(arguments)
    try:
        return configure([f"resume={run}", *arguments[1:]])
    except UserError as error:
        raise UserError(str(error).replace("resume=", "RUN=", 1)) from None


def checked(config: RunConfig) -> Shrunk:
    """The small run, after every check of the large one that needs neither its machines nor its data. Raises
    UserError."""
    if not plain(config):
        raise UserError("engine: must be fsdp with farspan verify, which reads every gradient, in fp64")
    if config.optimizer.get("fused") == "apex":
        config = replace(config, optimizer=config.optimizer.having(fused="none"))
    elsewhere = replace(config.cluster, kind="ray", address="auto")  # its size says nothing of this machine
    config = replace(config, cluster=elsewhere, resume=None, init_from=None, stages=())
    if config.train.init_weights != "raw":
        config = replace(config, train=replace(config.train, init_weights="raw"))
    check_run(config, lambda line: None, device="cpu", data_here=False)
    with refusals(config):
        shrunk = shrink(config)
    with refusals(shrunk.config):
        check_run(shrunk.config, lambda line: None, device="cpu", data_here=False)
    return shrunk


def _head(shrunk: Shrunk) -> list[str]:
    config, model = shrunk.config, shrunk.config.model
    mesh = Mesh(**shrunk.sizes)
    return [
        f"verify      {mesh}: {config.cluster.workers} processes beside one, in fp64",
        f"model       {model['layers']} layers ({', '.join(model['pattern'])}) of width {model['dim']}, "
        f"{config.data['sequences']} sequences of {config.data['length']} tokens or fewer a step",
        *(f"{'' if i else 'instead':<12}{line}" for i, line in enumerate(shrunk.notes)),
    ]


def _layer(shrunk: Shrunk, layer: str | None) -> str:
    if layer is None or int(layer.partition(".")[2]) == shrunk.config.model["layers"]:
        return "none: it is the work of what stands outside of the layers"
    kind = shrunk.config.model["pattern"][int(layer.partition(".")[2])]
    mixer = shrunk.config.model["blocks"][kind]["mixer"]["_target_"].rpartition(".")[2]
    return f"{layer}, of kind {kind} ({mixer})"
