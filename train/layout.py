"""The options that make a run depend on its layout: all else has the same loss, in exact arithmetic, on any number of
ranks, in
any micro-batches, by any transport. docs/parallel.md has the table of every option that one may think of."""

from models.lm import LM
from models.moe import mixtures
from parallel.schedule.comm_volume import GradientFormat, KeyFormatName
from train.settings import TrainSettings


def check_experts(model: LM, ranks: int, transport: str) -> None:
    """Raises ValueError where so many ranks cannot share out the experts of every layer, or rows not travel so."""
    layers = mixtures(model)
    unlimited = [name for name, moe in layers.items() if moe.capacity_factor is None]
    if ranks > 1 and transport == "padded" and unlimited:
        raise ValueError(
            f"parallel.transport.experts=padded: must be counted, for the experts of {unlimited[0]} have no "
            "capacity_factor"
        )
    if ranks > 1 and not layers:
        raise ValueError(f"parallel.expert={ranks}: must be 1, for the model has no experts")
    for name, moe in layers.items():
        if moe.num_experts % ranks:
            raise ValueError(f"parallel.expert={ranks}: must divide the num_experts={moe.num_experts} of {name}")


def dependences(
    model: LM, train: TrainSettings, keys: KeyFormatName = "exact", gradients: GradientFormat = "high"
) -> list[str]:
    """A line for each, which opens with its key. keys, gradients: their formats between ranks."""
    lines = []
    if keys != "exact":
        lines.append(f"parallel.transport.keys={keys}: keys and values are rounded only where ranks share a sequence")
    if gradients != "high":
        lines.append(f"engine.gradients={gradients}: each rank's part of the gradients is rounded")
    limits = {moe.capacity_factor for moe in mixtures(model).values() if moe.capacity_factor is not None}
    for limit in sorted(limits):
        lines.append(f"capacity_factor={limit:g}: choices are dropped by span of tokens")
    if train.span_tokens is not None and train.span_gradient == "truncated":
        lines.append(
            f"train.span_gradient=truncated: gradients, and the experts' balance, end where the ranks of a sequence "
            f"have read train.span_tokens={train.span_tokens:,} each"
        )
    return [f"{line}, so the loss depends on the layout" for line in lines]
