"""The order of a pipeline rank's work, as torch's schedules have it.

1f1b: each rank alternates forward and backward passes (PipeDream-Flush, 2006.09503), so that it holds the activations
of as many micro-steps as there are ranks behind it. interleaved: the same with several stages a rank, which cuts the
bubble by their number and sends as many more messages (2104.04473). zero_bubble: a backward pass in two, for inputs and
for weights, of which the second waits until there is nothing else to do (ZB-H1, 2401.10241).
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from parallel.schedule.stages import Action, idle

SCHEDULES = {
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
}
HALVES = ("zero_bubble",)  # the schedules that take a backward pass in two
KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def scheduled(name: str, stages: Sequence[Any], micro_steps: int) -> Any:
    """torch's schedule of these stages of a rank. Gradients are summed, and each stage knows its loss itself."""
    from torch.distributed.pipelining import schedules  # takes a second, and launchers read this file

    several = stages[0] if name == "1f1b" else list(stages)
    return getattr(schedules, SCHEDULES[name])(
        several, micro_steps, loss_fn=lambda output, target: None, scale_grads=False
    )


def orders(name: str, ranks: int, stages: int, micro_steps: int) -> Mapping[int, Sequence[Action]]:
    """The computations of each rank in turn, without a process group."""
    if name == "1f1b":  # the table that torch makes of it is not what it does
        return {rank: _one_forward_one_backward(rank, ranks, micro_steps) for rank in range(ranks)}
    held = [
        SimpleNamespace(stage_index=s, num_stages=stages, group_size=ranks, group_rank=0, submod=None)
        for s in range(0, stages, ranks)
    ]
    orders = scheduled(name, held, micro_steps).pipeline_order
    return {
        rank: [Action(KINDS[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions if a]
        for rank, actions in orders.items()
    }


def _one_forward_one_backward(rank: int, ranks: int, micro_steps: int) -> list[Action]:
    ahead = min(micro_steps, ranks - rank)
    actions = [Action("F", rank, m) for m in range(ahead)]
    for m in range(micro_steps):
        actions.append(Action("B", rank, m))
        if m + ahead < micro_steps:
            actions.append(Action("F", rank, m + ahead))
    return actions


def bubble(name: str, ranks: int, costs: Sequence[tuple[float, float]], micro_steps: int) -> float:
    """The share of a step that ranks wait for others, on average, were messages free. costs: see `idle`."""
    waits = idle(orders(name, ranks, len(costs), micro_steps), costs)
    return sum(waits) / len(waits)
