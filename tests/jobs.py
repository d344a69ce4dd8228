"""Small real jobs for tests: a text corpus, a small hybrid model, and what a launcher would order."""

from pathlib import Path
from typing import Any

import numpy as np

from launch.config.compose import composed

# A step costs by the layer. All three kinds: HYBRID beside it.
HYBRID = ["model.layers=3", "model.pattern=[gla,gdn,attn]"]
SMALL = [
    "data=text",
    "cluster=none",
    "cluster.threads=1",  # more would spin beside other tests
    "tracking.mode=disabled",
    "model.dim=32",
    "model.layers=2",
    "model.pattern=[gla,attn]",
    "model.blocks.gla.mixer.heads=2",
    "model.blocks.gdn.mixer.heads=2",
    "model.blocks.gla.ffn.num_experts=4",
    "model.blocks.gla.ffn.hidden=16",
    "model.blocks.gla.ffn.shared_hidden=16",
    "data.max_length=96",
    "data.heldout=0.2",
    "data.heldout_tokens=192",
    "train.batch_tokens=384",
    "train.evaluate_every=null",
    "train.checkpoint_every=null",
    "train.mfu=false",
    "precision=fp32",
]


def corpus(folder: Path, documents: int = 60) -> Path:
    """Text files of every length from one byte to some thousand, with some structure to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta ", "(x)", "\n", "= "]
    for i in range(documents):
        text = " ".join(rng.choice(words, size=int(rng.pareto(1.1) * 8) % 900 + 1))
        (folder / f"{i:03}.txt").write_text(text[: max(1, len(text) - i)])
    return folder


def overrides(tmp: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.path={corpus(tmp / 'corpus')}", f"data.store={tmp / 'store'}", *more]


def order(tmp: Path, run_dir: Path, *more: str, **rest: Any) -> dict[str, Any]:
    """What the launcher hands to `train.build`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return {"config": composed(overrides(tmp, *more)), "run_dir": str(run_dir), "device": "cpu", **rest}
