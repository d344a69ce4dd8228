"""`tests.benchmarks.gpu` on a machine without a GPU: every part runs, a wrong kernel fails it, and time ends it."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist


def _codes(out: str) -> list[int]:
    """The exit codes of the command, in a process without Ray and W&B that belongs to no world."""
    from models.kernels import norm

    dist.destroy_process_group()
    assert not {"ray", "wandb"} & sys.modules.keys()  # nothing that was imported before needs them
    with patch.dict(sys.modules, ray=None, wandb=None):
        from tests.benchmarks import gpu

        def run(folder: str, *more: str) -> int:
            return gpu.main(["--device", "cpu", "--out", f"{out}/{folder}", *more])

        codes = [run("all", "--tiny", *(part for part in gpu.PARTS if part != "run"))]
        codes.append(run("late", "--seconds", "1", "dense"))
        with patch.object(norm, "rms_norm", lambda x, w, eps: x * w):
            codes.append(run("wrong", "--tiny", "kernels"))
        with patch.dict(gpu.PARTS, machine=(lambda bench: 1 / 0, 0)):
            codes.append(run("raises", "--tiny", "machine"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return codes


@pytest.mark.dist
def test_all_parts_run_without_a_gpu_without_ray_and_without_wandb(run, tmp_path: Path):
    assert run(1, _codes, str(tmp_path), timeout=280) == [[0, 0, 1, 1]]
    rows = {name: json.loads((tmp_path / name / "gpu.json").read_text())["rows"] for name in ("all", "wrong", "raises")}
    parts = [row["part"] for row in rows["all"] if row["name"] == "all"]
    assert parts == [
        "machine",
        "kernels",
        "models",
        "recipes",
        "dense",
        "hybrid",
        "peer",
        "recipe_steps",
        "memory",
        "peer_memory",
    ]
    assert sum(row["ok"] is True for row in rows["all"]) > 10
    assert [row["name"] for row in rows["wrong"] if row["ok"] is False] == ["rms norm, fp32"]
    assert rows["raises"][0]["value"].startswith("ZeroDivisionError")
    assert "| left out: " in (tmp_path / "late/gpu.md").read_text()
    assert "| holds |" in (tmp_path / "all/gpu.md").read_text()
