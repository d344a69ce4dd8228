"""The checks of `tests.benchmarks.gpu`: numbers of a device against references on the CPU in fp64."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from launch.config.compose import composed
from models.axes import initialise
from models.kernels import conv, norm, registry
from models.kernels.fla import CALLS
from models.kernels.packed_attention import attend_pieces
from models.kernels.pieces import Piece
from models.linear import Linear
from models.recipes import NATIVE, RECIPES, LowPrecision, native
from models.sequence import Whole
from tests.models.rules import EXAMPLES, KINDS, ORACLES
from tests.parity import Sample
from train.loss import sums
from train.metrics.timing import matmul_peak
from train.run_config import RunConfig

LIBRARIES = ("torch", "triton", "fla-core", "flash-linear-attention", "flash-attn", "torchao", "transformer-engine")
SEED = 1
GIB = 2**30


@dataclass
class Row:
    """A line of the table. ok: of a check, whether it holds; None of a figure."""

    part: str
    name: str
    value: str
    wanted: str = ""
    ok: bool | None = None


@dataclass
class Bench:
    """The device, the sizes, the seconds that are left, and the rows that were found."""

    device: str
    tiny: bool
    end: float
    rows: list[Row] = field(default_factory=list)
    part: str = ""
    rate: float = 0.0  # FLOP/s of a plain matmul in bf16
    took: dict[int, float] = field(default_factory=dict)  # seconds of the hybrid's step, by the sequence's tokens
    longest: int = 0  # tokens of a sequence that the hybrid has been trained on

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def half(self) -> torch.dtype:
        """The dtype of kernels in 16 bits; on CPUs, whose kernels are references, fp32."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def check(self, name: str, error: float, most: float) -> None:
        """Notes a relative error, and whether it is at most `most`; one that is no number is not."""
        self.rows.append(Row(self.part, name, f"{error:.2e}", f"at most {most:g}", bool(error <= most)))

    def figure(self, name: str, value: str, aim: str = "") -> None:
        self.rows.append(Row(self.part, name, value, aim and f"aim: {aim}"))

    def seconds(self, run: Callable[[], object], rounds: int = 5) -> float:
        """The median of some runs, after one that is not counted; the device has finished in each."""
        times = []
        for turn in range(1 if self.tiny else rounds + 1):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            if turn or self.tiny:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def apart(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in fp64 on the CPU."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def machine(bench: Bench) -> None:
    """Notes what is here, and the rate of plain matmuls that later figures are shares of."""
    for library in LIBRARIES:
        try:
            bench.figure(library, version(library))
        except PackageNotFoundError:
            bench.figure(library, "not installed")
    if bench.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        bench.figure("device", f"{properties.name}, {properties.major}.{properties.minor}")
        bench.figure("memory", f"{properties.total_memory / GIB:.0f} GiB")
    bench.rate = matmul_peak(bench.device, bench.half, seconds=0.05 if bench.tiny else 1.0)
    bench.figure("bf16 matmul", f"{bench.rate / 1e12:.3g} TFLOP/s")


def kernels(bench: Bench) -> None:
    """Holds scans, attention, norms and convolutions, values and gradients, to their definitions in fp64."""
    for rule in list(CALLS)[:: 3 if bench.tiny else 1]:
        _scan(bench, rule)
    for window in (None, 32):
        _attention(bench, window)
    draw = torch.Generator().manual_seed(SEED)
    x, w = (torch.randn(*shape, generator=draw).double() for shape in ((2, 50, 64), (64,)))
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    got = norm.rms_norm(x.float().to(bench.device), w.float().to(bench.device), 1e-5)
    bench.check("rms norm, fp32", apart(got, wanted), 1e-5)
    taps, positions = torch.randn(4, 64, generator=draw).double(), torch.cat((torch.arange(20), torch.arange(27)))
    wanted = torch.zeros(2, 47, 64, dtype=torch.float64)
    for j in range(4):
        wanted += torch.where((positions >= j)[:, None], x[:, 3 - j : 50 - j], 0.0) * taps[j]
    inputs = (x.float(), taps.float(), None, positions.expand(2, -1))
    got = conv.conv(*(None if i is None else i.to(bench.device) for i in inputs), silu=False)  # type: ignore[arg-type]
    bench.check("short convolution, fp32", apart(got, wanted), 1e-5)


def _scan(bench: Bench, rule: str) -> None:
    """One rule in two documents, entered with a state: against the token loop of its paper."""
    T = 40 if bench.tiny else 200
    starts = torch.zeros(2, T, dtype=torch.bool)
    starts[:, T // 3] = True
    xs = [x.to(bench.half) for x in EXAMPLES[rule](T, decay=0.3)]
    more = {"gla": (24,), "kda": (24,), "gdn2": (24, 24, 26)}.get(rule, ())
    widths = (24, 24, 26, *more)  # Triton's products are 16 wide at least
    xs[: len(widths)] = [nn.functional.pad(x, (0, width)) for x, width in zip(xs, widths, strict=False)]
    state = 0.3 * torch.randn(2, 2, 32, 32, generator=torch.Generator().manual_seed(SEED))

    def results(run: Callable[..., tuple[Tensor, Tensor]], device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in xs]
        entered = state.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        out, last = run(leaves, starts.to(device), entered)
        return [out, last, *torch.autograd.grad(out.sum() + last.sum(), [*leaves, entered])]

    def streamed(leaves: list[Tensor], starts: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
        begun = KINDS[rule].begin(*leaves, starts=starts)
        return begun.finish(entered), KINDS[rule].act(begun.effect, entered)

    def loop(leaves: list[Tensor], starts: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
        return ORACLES[rule](*leaves, starts=starts, state=entered)

    pairs = zip(results(streamed, bench.device, bench.half), results(loop, "cpu", torch.float64), strict=True)
    kernel = registry.chosen(rule, torch.device(bench.device), bench.half, 32).name
    most = 1e-4 if bench.half == torch.float32 else 3e-2
    bench.check(f"{rule} by {kernel}, values and gradients", max(apart(*pair) for pair in pairs), most)


def _attention(bench: Bench, window: int | None) -> None:
    """Packed documents against a mask over all pairs of tokens."""
    counts, draw = (40, 1, 87), torch.Generator().manual_seed(SEED)
    T, bounds = sum(counts), [0, *accumulate(counts)]
    q, k, v = (torch.randn(1, T, heads, 32, generator=draw).to(bench.half) for heads in (4, 2, 2))
    place = torch.arange(T)
    document = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    back = place[:, None] - place
    seen = (document[:, None] == document) & (back >= 0) & (back < (window or T))

    def mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) * 32**-0.5
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_pieces(q, k, v, [[Piece(a, b, 0) for a, b in pairwise(bounds)]], [0], window=window)

    both = []
    for run, device, dtype in ((packed, bench.device, bench.half), (mask, "cpu", torch.float64)):
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        both.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    most = 1e-4 if bench.half == torch.float32 else 3e-2
    of = "attention" if window is None else f"attention, window {window}"
    bench.check(f"{of}, values and gradients", max(map(apart, *both)), most)


def models(bench: Bench) -> None:
    """Holds loss and gradients of whole models to the CPU in fp64, and a loss in bf16 to within one in a hundred."""
    names = ("linear_moe_tiny", "kimi_linear_tiny", "qwen3_next_tiny", "mamba2_tiny", "rwkv7_tiny", "llama_tiny")
    sample = Sample((50, 1, 77))
    tokens, targets, positions = (torch.from_numpy(x)[None] for x in (sample.tokens, sample.targets, sample.positions))

    def result(config: RunConfig, device: str, master: torch.dtype, compute: torch.dtype) -> list[Tensor]:
        """The loss, and every parameter's gradient."""
        model = initialise(config.model.build().to(master), SEED).to(device)
        model.compute = compute
        loss = sums(model(tokens.to(device), Whole.of(positions.to(device)), targets.to(device))).cross_entropy
        loss.backward()
        return [loss, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())]

    for name in names[: 1 if bench.tiny else len(names)]:
        config = composed([f"model={name}", *(["model.dim=32", "model.layers=2"] if bench.tiny else [])])
        want = result(config, "cpu", torch.float64, torch.float64)
        got = result(config, bench.device, torch.float32, torch.float32)
        joined = (torch.cat([x.double().cpu().flatten() for x in several[1:]]) for several in (got, want))
        bench.check(f"{name}, loss, fp32", apart(got[0], want[0]), 1e-5)
        bench.check(f"{name}, gradients, fp32", apart(*joined), 1e-3)
        half = result(config, bench.device, torch.float32, torch.bfloat16)
        bench.check(f"{name}, loss, bf16", apart(half[0], want[0]), 1e-2)
        if bench.left < 5:
            return


def recipes(bench: Bench) -> None:
    """Holds the device's products of codes to emulated ones, and times a layer of 8B's width by each recipe."""
    tokens, K, N = (64, 32, 48) if bench.tiny else (8192, 4096, 14336)
    layer = Linear(K, N, axes=(None, None)).to(bench.device)
    nn.init.normal_(layer.weight, std=K**-0.5)
    x = torch.randn(tokens, K, device=bench.device, dtype=bench.half, requires_grad=True)
    g = torch.randn(tokens, N, device=bench.device, dtype=bench.half)

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, layer.weight], g)]

    plain = bench.seconds(step)
    bench.figure(f"{K:,} to {N:,}, {tokens:,} tokens, bf16", f"{plain * 1e3:.2f} ms")
    aims = {"fp8_rowwise": "1.1", "fp8_tensorwise": "1.2"}
    for name in NATIVE[bench.device]:
        if not native(name, bench.device):
            bench.figure(name, "no product of codes on this device")
            continue
        ways = []
        for natively in (True, False):
            layer.low = LowPrecision(RECIPES[name], natively)
            ways.append(step())
        bench.check(f"{name}, products of codes", max(map(apart, *ways)), 1e-2)
        layer.low = LowPrecision(RECIPES[name], True)
        bench.figure(f"{name} over bf16", f"{plain / bench.seconds(step):.2f}", aims.get(name, ""))
