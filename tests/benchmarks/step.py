"""A whole training step beside that of transformers' Qwen3-Next: forward, backward, clipping and AdamW.

    python -m tests.benchmarks.step [speed|memory|profile|all] [rounds]

Both sides have the same shapes and count of parameters: four layers, three of Gated DeltaNet to one of gated softmax
attention, each with a mixture of 8 experts, 2 a token, and a gated shared expert. transformers is what it is without
extra packages (torch's operators, SDPA, its default for experts), trained as its Trainer does: fused AdamW, autocast
for bf16. One thread, one process, the sides in turn, CPU time; the figures are medians over rounds. Memory is taken in
fresh processes. `all` writes what it finds to docs/speed.md.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import matmuls, section
from train.precision import native_bf16

VOCABULARY, DIM, LAYERS, HEAD = 4096, 256, 4, 64
EXPERTS, CHOSEN, HIDDEN = 8, 2, 160
LENGTHS = (1024, 4096, 8192)
BALANCE, CLIP = 0.001, 1.0
LEAN_CHUNK = 1024
CONF = Path(__file__).resolve().parents[2] / "conf"
FASTER = {"fp32": (1.3, 1.4, 1.4), "bf16": (1.5, 2.0, 2.5)}  # the aims at LENGTHS, or PEAK in fp32
PEAK, BF16_OVER_FP32, MEMORY = 0.6, 1.8, 0.5

Step = Callable[..., float]  # of the first tokens, all by default: the loss


def text(length: int) -> Tensor:
    """Tokens [1, length + 1], skewed as words are."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1.0, VOCABULARY + 1)
    return torch.multinomial(weights, length + 1, replacement=True, generator=generator)[None]


def ours_model() -> Any:
    """The model of `peer_model`, of our parts."""
    from models.axes import initialise
    from models.block import Block
    from models.lm import LM
    from models.mixers.attention import Attention
    from models.mixers.gated_deltanet import GatedDeltaNet
    from models.moe import MoE
    from models.positions import RoPE

    experts = {"num_experts": EXPERTS, "top_k": CHOSEN, "hidden": HIDDEN}
    ffn = partial(MoE, **experts, shared_hidden=HIDDEN, shared_gate=True)
    linear = partial(GatedDeltaNet, heads=4, value_heads=8, expand_k=1.0, expand_v=2.0)
    softmax = partial(
        Attention, heads=4, kv_heads=2, head_dim=HEAD, qk_norm=True, gate=True, positions=RoPE(fraction=0.25)
    )
    blocks = {name: partial(Block, mixer=mixer, ffn=ffn) for name, mixer in (("gdn", linear), ("attn", softmax))}
    pattern = ["gdn", "gdn", "gdn", "attn"]
    return initialise(LM(vocabulary=VOCABULARY, dim=DIM, layers=LAYERS, pattern=pattern, blocks=blocks), 0)


def peer_model() -> Any:
    """A small random Qwen3-Next."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=HEAD,
        linear_value_head_dim=HEAD,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
        router_aux_loss_coef=BALANCE,
        output_router_logits=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return Qwen3NextForCausalLM(config).train()


def ours(length: int, dtype: torch.dtype, *, lean: bool = False) -> Step:
    """Our training step; lean: layers are computed again in the backward pass."""
    from models.sequence import Whole
    from parallel.activation_memory import recompute
    from train.instantiate import construct
    from train.loss import sums

    model, tokens = ours_model(), text(length)
    model.compute = dtype
    if lean:
        model.loss_chunk = LEAN_CHUNK
        recompute(model.layers, "full")
    adamw = construct(optimizer_settings())(model.parameters())
    positions = torch.arange(length)[None]

    def step(count: int = length) -> float:
        part = sums(model(tokens[:, :count], Whole.of(positions[:, :count]), tokens[:, 1 : count + 1]))
        loss = part.objective(targets=count, tokens=count, balance_weight=BALANCE)
        return update(loss, model, adamw)

    return step


def optimizer_settings() -> dict[str, Any]:
    """AdamW as a run without overrides has it."""
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.load(CONF / "optimizer/adamw.yaml"))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def peer(length: int, dtype: torch.dtype, *, lean: bool = False) -> Step:
    """transformers' training step; lean: with its gradient checkpointing."""
    model, tokens = peer_model(), text(length)
    if lean:
        model.gradient_checkpointing_enable()
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(count: int = length) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens[:, :count], labels=tokens[:, :count]).loss
        return update(loss, model, adamw)

    return step


def update(loss: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def seconds(step: Step) -> float:
    """CPU seconds of a step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def speed(length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Both sides in turn, and the products of our step timed alone in the same rounds."""
    sides = {"ours": ours(length, dtype), "peer": peer(length, dtype)}
    with matmuls.Products() as products:
        sides["ours"]()
    sides["peer"]()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            times[name].append(seconds(step))
    ideal = matmuls.seconds(products.counts)
    ratios = [p / o for o, p in zip(times["ours"], times["peer"], strict=True)]
    ours_s, peer_s = (statistics.median(times[name]) for name in sides)
    return {
        "ours": length / ours_s,
        "peer": length / peer_s,
        "ratio": statistics.median(ratios),
        "spread": (min(ratios), max(ratios)),
        "peak": sum(ideal.values()) / ours_s,
        "ideal": {kind: s / ours_s for kind, s in ideal.items()},
    }


def resident(side: str, lean: bool, length: int) -> float:
    """In this process: MiB by which a step raises the peak of resident memory, the optimizer's state being there."""
    step = {"ours": ours, "peer": peer}[side](length, torch.float32, lean=lean)
    step(64)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def memory(length: int = LENGTHS[-1]) -> dict[tuple[str, bool], float]:
    """`resident` of each side, plain and lean, each in a fresh process."""
    found = {}
    for side in ("ours", "peer"):
        for lean in (False, True):
            code = "import torch; torch.set_num_threads(1); from tests.benchmarks import step; "
            code += f"print(step.resident({side!r}, {lean}, {length}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found[side, lean] = float(done.stdout.split()[-1])
    return found


def profile(length: int = 4096, rows: int = 25) -> list[tuple[str, float, int]]:
    """What our step spends its CPU time on, by operator: name, share, calls; the largest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = ours(length, torch.float32)
    step()
    with profiler(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [(e.key, e.self_cpu_time_total / total, e.count) for e in events[:rows]]


def report_speed(rounds: int) -> str:
    """The table of speeds."""
    native = native_bf16("cpu")
    lines = [
        "| dtype | tokens | ours, tokens/s | transformers | ratio (range over rounds) | aim | of the matmul peak |",
        "|---|---|---|---|---|---|---|",
    ]
    rates: dict[tuple[str, int], float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for length, aim in zip(LENGTHS, FASTER[name], strict=True):
            if name == "bf16" and not native and length > LENGTHS[0]:
                continue
            found = speed(length, dtype, rounds)
            rates[name, length] = found["ours"]
            low, high = found["spread"]
            share = ", ".join(f"{kind} {part:.0%}" for kind, part in found["ideal"].items())
            lines.append(
                f"| {name} | {length:,} | {found['ours']:,.0f} | {found['peer']:,.0f} | {found['ratio']:.2f} "
                f"({low:.2f} to {high:.2f}) | {aim} | {found['peak']:.0%} ({share}) |"
            )
            print(lines[-1], flush=True)
    middle = LENGTHS[1]
    if native:
        gain = rates["bf16", middle] / rates["fp32", middle]
        lines += ["", f"bf16 over fp32, ours, at {middle:,} tokens: {gain:.2f} (aim {BF16_OVER_FP32})."]
    else:
        lines += [
            "",
            "This CPU has no bf16 instructions: bf16 is emulated here, and says nothing of one that has them.",
        ]
    return "\n".join(lines)


def report_memory() -> str:
    """The table of memory."""
    found = memory()
    plain = found["peer", False]
    lines = ["| | MiB | of transformers' plain step |", "|---|---|---|"]
    names = {
        ("ours", False): "ours, all kept",
        ("ours", True): f"ours, recompute=full, loss in chunks of {LEAN_CHUNK:,}",
        ("peer", False): "transformers",
        ("peer", True): "transformers, gradient checkpointing",
    }
    for key, name in names.items():
        lines.append(f"| {name} | {found[key]:,.0f} | {found[key] / plain:.2f} |")
    return "\n".join(lines)


def report_profile(length: int = LENGTHS[1]) -> str:
    """Where our step's time goes, by operator."""
    lines = ["| operator | share of CPU time | calls |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {share:.1%} | {calls:,} |" for name, share, calls in profile(length, 16)])


def main(what: str = "all", rounds: int = 5) -> None:
    torch.set_num_threads(1)
    parts = []
    if what in ("all", "speed"):
        parts.append(report_speed(rounds))
    if what in ("all", "memory"):
        parts.append(
            f"Rise of resident memory over the model's and AdamW's own in a step of {LENGTHS[-1]:,} tokens, fp32, each "
            f"in a fresh process (aim for ours, at most {MEMORY}):\n\n{report_memory()}"
        )
    if what in ("all", "profile"):
        parts.append(f"Where our step at {LENGTHS[1]:,} tokens spends its time (torch.profiler):\n\n{report_profile()}")
    print("\n\n".join(parts))
    if what == "all":
        section.write(section.SPEED, "Whole step", "\n\n".join([_intro(), *parts]))


def _intro() -> str:
    import transformers

    count = sum(p.numel() for p in ours_model().parameters())
    return (
        f"`python -m tests.benchmarks.step`: forward, backward, clipping and AdamW of a model of {count / 1e6:.1f}M "
        f"parameters (three layers of Gated DeltaNet to one of gated softmax attention, {EXPERTS} experts, {CHOSEN} a "
        f"token) beside the same shapes of transformers {transformers.__version__}'s Qwen3-Next without extra "
        f"packages. {cpu_name()}, one thread, torch {torch.__version__}, CPU time, medians of alternating rounds. The "
        "matmul peak is the sum of our step's own matrix products, each timed alone in the same run, over the step's "
        f"time. Its aim is {PEAK:.0%} where the ratio misses its own."
    )


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
