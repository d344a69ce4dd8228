"""The batches of a run; its corpus is made into a store first, where it is none yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.run import rundir
from train.run_config import RunConfig

if TYPE_CHECKING:
    from data.stores.prepare import PrepareProgress, Watch


_TOLD_S = 10.0  # seconds between two lines about a corpus that a run waits for


def keep_out(section: Mapping[str, Any], key: str = "data") -> None:
    """Raises UserError for a store, a copy of one, or an index beside one that would lie in a checkpoint."""
    for name in ("store", "local"):
        value = section.get(name)
        if isinstance(value, str) and "://" not in value:
            rundir.keep_out(Path(value).expanduser(), f"{key}.{name}")
    for name, source in (section.get("sources") or {}).items():
        keep_out(source["data"], f"{key}.sources.{name}.data")


def stores(data: Any, opened: Any) -> list[tuple[str, Any, Path]]:
    """(its key, corpus, folder) of each store that `prepare` has found: of a mixture one for each source."""
    if not isinstance(opened, list):
        return [("data", data, opened)]
    sources = zip(data.sources.items(), opened, strict=True)
    return [(f"data.sources.{name}.data", portion.data, folder) for (name, portion), folder in sources]


def open_batches(config: RunConfig, vocabulary: int, say: Callable[[str], None]) -> Any:
    """The batches of a run, its corpus made into a store here where it is none yet.

    Raises ValueError for a model's `vocabulary` that is too small, before a corpus is read where that can be known.
    """
    from data.batch_ramp import opened
    from data.corpora.files import counted
    from data.stores.checks import START_S, verify
    from data.stores.store import Store

    def fits(tokens: int | None) -> None:
        if tokens is not None and vocabulary < tokens:
            raise ValueError(f"model.vocabulary={vocabulary}: the tokenizer has {tokens} tokens; must be at least that")

    keep_out(config.data.values)
    data = config.data.build()
    data.check()
    if hasattr(data, "vocabulary_size"):
        fits(data.vocabulary_size())
    if hasattr(data, "prepare"):
        for key, corpus, folder in stores(data, data.prepare(None, now_and_then(say))):
            verify(Store(folder), START_S)
            if left := corpus.left_out(folder):
                say(f"{key}: left out: {counted(left)}")
    batches = opened(data, config.train.batch_tokens, config.curriculum.build())
    fits(batches.vocab_size)
    for line in getattr(batches, "report", list)():
        say(line)
    return batches


def now_and_then(say: Callable[[str], None]) -> Watch:
    last = time.monotonic()

    def watch(progress: PrepareProgress) -> None:
        nonlocal last
        if time.monotonic() - last > _TOLD_S:
            last = time.monotonic()
            say(f"the corpus, part {progress.parts:,} of {progress.of:,}: {volume(progress)}")

    return watch


def volume(progress: PrepareProgress) -> str:
    return f"{progress.documents:,} documents, {progress.tokens:,} tokens"
