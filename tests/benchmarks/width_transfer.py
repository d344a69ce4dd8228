"""The best learning rate at several widths, with `optimizer.transfer=width` and without, as a table and a picture.

    python -m tests.benchmarks.width_transfer RESULTS.jsonl [docs/images/width_transfer.png] [key=value …]

Layers of one mixer learn the bytes of Python's standard library for some steps, heads of 32 channels. Rates lie
√2 apart. At each width a walk goes downhill from the best rate at the width before (without transfer: from that over
the ratio of widths) until both neighbours are worse, by held-out loss. Each run is a line of RESULTS, which a second
call does not repeat. Keys: widths, mixers, steps, tokens (of a step), layers, seeds, optimizer (AdamW or Muon).
"""

import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models.axes import declarations, initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Whole
from train.optim.build import build_optimizer, set_rate
from train.optim.transfer import start_for_width
from train.run_config import ObjectConfig

HEAD, LENGTH, HELDOUT, STEP = 32, 64, 64, math.sqrt(2)  # channels; tokens of a row; rows; between two rates
FIRST = 2**-7  # where the walk at the base width begins
SETTINGS: dict[str, Any] = {
    "widths": "64,128,256,512",
    "mixers": "gla,gated_deltanet,mamba2,attention,moe",
    "steps": 64,
    "tokens": 128,
    "layers": 1,
    "seeds": 1,
    "optimizer": "AdamW",
}
RUN = ("steps", "tokens", "layers", "seeds", "optimizer")  # which settings a result belongs to
Key = tuple[str, bool, int, int]  # mixer, with transfer, width, exponent of the rate


def model(mixer: str, dim: int, layers: int) -> LM:
    """Layers of one kind; moe is attention with experts behind it."""
    ffn = partial(MoE, num_experts=4, top_k=2, hidden=dim) if mixer == "moe" else partial(SwiGLU, hidden=2 * dim)
    heads = dim // HEAD * (2 if mixer == "mamba2" else 1)
    options: dict[str, Any] = {"state": HEAD} if mixer == "mamba2" else {}
    made = partial(MIXERS["attention" if mixer == "moe" else mixer], heads=heads, **options)
    return LM(
        vocabulary=256, dim=dim, layers=layers, pattern=["block"], blocks={"block": partial(Block, mixer=made, ffn=ffn)}
    )


@cache
def corpus() -> np.ndarray:
    """The bytes of the standard library's modules, uint8."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(path.read_bytes() for path in files), dtype=np.uint8)


def rows(seed: int, count: int) -> torch.Tensor:
    """Places of the corpus, int64 [count, LENGTH + 1]; a hundredth of it is held out, at its end, for seed -1."""
    data, cut = corpus(), len(corpus()) * 99 // 100
    low, high = (cut, len(data)) if seed < 0 else (0, cut)
    begins = np.random.default_rng(abs(seed)).integers(low, high - LENGTH - 1, count)
    return torch.from_numpy(data[begins[:, None] + np.arange(LENGTH + 1)].astype(np.int64))


def loss_of(built: LM, batch: torch.Tensor) -> torch.Tensor:
    seq = Whole.of(torch.arange(LENGTH).expand(len(batch), -1).contiguous())
    logits = built(batch[:, :-1], seq).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def trained(mixer: str, transfer: bool, dim: int, rate: float, settings: dict[str, Any], seed: int) -> float:
    """The held-out loss of a run: a tenth of its steps warms up, then the rate falls to 0."""
    base = int(settings["widths"].split(",")[0])
    keys: dict[str, Any] = {"transfer": "width", "base_width": base} if transfer else {}
    node = ObjectConfig({"_target_": f"train.optim.{settings['optimizer']}", "_partial_": True, "lr": rate, **keys})
    built, steps = model(mixer, dim, int(settings["layers"])), int(settings["steps"])
    start_for_width(node, built)
    initialise(built, seed)
    optimizer = build_optimizer(node.build(), built, declarations(built))
    for step in range(steps):
        set_rate(optimizer, rate * min((step + 1) / max(1, steps // 10), (steps - step) / steps))
        loss_of(built, rows(1 + seed * steps + step, int(settings["tokens"]) // LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return loss_of(built, rows(-1, HELDOUT)).item()


class Study:
    """The runs that there are, in a file, and those that a walk asks for."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.found: dict[Key, float] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            run = json.loads(line)
            if run["settings"] == {k: settings[k] for k in RUN}:
                self.found[run["mixer"], run["transfer"], run["width"], run["rate"]] = run["loss"]

    def loss(self, mixer: str, transfer: bool, dim: int, exponent: int) -> float:
        """The mean over seeds at FIRST · √2^exponent; infinite where it is not a number."""
        key = mixer, transfer, dim, exponent
        if key not in self.found:
            began, rate = time.monotonic(), FIRST * STEP**exponent
            seeds = range(int(self.settings["seeds"]))
            losses = [trained(mixer, transfer, dim, rate, self.settings, seed) for seed in seeds]
            loss = float(np.mean(losses))
            self.found[key] = loss if math.isfinite(loss) else math.inf
            line = {"mixer": mixer, "transfer": transfer, "width": dim, "rate": exponent, "loss": self.found[key]}
            line |= {"settings": {k: self.settings[k] for k in RUN}}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{mixer} {transfer} {dim} {rate:.2e}: {loss:.4f} ({time.monotonic() - began:.0f} s)", flush=True)
        return self.found[key]

    def walk(self, mixer: str, transfer: bool, dim: int, begin: int) -> int:
        """The exponent of a rate whose neighbours are both worse."""
        at = begin
        while True:
            best = min((at - 1, at, at + 1), key=lambda e: self.loss(mixer, transfer, dim, e))
            if best == at:
                return at
            at = best

    def best(self, mixers: Iterable[str], widths: list[int]) -> dict[tuple[str, bool], list[int]]:
        """By mixer and transfer, the exponent of the best rate at each width."""
        chosen: dict[tuple[str, bool], list[int]] = {}
        for mixer in mixers:
            at = self.walk(mixer, False, widths[0], 0)
            chosen[mixer, True], chosen[mixer, False] = [at], [at]
        for before, dim in zip(widths, widths[1:], strict=False):
            for mixer in mixers:
                steps = round(math.log(dim / before, STEP))
                for transfer, less in ((True, 0), (False, steps)):
                    several = chosen[mixer, transfer]
                    several.append(self.walk(mixer, transfer, dim, several[-1] - less))
        return chosen


def table(chosen: dict[tuple[str, bool], list[int]], widths: list[int], study: Study) -> list[str]:
    """Markdown: the best rate at each width, by how many steps of √2 the last is from the first, and its loss."""
    lines = [f"| mixer | transfer | {' | '.join(map(str, widths))} | steps of √2 | loss at {widths[-1]} |"]
    lines.append("|---" * (len(widths) + 4) + "|")
    for (mixer, transfer), several in chosen.items():
        rates = " | ".join(f"{FIRST * STEP**e:.2g}" for e in several)
        loss = study.loss(mixer, transfer, widths[-1], several[-1])
        lines.append(
            f"| {mixer} | {'width' if transfer else 'none'} | {rates} | {several[-1] - several[0]} | {loss:.3f} |"
        )
    return lines


def draw(study: Study, mixers: list[str], widths: list[int], path: Path) -> None:
    """Held-out loss over the rate, a line a width; above without transfer, below with it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(mixers), figsize=(2.6 * len(mixers), 5), sharex=True, sharey="col")
    for column, mixer in enumerate(mixers):
        for row, transfer in enumerate((False, True)):
            panel = panels[row][column]
            for i, dim in enumerate(widths):
                kind = transfer and dim > widths[0]
                runs = {e: loss for (m, t, d, e), loss in study.found.items() if (m, t, d) == (mixer, kind, dim)}
                points = [(FIRST * STEP**e, runs[e]) for e in sorted(runs) if math.isfinite(runs[e])]
                colour = pyplot.get_cmap("viridis")(i / len(widths))
                panel.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=str(dim))
                at = min(points, key=lambda point: point[1])
                panel.plot(*at, "*", ms=10, color=colour)
            panel.set_xscale("log", base=2)
            panel.set_title(f"{mixer}, {'transfer' if transfer else 'none'}", fontsize=9)
    panels[0][0].legend(title="width", fontsize=7)
    figure.supxlabel("optimizer.lr")
    figure.supylabel("held-out loss, nats a byte")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(words: list[str]) -> None:
    results, *rest = words
    settings = SETTINGS | dict(word.split("=", 1) for word in rest if "=" in word)
    settings |= {key: int(settings[key]) for key in ("steps", "tokens", "layers", "seeds")}
    widths, mixers = [int(w) for w in settings["widths"].split(",")], settings["mixers"].split(",")
    study = Study(Path(results), settings)
    chosen = study.best(mixers, widths)
    print("\n".join(table(chosen, widths, study)))
    for picture in rest:
        if "=" not in picture:
            draw(study, mixers, widths, Path(picture))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
