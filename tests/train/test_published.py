"""Folders of Hugging Face's read as checkpoints: by whom, and in how much memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.hub import tensors
from tests import published_folder
from train.checkpoints import checkpoint
from train.checkpoints.hf_reader import Published
from train.instantiate import construct

STREAM = """
import sys
from pathlib import Path
from train.checkpoints.hf_convert import take
from train.checkpoints.hf_reader import Published

def high():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

peaks = []
for name in ("small", "large"):
    take(Published(Path(sys.argv[1]) / name), Path(sys.argv[1]) / "runs" / name, {}, lambda parameter: None)
    peaks.append(high())
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak of memory from")
def test_an_import_holds_no_more_than_one_and_a_half_of_its_largest_shard(tmp_path):
    """Several shards; the peak of a fresh process above what it had after a small import."""
    large = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16, "vocab_size": 8192, "head_dim": 64}
    published_folder.write(tmp_path / "small", published_folder.MOE)
    published_folder.write(tmp_path / "large", published_folder.MOE | large, longest=30_000_000)
    files = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) >= 5 and sum(files) > 4 * max(files)
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path)],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout.split()[-1])
    print(f"{sum(files):,} bytes in {len(files)} files of at most {max(files):,}: {peak:,} more at the peak")
    assert peak <= 1.5 * max(files), f"{peak:,} for files of at most {max(files):,}"


def read_by_rank(folder):
    """A rank fills its part of the parameters; how many bytes it has read, and whether all ranks' are the folder's."""
    from parallel.mesh import everyone

    found, read, honest = Published(folder), [], tensors.rows

    def counted(stored, start, number):
        value = honest(stored, start, number)
        read.append(value.nbytes)
        return value

    with torch.device("meta"):
        model = construct(found.model)
    engine = construct({"_target_": "train.engines.FSDP"})
    model = engine.prepare(model, everyone(torch.device("cpu")), seed=0, dtype=torch.float32)
    tensors.rows = counted
    checkpoint.load(folder, model, None)
    tensors.rows = honest
    got = {name: p.full_tensor() for name, p in model.named_parameters()}
    total = sum(p.nbytes for p in got.values())
    return sum(read) / total, all(torch.equal(got[n], found.read(n, 0, s[0])) for n, s in found.shapes.items())


@pytest.mark.dist
def test_each_rank_reads_its_own_rows(run, tmp_path):
    folder = published_folder.write(tmp_path / "folder", published_folder.MOE, longest=20_000)
    for share, equal in run(2, read_by_rank, folder):
        assert share < 0.51 and equal
