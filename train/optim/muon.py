"""Muon: momentum whose matrices are made orthogonal before they are applied, for hidden layers; AdamW for the rest.

Keller Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024), with the size of the update
and the weight decay of "Muon is scalable for LLM training" (2502.16982): an orthogonal M x N matrix has entries of mean
square 1 / max(M, N), so 0.2 sqrt(max(M, N)) of it is as large as what AdamW changes, and both take the same rate.

What is one matrix is what multiplies a vector: each expert's, and q, k and v, or the two halves of a SwiGLU, each by
itself although they lie in one tensor (`models.axes.Declared.parts`). A matrix is spread over all ranks by rows, and
whole on one of them while it is made orthogonal (`parallel.matrix_owners`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from models.axes import AXES
from models.footprint import LiveBytes
from models.kernels.newton_schulz import newton_schulz
from parallel.collectives import Comm
from parallel.fsdp import by_mesh
from parallel.matrix_owners import PURPOSE, MatrixCut, MatrixOwners, cuts, received, shape_here, shares
from parallel.matrix_pieces import Beside, gathered, own
from parallel.mesh import DENSE, EXPERTS
from parallel.schedule.comm_volume import Traffic
from parallel.schedule.mesh import Mesh
from parallel.shards import local
from train.optim.adamw import AdamW, FusedStep
from train.optim.build import axes, refined
from train.optim.random_rounding import is_rounded, put, zeros
from train.optim.width import TransferName, base_of

RMS = 0.2  # of the entries of AdamW's updates, as 2502.16982 has measured them (section 2.2)


class Muon(Optimizer):
    """lr: the largest learning rate, which the schedule multiplies, of matrices and of the rest. momentum: decay rate
    of the running mean of the gradient. nesterov: true mixes the gradient with that mean once more before applying it.
    steps: steps of the Newton-Schulz iteration that makes a matrix orthogonal, in bf16 on a GPU and in the weights'
    dtype on a CPU. adamw: names of axes whose matrices AdamW updates, as it does all vectors; null for vocab alone,
    that of embedding and head. betas, eps: AdamW's, for the rest. weight_decay: a step takes this times its rate off a
    weight; never off norms, biases and other vectors. no_decay: names of axes whose weights do not decay either; null
    for none. rates: factors of the learning rate, by name of an axis, for the weights that have it; null for none.
    transfer: width gives every weight the rate that its axes ask for, and head and routers the start, in a model of
    another width than the one that lr suits (docs/optimizers.md); none does not. base_width: dim of that one; null
    without transfer.
    fused: AdamW's kernel for the rest, as `optimizer=adamw` has it.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        adamw: list[str] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        no_decay: list[str] | None = None,
        rates: dict[str, float] | None = None,
        transfer: TransferName = "none",
        base_width: int | None = None,
        fused: FusedStep | bool = "auto",
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer.momentum={momentum}: must be at least 0 and below 1")
        if steps < 1:
            raise ValueError(f"optimizer.steps={steps}: must be at least 1")
        adamw = ["vocab"] if adamw is None else adamw
        if unknown := [axis for axis in adamw if axis not in AXES]:
            raise ValueError(f"optimizer.adamw={unknown[0]}: must be one of {', '.join(AXES)}")
        self.momentum, self.nesterov, self.steps = momentum, nesterov, steps
        groups, base = [], base_of(transfer, base_width)
        for group in refined(
            params,
            no_decay=no_decay or (),
            rates=rates,
            base_width=base,
            weight_decay=weight_decay,
            orthogonal=partial(is_matrix, adamw=adamw),
        ):
            several: dict[bool, list[Tensor]] = {True: [], False: []}
            for parameter in group["params"]:
                several[is_matrix(parameter, adamw)].append(parameter)
            groups += [{**group, "params": ps, "muon": muon} for muon, ps in several.items() if ps]
        rest = [group for group in groups if not group["muon"]]
        self.adamw = AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused) if rest else None
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.owners: dict[tuple[int, ...], MatrixOwners] = {}

    def check(self, device: str) -> None:
        """Raises ValueError where the kernel asked for does not run on `device`."""
        if self.adamw is not None:
            self.adamw.check(device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Collective: whoever shares the weights steps with the others."""
        if self.adamw is not None:  # its groups and its state are those here, which loading a checkpoint replaces
            for own, group in zip(self.adamw.param_groups, self._groups(muon=False), strict=True):
                own |= {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            self.adamw.state = self.state
            self.adamw.step()
        rates = {p: (group["lr"], group["weight_decay"]) for group in self._groups(muon=True) for p in group["params"]}
        for parameters in by_mesh(p for p in rates if p.grad is not None):
            directions = self._directions(parameters)
            for parameter, direction in zip(parameters, self._orthogonal(parameters, directions), strict=True):
                lr, decay = rates[parameter]
                if is_rounded(parameter):
                    state = self.state[parameter]
                    state["step"] += 1
                    value = local(parameter).to(direction.dtype).mul_(1 - lr * decay).add_(direction, alpha=-lr)
                    put(parameter, value, int(state["step"].item()))
                else:
                    local(parameter).mul_(1 - lr * decay).add_(direction, alpha=-lr)

    def _groups(self, *, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    def _directions(self, parameters: list[Tensor]) -> list[Tensor]:
        """This rank's rows of what is to be made orthogonal, the running means having taken the gradients in."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = zeros(parameter)
                if is_rounded(parameter):  # at random, by the number of the step
                    self.state[parameter]["step"] = torch.tensor(0.0)
        means = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        gradients = [local(p.grad) for p in parameters]  # type: ignore[arg-type]
        torch._foreach_lerp_(means, gradients, 1 - self.momentum)
        return list(torch._foreach_lerp(gradients, means, self.momentum)) if self.nesterov else means

    def _orthogonal(self, parameters: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        """This rank's rows of the update: of parameters that are whole here, and of those divided over tensor ranks."""
        results: list[Tensor] = list(directions)
        kinds = [Beside.of(getattr(p, "piece", None)) for p in parameters]
        ways = [None if kind is None else (kind.rows, kind.piece.pieces) for kind in kinds]
        for way in dict.fromkeys(ways):
            places = [i for i, each in enumerate(ways) if each == way]
            some, theirs = [parameters[i] for i in places], [directions[i] for i in places]
            made = self._updates(some, theirs, [kind for i in places if (kind := kinds[i]) is not None])
            for i, update in zip(places, made, strict=True):
                results[i] = update
        return results

    def _updates(self, parameters: list[Tensor], directions: list[Tensor], divided: list[Beside]) -> list[Tensor]:
        """The same of parameters that are divided in one way; divided: how each is, none of whole ones."""
        dtype = _travels(directions[0].dtype, directions[0].device.type)
        update = self._update
        key = tuple(map(id, parameters))
        if not divided:
            if key not in self.owners:
                self.owners[key] = MatrixOwners(parameters, [_cuts(p, shape_here(p)) for p in parameters])
            return self.owners[key].apply(directions, update, dtype)
        comm: Comm = parameters[0].tensor_comm  # type: ignore[attr-defined]
        if key not in self.owners:
            pairs = zip(divided, parameters, strict=True)
            self.owners[key] = MatrixOwners(parameters, [kind.matrices(shape_here(p), p.declared) for kind, p in pairs])  # type: ignore[attr-defined]
        wide = gathered(directions, divided, comm, dtype)
        made = self.owners[key].apply(wide, divided[0].through(update), dtype)
        return [x.to(d.dtype) for x, d in zip(own(made, divided, comm.rank), directions, strict=True)]

    def _update(self, x_SMN: Tensor) -> Tensor:
        return RMS * max(x_SMN.shape[1:]) ** 0.5 * newton_schulz(x_SMN, self.steps)

    def received(self, mesh: Mesh, dtype: torch.dtype, device: str) -> list[Traffic]:
        """Returns what each rank of a mesh receives in a step, of a model that is whole here or has the shapes of one
        of its tensor ranks. dtype: of master weights.

        Experts are cut over the mesh's expert ranks, and matrices whole on one of those that share the rest.
        """
        itemsize, by_rank = _travels(dtype, device).itemsize, [Traffic() for _ in range(mesh.world)]
        for shared in self._shared(mesh):
            for ranks in mesh.groups(*shared.sharing):
                each = received([shape[0] for shape in shared.shapes], shared.matrices, len(ranks), itemsize)
                for i, (rank, traffic) in enumerate(zip(ranks, each, strict=True)):
                    by_rank[rank].include(traffic)
                    if shared.beside:
                        own = sum(rows_of(shape, i, len(ranks)) for shape in shared.pieces) * itemsize
                        by_rank[rank].add(PURPOSE, (mesh.tensor - 1) * own, 1)
        return by_rank

    def temporaries(self, mesh: Mesh, dtype: torch.dtype, device: str) -> float:
        """Returns the most bytes that a step makes at a time beside weights, gradients and moments, on the first rank
        of a mesh; arguments as above. AdamW's kernel makes none."""
        most, travels = 0.0, _travels(dtype, device)
        for shared in self._shared(mesh):
            world = len(mesh.groups(*shared.sharing)[0])
            owners = MatrixOwners.of_rank([shape[0] for shape in shared.shapes], shared.matrices, 0, world)
            with LiveBytes() as live:
                rows = [shares(shape[0], world)[1] for shape in shared.shapes]
                local_shapes = [(n, *shape[1:]) for n, shape in zip(rows, shared.shapes, strict=True)]
                own = [torch.empty(shape, dtype=dtype, device="meta") for shape in local_shapes]
                owners.apply(own, self._update, travels)
            means = 0 if self.nesterov or shared.beside else sum(x.numel() * x.itemsize for x in own)  # no new tensors
            most = max(most, live.most - means)
        return most

    def _shared(self, mesh: Mesh) -> Iterator["_Shared"]:
        """The parameters that step together."""
        parameters = [p for group in self._groups(muon=True) for p in group["params"]]
        for apart, sharing, cut in ((False, DENSE, 1), (True, EXPERTS, mesh.expert)):
            ways: dict[Any, list[Tensor]] = {}
            for p in parameters:
                if apart == (mesh.expert > 1 and p.ndim == 3 and "expert" in axes(p)):
                    kind = Beside.of(getattr(p, "piece", None))
                    ways.setdefault(None if kind is None else (kind.rows, kind.piece.pieces), []).append(p)
            for way, several in ways.items():
                pieces = [(len(p) // cut, *p.shape[1:]) for p in several]
                if way is None:
                    matrices = [_cuts(p, shape) for p, shape in zip(several, pieces, strict=True)]
                    yield _Shared(sharing, pieces, pieces, matrices, False)
                    continue
                kinds = [Beside.of(p.piece) for p in several]  # type: ignore[attr-defined]
                each = [(kind, p, s) for kind, p, s in zip(kinds, several, pieces, strict=True) if kind is not None]
                matrices = [kind.matrices(shape, p.declared) for kind, p, shape in each]  # type: ignore[attr-defined]
                yield _Shared(sharing, pieces, [kind.wide(shape) for kind, _, shape in each], matrices, True)


class _Shared(NamedTuple):
    """Parameters whose matrices are made whole together. sharing: the mesh's axes of the ranks that share each. pieces:
    the shapes of what these ranks have of them; shapes: with the pieces of other tensor ranks beside, if `beside`.
    matrices: those in each."""

    sharing: Sequence[str]
    pieces: list[tuple[int, ...]]
    shapes: list[tuple[int, ...]]
    matrices: list[list[MatrixCut]]
    beside: bool


def rows_of(shape: Sequence[int], rank: int, world: int) -> int:
    """The numbers of a parameter of this shape that FSDP gives a rank."""
    begins = shares(shape[0], world)
    return (begins[rank + 1] - begins[rank]) * math.prod(shape[1:])


def _cuts(parameter: Tensor, shape: Sequence[int]) -> list[MatrixCut]:
    """The matrices that lie in it. shape: of what the ranks that share it have of it together."""
    declared, piece = parameter.declared, getattr(parameter, "piece", None)  # type: ignore[attr-defined]
    if piece is not None and piece.parts:  # and has some of the matrices of heads
        raise NotImplementedError(f"matrices of a parameter that is cut in parts {piece.parts}")
    return cuts(shape, declared.parts, declared.along)


def _travels(dtype: torch.dtype, device: str) -> torch.dtype:
    """Returns what matrices of weights of this dtype are sent, and made orthogonal, in."""
    return torch.bfloat16 if device == "cuda" and dtype == torch.float32 else dtype


def is_matrix(parameter: Tensor, adamw: list[str]) -> bool:
    """Says whether Muon takes it: a weight that decays, of two dimensions or of three with several matrices in the
    first,
    none of which is a vector, with none of these axes."""
    declared = getattr(parameter, "declared", None)
    if declared is None or not (declared.decay and declared.matrix and parameter.ndim in (2, 3)):
        return False
    if axes(parameter) & set(adamw):
        return False
    whole = getattr(parameter, "piece", parameter).shape
    return all(min(cut.shape) > 1 for cut in cuts(whole, declared.parts, declared.along))
