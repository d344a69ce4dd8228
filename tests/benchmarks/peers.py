"""farspan beside its peers, in one table: the training step, packed documents, scans, decoding, checkpoints, the start.

    python -m tests.benchmarks.peers [rounds=5] [compile=1] [part ...]

The parts are those of PARTS; without a name, all. Each side of a row does the same work with the same shapes; the peers
are transformers without extra packages, a loop that one writes with torch alone (`tests.benchmarks.plain_torch`), and
torch's own checkpoints. The sides take turns in one process with one thread, after a round that is not counted, and the
figures are medians of processor time, so that other work on the machine costs both; checkpoints are wall time, and
say so. A ratio is the peer's over ours, the median over rounds with the least and the most. `compile=1` adds the plain
loop under torch.compile. All parts together replace their section of docs/speed.md.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.benchmarks import decoding_peers, mixers, plain_torch, saving, section, step

TITLE = "Beside peers"
DENSE = decoding_peers.LLAMA
DOCUMENTS = (1800, 900, 500, 350, 250, 150, 100, 46)  # tokens of each in a packed sequence
SCANS = (4096, 16384)
WRITTEN = 16  # tokens of a round
SAVED = 10  # million parameters
Sides = dict[str, Callable[[], float]]  # ours first: seconds of a round


class Row(NamedTuple):
    """One comparison: seconds of each side, and the peer's over ours: the median over rounds, the least, the most."""

    what: str
    peer: str
    ours_s: float
    peer_s: float
    ratio: float
    low: float
    high: float
    aim: float | None = None


def in_turn(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(rounds + 1):
        for name, side in sides.items():
            seconds = side()
            if n:
                times[name].append(seconds)
    return times


def rows(what: str, times: dict[str, list[float]], aims: dict[str, float] | None = None) -> Iterator[Row]:
    """A row for each peer, from the seconds of all sides, ours first."""
    (_, ours), *peers = times.items()
    for name, theirs in peers:
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        medians = (statistics.median(ours), statistics.median(theirs), statistics.median(ratios))
        yield Row(what, name, *medians, min(ratios), max(ratios), (aims or {}).get(name))


def clocked(run: Callable[[], object]) -> Callable[[], float]:
    """Processor seconds of a call."""

    def seconds() -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    return seconds


def our_step(model: Any, tokens: Tensor, targets: Tensor, positions: Tensor, balance: float) -> Callable[[], float]:
    from models.sequence import Whole
    from train.instantiate import construct
    from train.loss import sums

    adamw, count = construct(step.optimizer_settings())(model.parameters()), tokens.numel()

    def run() -> float:
        part = sums(model(tokens, Whole.of(positions), targets))
        return step.update(part.objective(targets=count, tokens=count, balance_weight=balance), model, adamw)

    return run


def hybrid(rounds: int, options: dict[str, int]) -> Iterator[Row]:
    for length, aim in zip(step.LENGTHS, (1.6, 2.0, 2.3), strict=True):
        sides = {"ours": clocked(step.ours(length, torch.float32))}
        sides["transformers"] = clocked(step.peer(length, torch.float32))
        yield from rows(f"hybrid, {length:,} tokens", in_turn(sides, rounds), {"transformers": aim})


def dense(rounds: int, options: dict[str, int]) -> Iterator[Row]:
    length = 1024
    text = step.text(length)
    tokens, targets = text[:, :-1], text[:, 1:]
    sides = {"ours": our_step(decoding_peers.llama(DENSE), tokens, targets, torch.arange(length)[None], 0.0)}
    theirs = decoding_peers.peer_llama(DENSE).train()
    theirs.config.use_cache = False
    aims = {"transformers": 1.1, "plain loop": 1.0, "plain loop, compiled": 1.0}
    sides["transformers"] = plain_torch.training_step(theirs, lambda: theirs(input_ids=tokens, labels=tokens).loss)
    for name in ("plain loop", "plain loop, compiled")[: 1 + options["compile"]]:
        model = plain_torch.PlainLlama(step.VOCABULARY, **DENSE)
        called = torch.compile(model) if name.endswith("compiled") else model
        sides[name] = plain_torch.training_step(model, partial(called, tokens, targets))
    runs = {name: clocked(run) for name, run in sides.items()}
    yield from rows(f"dense, {length:,} tokens", in_turn(runs, rounds), aims)


def packed(rounds: int, options: dict[str, int]) -> Iterator[Row]:
    """Unequal documents: ours end to end, transformers' in rows as long as the longest, padded."""
    text = step.text(sum(DOCUMENTS))
    tokens, targets = text[:, :-1], text[:, 1:]
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    padded = torch.zeros(len(DOCUMENTS), max(DOCUMENTS), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, document in enumerate(tokens[0].split(DOCUMENTS)):
        padded[i, : len(document)], mask[i, : len(document)] = document, 1
    labels = padded.masked_fill(mask == 0, -100)
    for name, mine, theirs, balance in (
        ("hybrid", step.ours_model(), step.peer_model(), step.BALANCE),
        ("dense", decoding_peers.llama(DENSE), decoding_peers.peer_llama(DENSE).train(), 0.0),
    ):
        theirs.config.use_cache = False
        loss = partial(_padded_loss, theirs, input_ids=padded, attention_mask=mask, labels=labels)
        sides = {"ours": clocked(our_step(mine, tokens, targets, positions, balance))}
        sides["transformers, padded"] = clocked(plain_torch.training_step(theirs, loss))
        what = f"{name}, {len(DOCUMENTS)} documents of {min(DOCUMENTS)} to {max(DOCUMENTS):,} tokens"
        yield from rows(what, in_turn(sides, rounds))


def _padded_loss(model: Any, **inputs: Tensor) -> Tensor:
    loss: Tensor = model(**inputs).loss
    return loss


def scans(rounds: int, options: dict[str, int]) -> Iterator[Row]:
    """Forward and backward on the inputs that a mixer 256 wide gives its scan, in one document."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def gated_delta(*inputs: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(*inputs)[0]

    peers: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "gated_deltanet": ("transformers", gated_delta),
        "gla": ("loop over chunks", plain_torch.gla_by_chunks),
    }
    for length in SCANS:
        for mixer, (name, peer) in peers.items():
            (run, inputs) = asked(mixer, length)
            sides = {"ours": clocked(mixers.again(run, inputs)), name: clocked(mixers.again(peer, inputs))}
            yield from rows(f"scan of {mixer}, {length:,} tokens", in_turn(sides, rounds))


def asked(mixer: str, length: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The scan that a mixer asks of one document of so many tokens, and its inputs."""
    seq: Any = mixers.Recording.of(torch.arange(length)[None])
    with torch.no_grad():
        mixers.build(mixer)(torch.randn(1, length, mixers.DIM), seq, slot="mixer")
    ((run, inputs),) = seq.asked
    return run, tuple(x.detach() for x in inputs)


def decoding(rounds: int, options: dict[str, int]) -> Iterator[Row]:
    for name in decoding_peers.MODELS:
        for context, found in decoding_peers.compare(name, rounds, WRITTEN).items():
            what = f"a token of {name} behind {context:,}"
            yield Row(what, "transformers", *found, decoding_peers.AIM)


def checkpoint(rounds: int, options: dict[str, int]) -> Iterator[Row]:
    from tests.world import run_world

    with tempfile.TemporaryDirectory() as folder:
        times = run_world(1, saving.measured, SAVED, rounds, folder, timeout=3600)[0]
    blocked = {name: [first for first, _ in pairs] for name, pairs in times.items()}
    sides = {"ours": blocked["ours, beside"], "torch, async_save": blocked["torch, async_save"]}
    aims = {"torch, async_save": 1 / saving.AIM}
    yield from rows(f"training kept by a checkpoint of {12 * SAVED} MB, wall time", sides, aims)


def start(rounds: int, options: dict[str, int]) -> Iterator[Row]:
    """Processor time of all processes of a job of one step on two ranks, without Ray; the plain loop's under FSDP2."""
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "launch.cli", "train", "experiment=smoke", "cluster=none"]
        train += ["tracking.mode=disabled", "train.tokens=4096", "data.heldout_tokens=4096"]
        plain = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        numbers = iter(range(rounds + 1))
        sides = {
            "ours": lambda: family_seconds([*train, f"run.dir={folder}/{next(numbers)}"]),
            "plain loop": lambda: family_seconds([*plain, "-m", "tests.benchmarks.plain_torch"]),
        }
        yield from rows("a job of one step", in_turn(sides, rounds))


FAMILY = """
import ctypes, os, resource, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a child leaves behind is ours to wait for
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
try:
    while True:
        os.wait()
except ChildProcessError:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
sys.exit(code)
"""


def family_seconds(command: list[str]) -> float:
    """Processor seconds of a command and of all that it starts. Linux. Raises CalledProcessError where it fails."""
    done = subprocess.run([sys.executable, "-c", FAMILY, *command], capture_output=True, text=True, check=True)
    return float(done.stdout)


PARTS: dict[str, Callable[[int, dict[str, int]], Iterator[Row]]] = {
    "hybrid": hybrid,
    "dense": dense,
    "packed": packed,
    "scans": scans,
    "decoding": decoding,
    "checkpoint": checkpoint,
    "start": start,
}


def table(found: list[Row]) -> str:
    lines = ["| | peer | ours, ms | peer, ms | ratio (range over rounds) | aim |", "|---|---|---|---|---|---|"]
    for row in found:
        aim = "" if row.aim is None else f"{row.aim:.2g}"
        lines.append(
            f"| {row.what} | {row.peer} | {1e3 * row.ours_s:,.1f} | {1e3 * row.peer_s:,.1f} | "
            f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) | {aim} |"
        )
    return "\n".join(lines)


def machine(rounds: int, began: float) -> str:
    """The sentence that says what the ratios were measured on, and that they are of that."""
    import transformers

    load = f"{began:.0f} at the begin and {os.getloadavg()[0]:.0f} at the end"
    return (
        f"`python -m tests.benchmarks.peers`: {step.cpu_name()}, {os.cpu_count()} cores, a load of {load}; torch "
        f"{torch.__version__}, transformers {transformers.__version__} without extra packages; fp32, one thread, "
        f"processor time, medians of {rounds} alternating rounds. A ratio is the peer's time over ours. Ratios depend "
        "on the CPU: one with wider vectors or a faster memory moves them, and some change sides."
    )


def main(given: list[str]) -> None:
    options = {"rounds": 5, "compile": 0}
    options |= {key: int(value) for key, value in (each.split("=") for each in given if "=" in each)}
    names = [each for each in given if "=" not in each]
    if unknown := [name for name in names if name not in PARTS]:
        raise SystemExit(f"{unknown[0]}: must be one of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.chdir(Path(__file__).resolve().parents[2])
    began, found = os.getloadavg()[0], list[Row]()
    for name in names or PARTS:
        for row in PARTS[name](options["rounds"], options):
            print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
            found.append(row)
    text = f"{machine(options['rounds'], began)}\n\n{table(found)}"
    print(text)
    if not names:
        section.write(section.SPEED, TITLE, text)


if __name__ == "__main__":
    main(sys.argv[1:])
