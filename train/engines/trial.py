"""Trials of engines on this machine: one step of two parameters, held against plain torch. For a process of its own."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from train.engines.deepspeed import DeepSpeed, load
from train.engines.flat import FlatOptimizer
from train.engines.megatron import wrap
from train.engines.zero import ZeroOptimizer

Wrap = Callable[[nn.Module, torch.device], FlatOptimizer]
RATE, LARGEST = 0.1, 1.0


def _deepspeed(model: nn.Module, device: torch.device) -> FlatOptimizer:
    package, plain = load(device), torch.optim.AdamW(model.parameters(), lr=RATE)
    engine, *_ = package.initialize(
        model=model, optimizer=plain, config=DeepSpeed().options(1), dist_init_required=False
    )
    return ZeroOptimizer(engine, model, 1)


def _megatron(model: nn.Module, device: torch.device) -> FlatOptimizer:
    return wrap(model, torch.optim.AdamW(model.parameters(), lr=RATE))


WRAPS: dict[str, Wrap] = {"deepspeed": _deepspeed, "megatron": _megatron}


def step(name: str) -> str:
    """Takes a step by the engine of this name and returns a line on it. Raises what the engine raises, and
    ArithmeticError where a weight is not what torch alone gives."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # as in a run on one machine: a host's own name may be unknown
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    models = []
    for engine in (None, name):
        torch.manual_seed(0)
        model = nn.Linear(1, 1, device=device)
        models.append(model)
        if engine is None:
            optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
            model(torch.ones(1, 1, device=device)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST)
        else:
            stepping = optimizer = WRAPS[engine](model, device)
            stepping.begin(True)
            stepping.backward(stepping.model(torch.ones(1, 1, device=device)).square().sum())
            stepping.clip(LARGEST)
        optimizer.step()
    want, got = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    if not torch.allclose(want, got, atol=1e-6):
        raise ArithmeticError(f"a step of two parameters gives {got.tolist()}, torch alone {want.tolist()}")
    return f"a step of two parameters is right on {device.type}"
