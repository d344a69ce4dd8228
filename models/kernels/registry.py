"""The table of rules and their kernels. The reference in PyTorch runs everywhere and is the oracle
of the others. On CUDA flash-linear-attention's take over where they exist, for what is multiplied in 16 bits: in fp32
they round to TF32, which the reference does not."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels import (
    complex_decay,
    delta,
    delta_gates,
    delta_product,
    dplr,
    elementwise,
    fla,
    gated_linear,
    lightnet,
    longhorn,
    mamba,
    mlstm,
    titans,
)
from models.kernels.chunking import Begun

Kernel = Callable[..., Begun]

REFERENCE: dict[str, Kernel] = {
    "linear": gated_linear.GatedLinearSpan,
    "simple_gla": gated_linear.GatedLinearSpan,
    "gla": gated_linear.GatedLinearSpan,
    "delta_rule": delta.DeltaSpan,
    "gated_delta_rule": delta.DeltaSpan,
    "kda": delta.DeltaSpan,
    "gdn2": delta_gates.EraseWriteSpan,
    "dplr": dplr.DPLRSpan,
    "titans": titans.TitansSpan,
    "gated_delta_product": delta_product.Product,
    "elementwise": elementwise.ElementwiseSpan,
    "longhorn": longhorn.LonghornSpan,
    "mamba": mamba.MambaSpan,
    "complex": complex_decay.ComplexSpan,
    "mlstm": mlstm.MLSTMSpan,
    "lightnet": lightnet.LightNetSpan,
}
TRITON = ("cuda",)  # devices of Triton's kernels


class KernelChoice(NamedTuple):
    name: str  # "PyTorch" or "fla"
    reason: str


def chosen(
    rule: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, width: int = fla.WIDEST
) -> KernelChoice:
    """The kernel of `rule` on `device`, and why. dtype: what it multiplies in. width: columns a head of the queries."""
    if device.type not in TRITON:
        return KernelChoice("PyTorch", f"Triton has no kernels for {device.type}")
    if rule not in fla.CALLS:
        return KernelChoice("PyTorch", "flash-linear-attention has none for packed documents of this rule")
    if dtype not in fla.HALF:
        return KernelChoice("PyTorch", f"{dtype} is not to be rounded to TF32")
    if fla.CALLS[rule].dense and width > fla.WIDEST:
        return KernelChoice("PyTorch", f"flash-linear-attention's has keys of up to {fla.WIDEST}, these have {width}")
    missing = _missing(rule)
    return KernelChoice("PyTorch", missing) if missing else KernelChoice("fla", "flash-linear-attention's, in Triton")


@cache
def _missing(name: str) -> str | None:
    """Why flash-linear-attention's kernel is not to be had here, in one line."""
    try:
        fla.function(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fla":
            return "flash-linear-attention is not installed: pip install fla-core"
        return f"flash-linear-attention does not import: {error}"
    except Exception as error:  # a Triton or a driver that does not fit raises what it likes
        first = (str(error).strip().splitlines() or [""])[0]
        return f"flash-linear-attention does not import: {type(error).__name__}: {first}"
    return None


def fused(name: str, x: Tensor) -> Callable[..., Tensor] | None:
    """flash-linear-attention's kernel for what lies between products (`fla.FUSED`) and reads an x like this; None where
    there is none: it reads 16 bits, on CUDA."""
    if x.device.type not in TRITON or x.dtype not in fla.HALF or _missing(name):
        return None
    return fla.function(name)


def kernel(rule: str, *xs: Tensor) -> Kernel:
    """The kernel of `rule` for inputs like these: `kernel(*xs, starts=, scale=)`."""
    if chosen(rule, xs[0].device, fla.multiplied_in(*xs[:3]), xs[0].shape[-1]).name == "fla":
        return partial(fla.FLASpan, rule)
    return REFERENCE[rule]
