"""The short convolution's Triton kernels without a GPU. `python -m tests.models.triton_conv` holds them to the PyTorch
reference by Triton's interpreter, forward and backward, and prints the errors; `… compile` compiles them for sm_90 and
prints what ptxas says of each. In processes of their own: Triton chooses its interpreter when it is imported."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = [  # spans, tokens, channels, width, document lengths
    (1, 1, 1, 4, (1,)),
    (1, 3, 5, 4, (3,)),
    (2, 16, 64, 4, (1, 15)),
    (1, 17, 63, 3, (2, 2, 13)),
    (2, 34, 65, 4, (1, 1, 1, 1, 30)),
    (1, 32, 129, 2, (32,)),
    (3, 19, 70, 1, (9, 10)),
    (1, 40, 33, 7, (5, 6, 7, 22)),
    (1, 15, 64, 4, (7, 1, 7)),
    (2, 33, 2, 5, (16, 17)),
]
CASES = [(shape, bool(silu), bool(bias)) for shape in SHAPES for silu, bias in ((1, 0), (0, 1))]  # 20


def errors(shape, silu, bias, dtype):
    """The relative errors of the outputs and of each gradient."""
    import torch

    from models.kernels import conv_triton
    from models.kernels.conv import conv

    B, T, D, W, lengths = shape
    generator = torch.Generator().manual_seed(T * D)
    sizes = ((B, T + W - 1, D), (W, D), (D,), (B, T, D))
    x, taps, b, weights = (torch.randn(*size, generator=generator) for size in sizes)
    positions = torch.cat([torch.arange(n) for n in lengths]).repeat(B, 1)
    positions[0, : lengths[0]] += 1 + W * (T % 2)  # the first span begins inside a document

    def results(run, dtype):
        leaves = [leaf.clone().requires_grad_() for leaf in (x.to(dtype), taps, *([b] if bias else []))]
        y = run(*leaves, *([] if bias else [None]), positions, silu)
        return [y, *torch.autograd.grad(y, leaves, weights.to(dtype))]

    x = x.to(dtype).float()
    weights = weights.to(dtype).float()
    got = results(conv_triton.Conv.apply, dtype)
    want = results(lambda *given: conv(*given[:-1], silu=given[-1]), torch.float32)
    assert [a.dtype for a in got[:2]] == [dtype] * 2 and all(a.dtype == torch.float32 for a in got[2:])
    return [((a.float() - b).norm() / b.norm().clamp_min(1e-3)).item() for a, b in zip(got, want, strict=True)]


def compiled():
    """Returns what ptxas says of each kernel on sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from models.kernels import conv_triton

    said = {}
    for kernel in (conv_triton.forward_kernel, conv_triton.gradient_kernel, conv_triton.input_kernel):
        fixed = {"W": 4, "BIASED": True, "SILU": True, "TOKENS": conv_triton.TOKENS, "CHANNELS": conv_triton.CHANNELS}
        kinds = dict.fromkeys(("taps", "bias", "inner", "parts"), "*fp32") | dict.fromkeys("TD", "i32")
        kinds |= {"positions": "*i64"} | dict.fromkeys(fixed, "constexpr")
        types = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
        source = ASTSource(kernel, types, {name: value for name, value in fixed.items() if name in types})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_text(made.asm["ptx"])
            command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", f"{folder}/kernel.cubin"]
            ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        said[kernel.__name__] = f"{made.metadata.shared} bytes of shared memory. " + " ".join(ran.stderr.split())
    return said


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        print(json.dumps(compiled()))
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        import torch

        fp32 = [errors(*case, torch.float32) for case in CASES]
        half = [errors(SHAPES[4], True, True, dtype) for dtype in (torch.bfloat16, torch.float16)]
        print(json.dumps({"fp32": fp32, "half": half}))
