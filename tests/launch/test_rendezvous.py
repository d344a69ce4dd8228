"""The numbers of Ray's workers: by machine, whatever Ray's own are. Two gloo ranks play them, without Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from launch.cluster import rendezvous
from launch.world.job import Job

MACHINES = ["127.0.0.2", "127.0.0.1"]  # of Ray's rank 0, and of its rank 1


def _entered(folder: str, together: bool) -> dict[str, Any]:
    """This process's number in the world of Ray's workers, where it was Ray's worker of its rank, and what it found."""
    import ray.train
    import ray.train.collective
    import ray.util

    ours = dist.get_rank()

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        dist.destroy_process_group()  # Ray's workers have none before
        return box[0]

    here = 2 if together else 1
    context = SimpleNamespace(
        get_world_rank=lambda: ours,
        get_world_size=lambda: 2,
        get_local_world_size=lambda: here,
        get_local_rank=lambda: ours if together else 0,
    )
    machine = 0 if together else ours
    runtime = SimpleNamespace(get_node_id=lambda: f"node-{machine}")
    job = Job("tests.launch.entries:add", {}, 2, Path(folder), "cpu", 1, address="auto")
    with (
        patch.object(ray.train, "get_context", lambda: context),
        patch.object(ray.train.collective, "broadcast_from_rank_zero", broadcast),
        patch.object(ray.util, "get_node_ip_address", lambda: MACHINES[machine]),
        patch.object(ray, "get_runtime_context", lambda: runtime),
    ):
        rank, host, port, keeper = rendezvous.enter(job, Path(folder) / "members.json")
    total = torch.tensor([10.0 ** dist.get_rank() * (ours + 1)])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    found = {name: os.environ[name] for name in names}
    return {"rank": rank, "host": host, "keeper": keeper, "sum": total.item(), "pid": os.getpid(), "found": found}


@pytest.mark.dist
@pytest.mark.parametrize("together", [False, True], ids=["two machines", "one machine"])
def test_workers_are_numbered_by_machine_and_meet_at_the_first_of_rays(run, tmp_path, together):
    """On two machines in the order of their addresses, which here is not Ray's; on one by the place there."""
    ray_first, ray_second = run(2, _entered, str(tmp_path), together)
    assert (ray_first["rank"], ray_second["rank"]) == ((0, 1) if together else (1, 0))
    assert {each["keeper"] for each in (ray_first, ray_second)} == {ray_first["rank"]}  # whose process has the store
    host = "127.0.0.1" if together else MACHINES[0]
    here = "2" if together else "1"
    for each in (ray_first, ray_second):
        local = str(each["rank"]) if together else "0"
        assert each["host"] == host and each["sum"] == (21 if together else 12)
        assert list(each["found"].values()) == [str(each["rank"]), "2", local, here, host, "1"]
    members = json.loads((tmp_path / "members.json").read_text())
    in_order = sorted((ray_first, ray_second), key=lambda each: each["rank"])
    assert [member["pid"] for member in members] == [each["pid"] for each in in_order]
    assert [member["ray_rank"] for member in members] == ([0, 1] if together else [1, 0])
    assert [member["address"] for member in members] == ([host, host] if together else MACHINES[::-1])
