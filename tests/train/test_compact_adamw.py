"""Moments of few bits against torch's AdamW, what a round trip changes, random rounding, and ranks that hold rows."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from models.kernels.stochastic import noise, to_bf16
from train.optim.compact_adamw import CompactAdamW
from train.optim.few_bits import BLOCK, codebook, decode_moment, encode_moment

SHAPES = [(96, 70), (3, 40, 64), (64,), (5, 8)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def draws(steps: int = 4) -> list[list[torch.Tensor]]:
    """Gradients of each step; elements of one weight differ by orders of magnitude."""
    draw = torch.Generator().manual_seed(1)
    return [
        [torch.randn(s, generator=draw) * torch.randn(s, generator=draw).exp() for s in SHAPES] for _ in range(steps)
    ]


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def stepped(optimizer: torch.optim.Optimizer, parameters: list, gradients: list[list[torch.Tensor]]) -> None:
    for several in gradients:
        for p, grad in zip(parameters, several, strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("moments", "bound"), [("fp32", 1e-6), ("bf16", 1e-2), ("int8", 0.05), ("fp8", 0.1), ("int4", 0.5)]
)
def test_updates_are_those_of_torch_but_for_rounding(moments, bound):
    ours, theirs = weights(), weights()
    stepped(CompactAdamW(ours, moments=moments, **SETTINGS), ours, draws())
    stepped(torch.optim.AdamW(theirs, **SETTINGS), theirs, draws())
    for i, (got, want, begin) in enumerate(zip(ours, theirs, weights(), strict=True)):
        off = ((got - want).norm() / (want - begin).norm()).item()
        assert off <= (1e-6 if want.numel() < 4096 else bound), (i, off)
        assert moments in ("fp32", "bf16") or want.numel() < 4096 or off > 1e-4  # they do have few bits


@pytest.mark.parametrize("format", BLOCK)
@pytest.mark.parametrize("signed", [True, False])
def test_a_round_trip_through_fp32_changes_nothing(format, signed):
    """A checkpoint has moments in fp32, and a resumed run goes on bit by bit. Zeros, and blocks of zeros, stay."""
    x = torch.randn(12, 300, generator=torch.Generator().manual_seed(2)) * torch.logspace(-12, 3, 12)[:, None]
    x[3], x[5, :200], x[4, 7] = 0, 0, -1e3
    x = x if signed else x.square()
    once = encode_moment(x, format, signed=signed)
    values = decode_moment(once, format, x.shape, signed=signed)
    again = encode_moment(values, format, signed=signed)
    assert decode_moment(again, format, x.shape, signed=signed).equal(values)
    assert values.isfinite().all() and values[3].eq(0).all()
    assert once.codes.dtype is torch.uint8 and once.codes.numel() <= 12 * 512 // (2 if format == "int4" else 1)
    largest = x.view(12, -1)[:, : BLOCK[format]].abs().amax(1)
    off = (values - x)[:, : BLOCK[format]].abs().amax(1)
    assert (off <= {"int8": 0.04, "fp8": 0.07, "int4": 0.25}[format] * largest).all()


def test_codes_are_those_that_are_published():
    """8 bits: 7 powers of ten with 1 to 64 values each, of both signs, 0 and 1 (2110.02861)."""
    assert {(f, s): len(codebook(f, s)) for f in ("int8", "int4") for s in (True, False)} == {
        ("int8", True): 256,
        ("int8", False): 256,
        ("int4", True): 16,
        ("int4", False): 16,
    }
    assert codebook("int8", True)[[0, 127, 128, 255]].tolist() == pytest.approx([-0.99296875, 0, 5.5e-7, 1])
    for format, signed in (("int8", True), ("int4", False), ("fp8", True)):
        assert codebook(format, signed).diff().gt(0).all() and codebook(format, signed)[-1] == 1


def test_random_rounding_loses_no_small_updates():
    """1,000 additions of 1e-4 to 1 are 1.10, and 1.00 to the nearest."""
    nearest = random = torch.ones(2048, dtype=torch.bfloat16)
    for step in range(1000):
        nearest = (nearest.float() + 1e-4).bfloat16()
        random = to_bf16(random.float() + 1e-4, noise(7, step, 0, 2048))
    assert nearest.eq(1).all()
    assert abs(random.float().mean().item() - 1.1) < 2e-3


def test_random_bits_are_fair_and_a_function_of_the_place():
    bits = noise(1, 2, 0, 1 << 16)
    assert bits[1000:1100].equal(noise(1, 2, 1000, 100))
    assert not bits[:100].equal(noise(1, 3, 0, 100)) and not bits[:100].equal(noise(2, 2, 0, 100))
    assert bits.min() >= 0 and bits.max() < 1 << 16
    assert abs(bits.float().mean().item() / 32767.5 - 1) < 0.01
    for bit in range(16):
        assert abs((bits >> bit & 1).float().mean().item() - 0.5) < 0.01
    x = torch.tensor([1.0, -1.0, torch.inf, -torch.inf, torch.nan])
    for each in (0, 65535):
        got = to_bf16(x, torch.full((5,), each, dtype=torch.int32))
        assert got[:4].float().equal(x[:4]) and got[4].isnan()
    third = torch.full((1 << 16,), 1 + 2**-7 / 3)
    assert abs(((to_bf16(third, bits).float() - 1) * 128).mean().item() - 1 / 3) < 0.01


@pytest.mark.parametrize("moments", ["int8", "fp8", "int4", "bf16"])
def test_a_state_that_is_saved_goes_on_bit_by_bit_and_in_torchs_adamw(moments):
    whole, cut, other = weights(torch.bfloat16), weights(torch.bfloat16), weights()
    gradients = draws()
    stepped(CompactAdamW(whole, moments=moments, **SETTINGS), whole, gradients)
    first = CompactAdamW(cut, moments=moments, **SETTINGS)
    stepped(first, cut, gradients[:2])
    saved = first.state_dict()
    second = CompactAdamW(cut, moments=moments, **SETTINGS)
    second.load_state_dict(saved)
    theirs = torch.optim.AdamW(other, **SETTINGS)
    theirs.load_state_dict(saved)  # converted: there it is what torch's own would be
    assert theirs.state[other[0]]["exp_avg"].dtype is torch.float32
    stepped(theirs, other, gradients[2:])
    stepped(second, cut, gradients[2:])
    assert all(a.equal(b) for a, b in zip(whole, cut, strict=True))
    back = CompactAdamW(other, moments=moments, **SETTINGS)
    back.load_state_dict(theirs.state_dict())
    assert back.state[other[0]]["step"] == 4


@pytest.mark.parametrize("kind", [CompactAdamW, torch.optim.AdamW])
def test_state_by_names_as_a_checkpoint_has_it_is_taken_back(kind):
    model = nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 8))
    first = CompactAdamW(model.parameters(), moments="int4", **SETTINGS)
    model(torch.randn(4, 80)).square().sum().backward()
    first.step()
    saved = get_optimizer_state_dict(model, first)
    assert saved["state"]["0.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    second = kind(model.parameters(), **SETTINGS, **({"moments": "int4"} if kind is CompactAdamW else {}))
    set_optimizer_state_dict(model, second, saved)
    again = get_optimizer_state_dict(model, second)
    for name, state in saved["state"].items():
        assert all(again["state"][name][key].equal(value) for key, value in state.items()), name


def on_a_rank() -> list:
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for dtype in (torch.float32, torch.bfloat16):
        for moments in ("int8", "int4"):
            shards = [nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])) for p in weights(dtype)]
            for i, p in enumerate(shards):
                p.stream = i  # type: ignore[attr-defined]
            gradients = [[distribute_tensor(g, mesh, [Shard(0)]) for g in several] for several in draws()]
            optimizer = CompactAdamW(shards, moments=moments, **SETTINGS)
            stepped(optimizer, shards, gradients[:2])
            again = CompactAdamW(shards, moments=moments, **SETTINGS)
            again.load_state_dict(optimizer.state_dict())
            stepped(again, shards, gradients[2:])
            found += [p.full_tensor().detach().float().numpy() for p in shards]
    return found


@pytest.mark.dist
def test_shards_are_stepped_as_whole_weights_are(run):
    """Bit by bit: blocks lie within rows, and random bits belong to elements."""
    want = []
    for dtype in (torch.float32, torch.bfloat16):
        for moments in ("int8", "int4"):
            whole = weights(dtype)
            for i, p in enumerate(whole):
                p.stream = i  # type: ignore[attr-defined]
            stepped(CompactAdamW(whole, moments=moments, **SETTINGS), whole, draws())
            want += [p.detach().float().numpy() for p in whole]
    for got in run(2, on_a_rank):
        assert all((a == b).all() for a, b in zip(got, want, strict=True))
