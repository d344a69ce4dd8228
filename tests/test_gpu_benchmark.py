"""`tests.benchmarks.gpu` on a machine without a GPU: every part runs, a wrong kernel fails it, and time ends it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.modules.update(ray=None, wandb=None)
import torch
torch.set_num_threads(1)
from unittest.mock import patch
from models.kernels import norm
from tests.benchmarks import gpu
run = lambda folder, *more: gpu.main(["--device", "cpu", "--out", sys.argv[1] + folder, *more])
codes = [run("/all", "--tiny", *(part for part in gpu.PARTS if part != "run")), run("/late", "--seconds", "1", "dense")]
with patch.object(norm, "rms_norm", lambda x, w, eps: x * w):
    codes.append(run("/wrong", "--tiny", "kernels"))
with patch.dict(gpu.PARTS, machine=(lambda bench: 1 / 0, 0)):
    codes.append(run("/raises", "--tiny", "machine"))
print(codes)
"""


@pytest.mark.e2e
def test_all_parts_run_without_a_gpu_without_ray_and_without_wandb(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 1, 1]", done.stdout
    rows = {name: json.loads((tmp_path / name / "gpu.json").read_text())["rows"] for name in ("all", "wrong", "raises")}
    parts = [row["part"] for row in rows["all"] if row["name"] == "all"]
    assert parts == ["machine", "kernels", "models", "recipes", "dense", "hybrid", "recipe_steps", "memory"]
    assert sum(row["ok"] is True for row in rows["all"]) > 10
    assert [row["name"] for row in rows["wrong"] if row["ok"] is False] == ["rms norm, fp32"]
    assert rows["raises"][0]["value"].startswith("ZeroDivisionError")
    assert "| left out: " in (tmp_path / "late/gpu.md").read_text()
    assert "| holds |" in (tmp_path / "all/gpu.md").read_text()
