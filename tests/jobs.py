"""Small real jobs for tests: a text corpus, a small hybrid model, and what a launcher would order."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora.corpus import Text
from data.stores.store import build
from data.tokenizer import Bytes
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


@cache
def _stored() -> Path:
    """A folder with the corpus and its store, made once in this process: each takes a second to make."""
    folder = Path(tempfile.mkdtemp(prefix="fs-jobs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(Text(path=str(corpus(folder / "corpus"))), Bytes(), folder / "store")
    return folder


def overrides(tmp: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.path={corpus(tmp / 'corpus')}", f"data.store={tmp / 'store'}", *more]


def prepared(tmp: Path, *more: str) -> list[str]:
    """As `overrides`, with the one corpus that this process has for all, and a copy of its store."""
    shared, store = _stored(), tmp / "store"
    if not store.exists():
        shutil.copytree(shared / "store", store)
    return [*SMALL, f"data.path={shared / 'corpus'}", f"data.store={store}", *more]


def order(tmp: Path, run_dir: Path, *more: str, **rest: Any) -> dict[str, Any]:
    """What the launcher hands to `train.build`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return {"config": composed(prepared(tmp, *more)), "run_dir": str(run_dir), "device": "cpu", **rest}
