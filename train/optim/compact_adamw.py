"""AdamW (1711.05101) whose moments have few bits. It would round weights of 16 bits at random; no run has such yet."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from models.kernels.stochastic import noise, to_bf16
from parallel.shards import local
from train.optim.build import refined
from train.optim.few_bits import BLOCK, FORMATS, FewBits, MomentFormat, decode_moment, encode_moment, numbers
from train.optim.width import TransferName, base_of

LEAST = 4096  # numbers of a weight whose moments are encoded: below, scales and lost digits are not worth it
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have signs


class CompactAdamW(Optimizer):
    """lr: the largest learning rate, which the schedule multiplies. moments: format of the running means, of matrices
    of 4,096 numbers or more; of all else they are fp32. int8: 8 bits in blocks of 256 (2110.02861); fp8: E4M3, a
    scale for 256; int4: 4 bits in blocks of 128 (2309.01507); bf16; fp32. betas: decay rates of the running means of
    the gradient and of its square. eps: added to the root of the mean square, which divides the mean. weight_decay: a
    step takes this times its rate off a weight; never off norms, biases and other vectors (A_log, dt_bias). no_decay:
    names of axes (embed, heads, kv_heads, groups, ffn, vocab, expert) whose weights do not decay either; null for none.
    rates: factors of the learning rate, by name of an axis, for the weights that have it; null for none. transfer:
    width gives every weight the rate that its axes ask for, and head and routers the start, in a model of another width
    than the one that lr suits (docs/optimizers.md); none does not. base_width: dim of that one; null without transfer.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        moments: MomentFormat = "int8",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        no_decay: list[str] | None = None,
        rates: dict[str, float] | None = None,
        transfer: TransferName = "none",
        base_width: int | None = None,
    ):
        if moments not in FORMATS:
            raise ValueError(f"optimizer.moments={moments}: must be one of {', '.join(FORMATS)}")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError("optimizer: lr, eps and weight_decay must not be negative, betas at least 0 and below 1")
        self.moments = moments
        base = base_of(transfer, base_width)
        groups = refined(params, no_decay=no_decay or (), rates=rates, base_width=base, weight_decay=weight_decay)
        super().__init__(groups, {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay})

    def encodes(self, p: Tensor) -> bool:
        """Says whether a weight's moments have few bits; of its whole, so that every rank says the same."""
        return self.moments != "fp32" and p.ndim > 1 and p.numel() >= LEAST

    def numbers(self, p: Tensor) -> float:
        """The moments' bits in multiples of 32."""
        return 2 * (numbers(self.moments, p.shape) if self.encodes(p) else p.numel())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return None

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        weight, state = local(p), self.state[p]
        grad = local(p.grad).to(torch.promote_types(weight.dtype, torch.float32))  # type: ignore[arg-type]
        if not state:
            state["step"] = torch.tensor(0.0)
            self._write(p, {name: torch.zeros_like(grad) for name in MOMENTS})
        state["step"] += 1
        count, (beta1, beta2) = int(state["step"].item()), group["betas"]
        mean, square = (self._read(p, name) for name in MOMENTS)
        mean = mean.lerp(grad, 1 - beta1)
        square = square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square.sqrt() / math.sqrt(1 - beta2**count)).add_(group["eps"])
        value = weight.to(grad.dtype) * (1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**count))
        if weight.dtype == torch.bfloat16:
            random = noise(getattr(p, "stream", 0), count, _begin(p), value.numel(), value.device)
            value = to_bf16(value, random.view(value.shape))
        weight.copy_(value)
        self._write(p, {"exp_avg": mean, "exp_avg_sq": square})

    def _read(self, p: Tensor, name: str) -> Tensor:
        """A moment of this rank's part, fp32 or better, a tensor that may be changed."""
        moment = self.state[p][name]
        if isinstance(moment, FewBits):
            return decode_moment(moment, self.moments, local(p).shape, signed=MOMENTS[name])
        return moment.to(torch.promote_types(moment.dtype, torch.float32))

    def _write(self, p: Tensor, moments: dict[str, Tensor]) -> None:
        for name, value in moments.items():
            if not self.encodes(p):
                self.state[p][name] = value
            elif self.moments in BLOCK:
                self.state[p][name] = encode_moment(value, self.moments, signed=MOMENTS[name])
            else:
                self.state[p][name] = value.to(torch.bfloat16)

    def reset(self, name: str) -> None:
        """Sets a moment of all weights to 0."""
        for p in self.state:
            self._write(p, {name: torch.zeros_like(self._read(p, name))})

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW has it, moments in fp32: another optimizer, format or layout goes on with them."""
        held = super().state_dict()
        numbered = dict(enumerate(p for group in self.param_groups for p in group["params"]))
        held["state"] = {
            i: {"step": state["step"], **{name: _as(numbered[i], self._read(numbered[i], name)) for name in MOMENTS}}
            for i, state in held["state"].items()
        }
        return held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        names = [name for group in state_dict["param_groups"] for name in group["params"]]  # as torch's, by their order
        own = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(names, own, strict=True):
            if name in state_dict["state"]:
                held = state_dict["state"][name]
                self.state[p] = {"step": held["step"].detach().clone().float().cpu()}
                wide = torch.promote_types(local(p).dtype, torch.float32)
                self._write(p, {key: local(held[key]).detach().to(wide, copy=True) for key in MOMENTS})


def _begin(p: Tensor) -> int:
    """The place of this rank's first element in the whole weight, of which it has rows."""
    if not isinstance(p, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return int(offset[0]) * (p.numel() // max(1, p.shape[0])) if p.ndim else 0


def _as(p: Tensor, value: Tensor) -> Tensor:
    """A tensor that lies on the ranks as a weight does."""
    if not isinstance(p, DTensor):
        return value
    return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
