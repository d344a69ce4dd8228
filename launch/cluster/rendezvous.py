"""The rendezvous: Ray's workers become one torch.distributed world, on one machine or many.

Ray places the workers and numbers them in the order of its own node ids, which are random. We number them by machine,
in the order of the machines' names (`launch.cluster.placement.order`), so that the ranks of a sequence-parallel group
are neighbours. They meet at a store that Ray's rank 0 opens, tell each other where they are, and take their numbers.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

from launch.cluster.placement import order
from launch.world.job import Job, TooFewDevicesError
from parallel.liveness import TIMEOUT

_SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address


def enter(job: Job, members_file: Path) -> tuple[int, str, int, int]:
    """Join the world and return the rank in it, and the store's host, its port, and the rank that keeps it.

    `members_file` gets every rank's Ray rank, address and process id.
    """
    import ray
    import torch
    import torch.distributed as dist
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context = get_context()
    ours, size = context.get_world_rank(), context.get_world_size()
    together = job.address is None or context.get_local_world_size() == size
    address = "127.0.0.1" if together else ray.util.get_node_ip_address()
    device = _device(job)
    store = _open_store(address, size) if ours == 0 else None
    host, port = broadcast_from_rank_zero([address, store.port] if store else None)
    store = store or dist.TCPStore(host, port, size, is_master=False)
    node = ray.get_runtime_context().get_node_id()
    store.set(f"member/{ours}", json.dumps([address, node, context.get_local_rank(), os.getpid()]))
    members = [json.loads(store.get(f"member/{each}")) for each in range(size)]
    ranks = order([(address, node, local) for address, node, local, _ in members])
    rank = ranks.index(ours)
    here = [each for each in ranks if members[each][1] == node]
    threads = job.threads or max(1, _cores() // len(here))
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(here.index(ours)),
        LOCAL_WORLD_SIZE=str(len(here)),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
    )
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # else gloo asks for the address of the host's name
    torch.set_num_threads(threads)
    apart = dist.PrefixStore("world", store)
    dist.init_process_group(job.backend, store=apart, rank=rank, world_size=size, device_id=device, timeout=TIMEOUT)
    if rank == 0:
        facts = ("address", "node", "local", "pid")
        replies = [{**dict(zip(facts, members[each], strict=True)), "ray_rank": each} for each in ranks]
        members_file.write_text(json.dumps(replies), encoding="utf-8")
    return rank, host, port, ranks.index(0)


def _open_store(address: str, size: int) -> Any:
    """A TCPStore that listens on `address` alone: by itself it would on every interface, and it asks for no secret."""
    import torch.distributed as dist

    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.listen(max(128, size))
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def _device(job: Job) -> Any:
    """This worker's GPU, made the current one; None on CPUs."""
    if job.device != "cuda":
        return None
    import ray.train.torch
    import torch

    if torch.cuda.device_count() < 1:
        raise TooFewDevicesError(job.workers, 0)
    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _interface(address: str) -> str | None:
    """The network interface that has an IPv4 `address` (Linux), or None."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
        if socket.inet_ntoa(reply[20:24]) == address:
            return name
    return None
