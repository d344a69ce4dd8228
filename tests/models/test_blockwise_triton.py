"""FP8 in blocks by Triton, on the CPU by Triton's interpreter against the emulation in PyTorch; and compiled for a GPU
that is not there."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.triton_blockwise import SHAPES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def ran(*arguments):
    command = [sys.executable, "-m", "tests.models.triton_blockwise", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_codes_equal_the_emulation_bit_for_bit_and_products_to_fp32_at_odd_shapes():
    said = ran()
    assert len(said["float32"]) == len(SHAPES) == 20
    for shape, (codes, *products) in zip([*SHAPES, SHAPES[8]], [*said["float32"], *said["float16"]], strict=True):
        assert codes == 0, shape
        assert max(products) <= 1e-6, shape
    assert max(said["layer"]) <= 1e-6
    rows, squares = said["finite"]
    assert rows == [[False, True], [True, False], [True, True]] and squares == [[False, False]]


@pytest.mark.slow
def test_kernels_compile_for_sm_90_without_spilling():
    said = ran("compile")
    assert len(said) == 4
    for kernel, (shared, wgmma, words) in said.items():
        assert "0 bytes spill stores, 0 bytes spill loads" in words, (kernel, words)
        assert int(re.search(r"Used (\d+) registers", words)[1]) <= 168, (kernel, words)
        assert shared <= 48 << 10 and wgmma == kernel.startswith("product"), (kernel, shared)
