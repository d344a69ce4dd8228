"""The dtypes that a run computes in and keeps its weights in."""

import torch

NAMES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def native_bf16(device: str) -> bool:
    """Says whether `device` multiplies bf16 natively: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())  # type: ignore[attr-defined]  # before torch 2.12


def dtypes(compute: str, device: str) -> tuple[torch.dtype, torch.dtype]:
    """(compute, master) dtypes for `precision.compute` on a device."""
    if compute == "auto":
        compute = "bf16" if native_bf16(device) else "fp32"
    return NAMES[compute], torch.float64 if compute == "fp64" else torch.float32
