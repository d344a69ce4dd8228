"""AdamW (1711.05101) whose moments have few bits. Weights of 16 bits are rounded at random."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from models.precision import wide
from parallel.shards import local
from train.optim.build import refined
from train.optim.few_bits import BLOCK, FORMATS, FewBits, MomentFormat, decode_moment, encode_moment, numbers
from train.optim.random_rounding import adamw_step, as_weight
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
        grad, state = wide(local(p.grad)), self.state[p]  # type: ignore[arg-type]
        if not state:
            state["step"] = torch.tensor(0.0)
            self._write(p, {name: torch.zeros_like(grad) for name in MOMENTS})
        state["step"] += 1
        mean, square = (self._read(p, name) for name in MOMENTS)
        adamw_step(p, grad, mean, square, group, int(state["step"].item()))
        self._write(p, {"exp_avg": mean, "exp_avg_sq": square})

    def _read(self, p: Tensor, name: str) -> Tensor:
        """A moment of this rank's part, fp32 or better, a tensor that may be changed, and may be the moment itself."""
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
        for i, state in held["state"].items():
            p = numbered[i]
            held["state"][i] = {"step": state["step"], **{n: as_weight(p, self._read(p, n)) for n in MOMENTS}}
        return held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        names = [name for group in state_dict["param_groups"] for name in group["params"]]  # as torch's, by their order
        own = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(names, own, strict=True):
            if name in state_dict["state"]:
                held = state_dict["state"][name]
                self.state[p] = {"step": held["step"].detach().clone().float().cpu()}
                dtype = torch.promote_types(p.dtype, torch.float32)
                self._write(p, {key: local(held[key]).detach().to(dtype, copy=True) for key in MOMENTS})
