"""Weights that ranks gather in few bits: as codes, a byte a number, or as the bf16 that they are kept in.

A recipe multiplies by codes of a weight, not by its numbers. Where both products that read the weight have the same
codes (`models.recipes.Recipe.weight`), every rank makes those of its own rows, and FSDP gathers bytes: a quarter of
what fp32 takes. A share of values that have one scale lies on several ranks, all of the weight in `fp8_tensorwise`. So
the ranks first agree on the largest magnitudes, all weights' in one message, at the beginning of each forward pass of
the model: weights change between steps only. Magnitudes are exact, so that every rank rounds as one process with the
whole weight does, bit for bit.

Two ranks with rows 1, -7 and 3, 2 of a weight, int8, one scale: each alone would say 7/127 and 3/127; both say 7/127,
and their codes are 18, -127 and 54, 36.

Experts' weights [E, K, N] are cut along E, and every expert has scales of its own. So a rank knows all of its experts'
magnitudes, and the message tells others of them.

FSDP2 asks a shard for what it sends, and for what it makes of that (`fsdp_pre_all_gather`, `fsdp_post_all_gather`): the
shard of such a weight is a subclass of torch's tensor with these two methods, and a plain tensor to all others.

Master weights of 16 bits (`precision.masters`) lie in such shards too. FSDP wants all weights of a unit to have one
dtype, in which it accumulates and reduces their gradients. So the parameter goes on saying fp32, and gets gradients in
fp32; only its shard, which the optimizer steps and a checkpoint holds, is bf16.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from models.kernels.coded_weight import CodedWeight, as_matrix
from models.kernels.low_precision import BF16, DTYPES, Codes, Scaling, beside, cast, largest, scales, shares
from models.recipes import GatheredWeight, gathered_weights
from parallel.activation_memory import parameter_name
from parallel.collectives import LEDGER
from parallel.liveness import HERE, Wait
from parallel.schedule.comm_volume import SCALES


class WeightShard(Tensor):
    """A rank's rows of a weight [N, K], or its experts of [E, K, N], of `shape_of_whole`, from `begin` on: another name
    of the memory that a DTensor has here. matrix, scaling: rows and columns of the whole, experts' ones below each
    other, and how that matrix is scaled. numbers: the dtype in which scales are made."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    weight_name: str
    shape_of_whole: torch.Size
    begin: int
    matrix: torch.Size
    scaling: Scaling
    numbers: torch.dtype

    @classmethod
    def of(cls, name: str, weight: DTensor, mesh: DeviceMesh, scaling: Scaling) -> "WeightShard":
        """mesh: over whose last dimension FSDP shards it. scaling: of a linear layer's weight."""
        shard: WeightShard = Tensor._make_subclass(cls, weight._local_tensor)  # type: ignore[assignment]
        rows = len(weight)
        if weight.device_mesh.ndim > mesh.ndim:  # experts that other ranks have cut before
            rows //= weight.device_mesh.size(-1)
        shard.weight_name, shard.shape_of_whole = name, torch.Size((rows, *weight.shape[1:]))
        shard.numbers = torch.promote_types(weight.dtype, torch.float32)
        matrix, shard.scaling = as_matrix(shard.shape_of_whole, scaling)
        shard.matrix = torch.Size(matrix)
        shard.begin = min(rows, mesh.get_local_rank(mesh.ndim - 1) * shard.rows_of_a_rank(mesh.size(-1)))
        return shard

    def rows_of_a_rank(self, ranks: int) -> int:
        """The rows of the first rank, to which FSDP fills up all others."""
        return -(-self.shape_of_whole[0] // ranks)

    def filled_up(self, rows: Tensor, mesh: Any) -> Tensor:
        """This rank's rows, with zeros behind as the shards of uneven weights have them."""
        missing = self.rows_of_a_rank(mesh.size()) - len(rows)
        return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows

    def whole(self, gathered: Tensor, scale: Tensor, dtype: torch.dtype, out: Any) -> Any:
        """The weight of all ranks' codes, as FSDP asks for it; `out` is the one of before, whose codes lie where these
        do."""
        codes = gathered[: self.shape_of_whole[0]].view(DTYPES[self.scaling.format]).view(self.matrix)
        if out is None:
            return CodedWeight(Codes(codes, scale, self.scaling), self.shape_of_whole, dtype), ()
        getattr(out, "_local_tensor", out).codes = Codes(codes, scale, self.scaling)
        return None


class ShardOfBF16(WeightShard):
    """A shard that is bf16, and is gathered as it is."""

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor], None]:
        return (self.filled_up(self.view(self.shape), mesh),), None

    def fsdp_post_all_gather(self, gathered: tuple[Tensor], _: None, dtype: torch.dtype, *, out: Any = None) -> Any:
        scale = torch.ones(shares(self.matrix, self.scaling), device=self.device)
        return self.whole(gathered[0], scale, dtype, out)


class ShardOfCodes(WeightShard):
    """A shard that is gathered as codes. scale: of the whole weight, once the ranks have agreed on it
    (`GatheredCodes`). Raises RuntimeError where the weight has changed since."""

    scale: Tensor | None = None
    version: int = -1

    def magnitudes(self) -> Tensor:
        """The largest magnitude of each share of the whole weight that this rank knows of, infinite where one is not
        finite: a maximum of several ranks' may lose what is no number."""
        rows = self.view(self.shape).to(self.numbers)
        if self.dim() == 3:
            each, flat = self._of_an_expert(), rows.view(-1, self.matrix[1])
            behind = self.shape_of_whole[0] - self.begin - len(self)
            own = largest(flat, self.scaling) if len(self) else flat[:, : shares(self.matrix, self.scaling)[1]]
            own = F.pad(own, (0, 0, self.begin * each, behind * each))
        else:
            own = largest(rows, self.scaling._replace(rows=1))  # a row of zeros where there is none
            own = F.pad(own, (0, 0, self.begin, self.shape_of_whole[0] - self.begin - len(own)))
            own = largest(own, self.scaling._replace(columns=1))
        return torch.where(own.isfinite(), own, torch.inf)

    def settle(self, magnitude: Tensor) -> None:
        """Takes the largest magnitudes over all ranks."""
        self.scale, self.version = scales(magnitude, self.scaling), self._version

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor], Tensor]:
        """This rank's codes as bytes."""
        if self.scale is None or self.version != self._version:
            raise RuntimeError(f"{self.weight_name}: its scales are of other weights than those that are there")
        rows = self.view(-1, self.matrix[1]).to(self.numbers)
        if self.dim() == 3:
            each = self._of_an_expert()
            own = self.scale[self.begin * each : (self.begin + len(self)) * each]
            own = beside(own, self.scaling, rows.shape)
        else:
            own = beside(self.scale, self.scaling, self.matrix)
            if len(own) > 1:
                own = own[self.begin : self.begin + len(self)]
        codes = cast(rows / own, self.scaling).view(torch.uint8).view(self.shape)
        return (self.filled_up(codes, mesh),), self.scale

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor], scale: Tensor, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        return self.whole(gathered[0], scale, dtype, out)

    def _of_an_expert(self) -> int:
        """The shares that lie below each other in an expert's rows, which shares divide."""
        return shares(self.matrix, self.scaling)[0] // self.shape_of_whole[0]


class GatheredCodes:
    """The weights of a model that ranks of `group` gather as codes, and how these come to the scales. A hook of the
    model's forward pass, before that of FSDP."""

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


def gather_in_few_bits(model: nn.Module, mesh: DeviceMesh, experts: DeviceMesh | None = None) -> None:
    """Has FSDP gather the weights of layers as their recipes say (`models.recipes.gathered_weights`), and keeps those
    that are to be bf16 so, rounded to the nearest. The model is sharded, and its weights are where they will stay.

    mesh: over whose last dimension weights are sharded. experts: the same of experts that other ranks have cut before,
    None where nobody has.
    """
    coded: dict[DeviceMesh, list[ShardOfCodes]] = {}
    for each in gathered_weights(model):
        weight: Any = getattr(each.module, each.attribute)
        over = experts if experts is not None and each.of_experts else mesh
        if each.masters:
            _keep_as_bf16(each, weight)
        kind, scaling = (
            (ShardOfBF16, Scaling(BF16, 0, 0, True)) if each.scaling is None else (ShardOfCodes, each.scaling)
        )
        shard = kind.of(parameter_name(each.name), weight, over, scaling)
        weight._local_tensor = shard
        if isinstance(shard, ShardOfCodes):
            coded.setdefault(over, []).append(shard)
    for over, shards in coded.items():
        group = over.get_group(over.ndim - 1)
        model.register_forward_pre_hook(GatheredCodes(shards, group), prepend=True)


def _keep_as_bf16(each: GatheredWeight, weight: Any) -> None:
    """Puts a bf16 shard in the place of a parameter's, whose dtype stays as it was."""
    weight._local_tensor = weight._local_tensor.to(torch.bfloat16)
    # FSDP keeps shards in memory of a size that it likes, and looks for them again where a state has been loaded.
    each.module.load_state_dict({}, strict=False)
