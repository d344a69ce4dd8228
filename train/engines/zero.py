"""DeepSpeed's ZeRO as an optimizer of ours.

To DeepSpeed all ranks are data parallel, those of one sequence too: given a mesh with a sequence dimension it
does not sum gradients over that (seen in 0.19: the ranks' weights part after one step). It averages over ranks, so each
rank's part of the loss is multiplied by their number first.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.engines.flat import FlatOptimizer, Stretch


class ZeroOptimizer(FlatOptimizer):
    """engine: DeepSpeed's, around the model and an AdamW of torch's layout. stage: 1, 2 or 3."""

    def __init__(self, engine: Any, model: nn.Module, stage: int):
        self.engine, self.stage, self.cuts_weights = engine, stage, stage == 3
        self.factor = float(dist.get_world_size())
        self.zero = engine.optimizer  # DeepSpeed's, around the one that it was given
        super().__init__(engine, model, self.zero.optimizer)

    def begin(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.waiting = True
        self.engine.backward(loss * self.factor)

    def clip(self, largest: float) -> Tensor:
        self.zero.clip_grad = largest
        return self.norm(self.engine.device)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.engine.step()
        self.waiting = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients that no step has taken, in the way in which DeepSpeed drops those that overflow."""
        if not self.waiting:
            return
        own = vars(self.zero)
        name = "_overflow_check_and_loss_scale_update" if self.stage == 3 else "check_overflow"
        put = {name: self._overflowed} | ({} if self.stage == 3 else {"check_grad_overflow": True})
        before = {key: own[key] for key in put if key in own}
        own.update(put)
        try:
            self.step()
        finally:
            own.pop(name)
            own.update(before)

    def _overflowed(self, **_: Any) -> bool:
        self.zero.overflow = True
        return True

    @torch.no_grad()
    def filled(self) -> None:
        super().filled()
        if self.stage < 3:
            return
        for part in self.stretches():
            part.parameter.ds_tensor.data[: part.length].copy_(part.of(part.stepped))  # type: ignore[attr-defined]
        if small := self.zero.persistent_parameters:  # whole on every rank all the time
            small[0].partition(small)
            small[0].all_gather(small)

    def gradients(self) -> Iterator[Tensor]:
        for i, partition in enumerate(self._partitions()):
            held = self.zero.averaged_gradients.get(i)
            if held is not None:
                yield from held
            elif partition.grad is not None:
                yield partition.grad

    def _partitions(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def stretches(self) -> Iterator[Stretch]:
        if self.stage < 3:
            for p in self.placed.parameters():
                mapping = p._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Stretch(
                        p, p.shape, here.start, self._partitions()[mapping.param_group_index], there.start, here.numel
                    )
            return
        for group, partition in zip(self.zero.fp16_groups, self._partitions(), strict=True):
            at = 0
            for p in group:
                each = p.partition_numel()  # the last rank's has padding, or is nothing else
                begin = min(each * dist.get_rank(), p.ds_numel)
                if count := min(each, p.ds_numel - begin):
                    yield Stretch(p, p.ds_shape, begin, partition, at, count)
                at += each
