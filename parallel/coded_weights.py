"""Weights that ranks gather as codes of few bits, a byte a number.

A recipe multiplies by codes of a weight, not by its numbers. Where both products that read the weight have the same
codes (`models.recipes.Recipe.weight`), every rank makes those of its own rows, and FSDP gathers bytes: a quarter of
what fp32 takes. A share of values that have one scale lies on several ranks, all of the weight in `fp8_tensorwise`. So
the ranks first agree on the largest magnitudes, all weights' in one message, at the beginning of each forward pass of
the model: weights change between steps only. Magnitudes are exact, so that every rank rounds as one process with the
whole weight does, bit for bit.

Two ranks with rows 1, -7 and 3, 2 of a weight, int8, one scale: each alone would say 7/127 and 3/127; both say 7/127,
and their codes are 18, -127 and 54, 36.

FSDP2 asks a shard for what it sends, and for what it makes of that (`fsdp_pre_all_gather`, `fsdp_post_all_gather`): the
shard of a coded weight is a subclass of torch's tensor with these two methods, and a plain tensor to all others.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.kernels.coded_weight import CodedWeight
from models.kernels.low_precision import DTYPES, Codes, Scaling, beside, cast, largest, scales
from models.precision import wide
from models.recipes import coded_layers
from parallel.activation_memory import parameter_name
from parallel.collectives import LEDGER
from parallel.liveness import HERE, Wait
from parallel.schedule.comm_volume import SCALES


class ShardOfCodes(Tensor):
    """A rank's rows of a weight of `shape`, from row `begin` on: another name of the memory of `rows` [R, K].

    scale: of the whole weight, once the ranks have agreed on it (`GatheredCodes`). Raises RuntimeError where the weight
    has changed since.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    weight_name: str
    scaling: Scaling
    shape_of_whole: torch.Size
    begin: int
    scale: Tensor | None = None
    version: int = -1

    @classmethod
    def of(cls, name: str, weight: DTensor, scaling: Scaling) -> "ShardOfCodes":
        shard: ShardOfCodes = Tensor._make_subclass(cls, weight._local_tensor)  # type: ignore[assignment]
        shard.weight_name, shard.scaling, shard.shape_of_whole = name, scaling, weight.shape
        mesh = weight.device_mesh
        shard.begin = min(len(weight), mesh.get_local_rank(mesh.ndim - 1) * shard.rows_of_a_rank(mesh.size(-1)))
        return shard

    def rows_of_a_rank(self, ranks: int) -> int:
        """The rows of the first rank, to which FSDP fills up all others."""
        return -(-self.shape_of_whole[0] // ranks)

    def magnitudes(self) -> Tensor:
        """The largest magnitude of each share of the whole weight that this rank knows of, infinite where one is not
        finite: a maximum of several ranks' may lose what is no number."""
        rows = largest(wide(self), self.scaling._replace(rows=1))
        behind = self.shape_of_whole[0] - self.begin - len(rows)
        own = largest(F.pad(rows, (0, 0, self.begin, behind)), self.scaling._replace(columns=1))
        return torch.where(own.isfinite(), own, torch.inf)

    def settle(self, magnitude: Tensor) -> None:
        """Takes the largest magnitudes over all ranks."""
        self.scale, self.version = scales(magnitude, self.scaling), self._version

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor], Tensor]:
        """This rank's codes as bytes, filled up with rows of zeros as the shards of uneven weights are."""
        if self.scale is None or self.version != self._version:
            raise RuntimeError(f"{self.weight_name}: its scales are of other weights than those that are there")
        own = beside(self.scale, self.scaling, self.shape_of_whole)
        if len(own) > 1:
            own = own[self.begin : self.begin + len(self)]
        codes = cast(wide(self) / own, self.scaling).view(torch.uint8)
        return (F.pad(codes, (0, 0, 0, self.rows_of_a_rank(mesh.size()) - len(codes))),), self.scale

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor], scale: Tensor, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[CodedWeight, tuple[Tensor, ...]] | None:
        """The weight of all ranks' bytes; `out` is the one of before, whose bytes lie where these do."""
        bytes = gathered[0][: self.shape_of_whole[0]]
        codes = Codes(bytes.view(DTYPES[self.scaling.format]), scale, self.scaling)
        if out is None:
            return CodedWeight(codes, dtype), ()
        out.codes = codes
        return None


class GatheredCodes:
    """The weights of a model that travel as codes, and how ranks come to the scales. A hook of the model's forward
    pass, before that of FSDP."""

    def __init__(self, shards: Iterable[ShardOfCodes], group: dist.ProcessGroup):
        self.shards, self.group = list(shards), group

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Makes the scales of all weights. Collective."""
        magnitudes = [shard.magnitudes() for shard in self.shards]
        message = torch.cat([each.flatten() for each in magnitudes])
        ranks = self.group.size()
        if ranks > 1:
            LEDGER.add(self.group.group_name, SCALES, 2 * (ranks - 1) * message.nbytes // ranks)
            with HERE.waiting(Wait("", SCALES, "all-reduce")):
                dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group)
        for shard, own, part in zip(
            self.shards, magnitudes, message.split([each.numel() for each in magnitudes]), strict=True
        ):
            shard.settle(part.view(own.shape))


def gather_codes(model: nn.Module) -> None:
    """Has FSDP gather the weights of these layers as codes. The model is sharded, and its weights are where they will
    stay."""
    shards: list[ShardOfCodes] = []
    for name, module, scaling in coded_layers(model):
        weight: Any = module.weight
        weight._local_tensor = ShardOfCodes.of(parameter_name(f"{name}.weight"), weight, scaling)
        shards.append(weight._local_tensor)
    if shards:
        mesh = weight.device_mesh
        group = mesh.get_group(mesh.ndim - 1)
        model.register_forward_pre_hook(GatheredCodes(shards, group), prepend=True)
