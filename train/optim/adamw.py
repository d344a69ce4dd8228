"""AdamW (1711.05101), its update of a weight in one pass where there is a kernel for that."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from models.precision import wide
from parallel.shards import ByParts, local
from train.optim.apex_adam import Apex, fused_adam
from train.optim.build import refined
from train.optim.random_rounding import adamw_step, is_rounded, zeros
from train.optim.width import TransferName, base_of

FusedStep = Literal["auto", "torch", "apex", "none"]
FUSED = get_args(FusedStep)
HAVE_FUSED = ("cpu", "cuda")  # devices of torch's fused kernel


class AdamW(torch.optim.AdamW):
    """lr: the largest learning rate, which the schedule multiplies. betas: decay rates of the running means of the
    gradient and of its square. eps: added to the root of the mean square, which divides the mean. weight_decay: a step
    takes this times its rate off a weight; never off norms, biases and other vectors (A_log, dt_bias). no_decay: names
    of axes (embed, heads, kv_heads, groups, ffn, vocab, expert) whose weights do not decay either; null for none.
    rates: factors of the learning rate, by name of an axis, for the weights that have it; null for none. transfer:
    width gives every weight the rate that its axes ask for, and head and routers the start, in a model of another width
    than the one that lr suits (docs/optimizers.md); none does not. base_width: dim of that one; null without transfer.
    amsgrad: true divides by the largest mean square so far instead of the last (1904.09237); apex's kernel cannot.
    fused: the kernel that updates all of a weight in one pass; torch: torch's, on CPUs and NVIDIA's GPUs; apex:
    FusedAdam of NVIDIA's apex, on a GPU where it is installed, in fp32; none: an operator at a time; auto: torch where
    there is a kernel, else none, so that installing a package changes no run. true and false are torch and none.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        no_decay: list[str] | None = None,
        rates: dict[str, float] | None = None,
        transfer: TransferName = "none",
        base_width: int | None = None,
        amsgrad: bool = False,
        fused: FusedStep | bool = "auto",
    ):
        if isinstance(fused, bool):
            fused = "torch" if fused else "none"
        if fused not in FUSED:
            raise ValueError(f"optimizer.fused={fused}: must be one of {', '.join(FUSED)}")
        if fused == "apex" and amsgrad:
            raise ValueError("optimizer.amsgrad=true: must be false with optimizer.fused=apex")
        base = base_of(transfer, base_width)
        groups = refined(params, no_decay=no_decay or (), rates=rates, base_width=base, weight_decay=weight_decay)
        every = [p for group in groups for p in group["params"]]
        kernel = fused == "torch" or fused == "auto" and all(p.device.type in HAVE_FUSED for p in every)
        settings: dict[str, Any] = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, **settings, amsgrad=amsgrad, fused=True if kernel else None)
        self.apex = Apex(self.param_groups, self._apex(every)) if fused == "apex" else None

    @staticmethod
    def _apex(parameters: list[torch.Tensor]) -> Any:
        """The kernel's class. Raises ValueError where it cannot be had for these."""
        if any(p.dtype == torch.float64 for p in parameters):
            raise ValueError("optimizer.fused=apex: must be torch or none with precision=fp64, which FusedAdam has not")
        fused = fused_adam()
        if fused is None:
            raise ValueError("optimizer.fused=apex: NVIDIA's apex is not installed here (from source, not from PyPI)")
        return fused

    def check(self, device: str) -> None:
        """Raises ValueError where the kernel asked for does not run on `device`."""
        if self.apex is not None and device != "cuda":
            raise ValueError(f"optimizer.fused=apex: must be auto, torch or none where weights are on the {device}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        rounded = {p: grad for p, grad in gradients.items() if is_rounded(p)}
        held = getattr(self, "found_inf", None)  # as the guard tells torch's kernels
        for p in rounded:  # which no kernel rounds at random
            p.grad = None
        if self.apex is None:
            super().step(closure)
        else:
            self.apex.step(self)
        for p, grad in rounded.items():
            p.grad = grad
        if rounded and not (held is not None and held.item()):
            for group in self.param_groups:
                for p in group["params"]:
                    if p in rounded:
                        self._step_rounded(p, group)
        return None

    @torch.no_grad()
    def _step_rounded(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """One step of a weight of 16 bits, an operator at a time, with moments as torch's step has them."""
        state, names = self.state[p], ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        if not state:
            state |= {"step": torch.tensor(0.0), **{name: zeros(p) for name in names}}
        state["step"] += 1
        mean, square, *most = (local(state[name]) for name in names)
        adamw_step(p, wide(local(p.grad)), mean, square, group, int(state["step"].item()), *most)  # type: ignore[arg-type]

    def _init_group(self, group: dict[str, Any], *lists: list[Any], **more: Any) -> bool:
        """Gathers what torch's kernel updates, this rank's parts of it: an element's update needs no other. Given whole
        tensors of many ranks, torch would look for the placement of the kernel's result first, half a second long."""
        with ByParts():  # of states, which are zero
            is_complex: bool = super()._init_group(group, *lists, **more)
        for tensors in lists:
            tensors[:] = [local(x) for x in tensors]
        return is_complex
