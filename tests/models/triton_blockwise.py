"""FP8 in blocks by Triton without a GPU. `python -m tests.models.triton_blockwise` holds codes, scales and the three
products of a linear layer to the emulation in PyTorch, by Triton's interpreter, and prints the errors; `… compile`
compiles the kernels for sm_90 and prints what ptxas says of each. In processes of their own: Triton chooses its
interpreter when it is imported."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = [  # tokens, inputs, outputs
    (1, 1, 1), (1, 128, 128), (3, 5, 7), (16, 64, 128), (17, 128, 1), (31, 129, 2), (33, 127, 65), (64, 256, 128),
    (65, 255, 129), (70, 130, 64), (127, 1, 63), (128, 128, 128), (129, 200, 130), (130, 384, 31), (2, 300, 257),
    (200, 60, 140), (257, 33, 129), (96, 513, 16), (5, 128, 300), (140, 257, 66),
]  # fmt: skip


def errors(shape, dtype):
    """Codes and scales that differ from the emulation's, and the relative errors of y, dx and dW."""
    import torch

    from models.kernels import blockwise_triton as kernels
    from models.kernels.low_precision import Codes, encode, product
    from models.recipes import RECIPES

    T, K, N = shape
    draw = torch.Generator().manual_seed(T * K + N)
    x, w, g = (torch.randn(*s, generator=draw) for s in ((T, K), (N, K), (T, N)))
    x[::7] *= 1e4
    x[-1] = 0
    x, w, g = (t.to(dtype) for t in (x, w, g))
    recipe, codes, products = RECIPES["fp8_blockwise"], 0, []
    for pair, matrices in (
        (recipe.forward, (x, w)),
        (recipe.input_gradient, (g, w.T)),
        (recipe.weight_gradient, (g.T, x.T)),
    ):
        got, want = [], []
        for matrix, scaling in zip(matrices, pair, strict=True):
            want.append(encode(matrix, scaling))
            got.append(kernels.encode(matrix, scaling.rows > 1))
            codes += int((got[-1][0].view(torch.uint8) != want[-1].codes.view(torch.uint8)).sum())
            codes += int((got[-1][1] != want[-1].scale).sum())
        y = kernels.product(*got[0], *got[1], pair.second.rows, torch.float32)
        wanted = product(*(Codes(c.codes, c.scale.double(), c.scaling) for c in want), torch.float64)
        products.append(((y - wanted).norm() / wanted.norm().clamp_min(1e-3)).item())
    return [codes, *products]


def of_a_layer():
    """The relative errors of y, dx and dW of a layer that follows the recipe by the kernels; without tokens too."""
    import torch

    from models.recipes import RECIPES, LowPrecision

    draw, found = torch.Generator().manual_seed(5), []
    x, w, g = (torch.randn(*s, generator=draw) for s in ((70, 130), (60, 130), (70, 60)))
    for natively in (True, False):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = LowPrecision(RECIPES["fp8_blockwise"], natively).linear(a, b)
        y.backward(g)
        assert LowPrecision(RECIPES["fp8_blockwise"], natively).linear(a[:0], b).shape == (0, 60)
        found.append((y.detach(), a.grad, b.grad))
    return [((got - want).norm() / want.norm()).item() for got, want in zip(*found, strict=True)]


def not_finite():
    """Says which scales are numbers, where one value of a share is none; of rows and of a square."""
    import torch

    from models.kernels import blockwise_triton as kernels

    x = torch.ones(3, 256)
    x[0, 5], x[1, 200] = torch.inf, torch.nan
    return [kernels.encode(x, square)[1].isfinite().tolist() for square in (False, True)]


def compiled():
    """Returns what ptxas says of each kernel on sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from models.kernels import blockwise_triton as kernels

    rows, tiles = {"BLOCK": kernels.BLOCK}, {"TILE_M": kernels.TILE_M, "TILE_N": kernels.TILE_N}
    variants = {
        "encode rows": (kernels.encode_kernel, rows | {"ROWS": kernels.ROWS, "SQUARE": False}, 4),
        "encode squares": (kernels.encode_kernel, rows | {"ROWS": kernels.BLOCK, "SQUARE": True}, 8),
        "product, weights": (kernels.product_kernel, rows | tiles | {"SHARED": kernels.BLOCK}, 4),
        "product, rows": (kernels.product_kernel, rows | tiles | {"SHARED": 1}, 4),
    }
    kinds = (
        dict.fromkeys("MNKR", "i32") | dict.fromkeys(("along_r", "along_k"), "i32") | dict.fromkeys("ab", "*fp8e4nv")
    )
    kinds |= {"codes": "*fp8e4nv"} | dict.fromkeys(("scale", "a_scale", "b_scale"), "*fp32")
    said = {}
    for name, (kernel, fixed, warps) in variants.items():
        types = {each: "constexpr" if each in fixed else kinds.get(each, "*bf16") for each in kernel.arg_names}
        even = {
            (kernel.arg_names.index(each),): [["tt.divisibility", 16]] for each in types if types[each] != "constexpr"
        }
        source = ASTSource(kernel, types, fixed, even)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_text(made.asm["ptx"])
            command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", f"{folder}/kernel.cubin"]
            ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        wgmma = "wgmma" in made.asm["ptx"]
        said[name] = [made.metadata.shared, wgmma, " ".join(ran.stderr.split())]
    return said


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        print(json.dumps(compiled()))
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        import torch

        found = {"float32": [errors(shape, torch.float32) for shape in SHAPES]}
        half = [errors(SHAPES[8], torch.float16)]
        print(json.dumps({**found, "float16": half, "finite": not_finite(), "layer": of_a_layer()}))
