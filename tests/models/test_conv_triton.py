"""The short convolution's Triton kernels, on the CPU by Triton's interpreter against the reference in PyTorch; and
compiled for a GPU that is not there."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.triton_conv import CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def ran(*arguments):
    command = [sys.executable, "-m", "tests.models.triton_conv", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_equal_the_reference_at_odd_shapes():
    said = ran()
    assert len(said["fp32"]) == len(CASES)
    for case, errors in zip(CASES, said["fp32"], strict=True):
        assert len(errors) == 4 if case[2] else 3
        assert max(errors) <= 3e-6, case
    for errors, rounding in zip(said["half"], (4e-3, 5e-4), strict=True):  # 16 bits are rounded once, sums are in fp32
        assert max(errors[:2]) <= rounding and max(errors[2:]) <= 1e-5


@pytest.mark.slow
def test_kernels_compile_for_sm_90_without_spilling():
    said = ran("compile")
    assert len(said) == 3
    for kernel, words in said.items():
        assert "0 bytes spill stores, 0 bytes spill loads" in words, (kernel, words)
        assert int(re.search(r"Used (\d+) registers", words)[1]) <= 168, (kernel, words)
        assert int(re.match(r"\d+", words)[0]) <= 16 << 10, (kernel, words)
