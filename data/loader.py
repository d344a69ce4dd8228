"""`Data`, what `conf/data/*.yaml` builds, and `Batches`, what the training loop reads."""

import hashlib
import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import CORPORA, Corpus
from data.pack import Packed, Windows
from data.store import Store, build
from data.tokenizer import Bytes


class Batches:
    """Global batches of a store: `batch_tokens // max_length` windows each, as a pure function of (seed, step).

    A document is held out if its hash, as a fraction of 2^64, is below `heldout`: the same in every run, and the same
    for all copies of it. `train_documents` and `heldout_documents`, int64, index the store. `fingerprint` (hex sha256)
    changes with anything that changes a batch or the split. Raises ValueError if the sizes do not fit each other or
    the store. `chance` is None: of text, nobody asks how much of it a guess gets right.
    """

    chance = None

    def __init__(
        self,
        store: Store,
        *,
        tokenizer: Bytes,
        batch_tokens: int,
        max_length: int,
        heldout: float,
        heldout_tokens: int,
    ) -> None:
        if batch_tokens < max_length or batch_tokens % max_length:
            raise ValueError(
                f"train.batch_tokens={batch_tokens}: expected a multiple of data.max_length={max_length}; "
                f"nearest {max(round(batch_tokens / max_length), 1) * max_length}"
            )
        self.store = store
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.size
        self.windows_per_batch = batch_tokens // max_length
        self.heldout_tokens = heldout_tokens
        is_heldout = store.hashes < np.uint64(int(heldout * 2**64))
        self.train_documents = np.flatnonzero(~is_heldout)
        self.heldout_documents = np.flatnonzero(is_heldout)
        for side, documents in (("training", self.train_documents), ("held-out", self.heldout_documents)):
            if not len(documents):
                raise ValueError(f"data.heldout={heldout}: leaves no {side} documents of the corpus' {len(store)}")
        self._train = Windows(store, self.train_documents, max_length)
        self._heldout = Windows(store, self.heldout_documents, max_length)
        key = [store.fingerprint, max_length, heldout, batch_tokens, Windows.name, Windows.version]
        self.fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def card(self) -> dict[str, Any]:
        """What a run and its checkpoints keep of their corpus: the store's card, and how it is split and cut."""
        return {
            **self.store.card,
            "max_length": self._train.max_length,
            "train_documents": len(self.train_documents),
            "heldout_documents": len(self.heldout_documents),
            "batches": self.fingerprint,
        }

    def batch(self, seed: int, step: int, skips: int = 0) -> list[Packed]:
        """The global batch of a step, `skips` batches having been skipped before it."""
        first = (step + skips) * self.windows_per_batch
        return [self._train.window(seed, first + i) for i in range(self.windows_per_batch)]

    def heldout(self) -> list[Packed]:
        """`heldout_tokens // max_length` windows (at least one, at most all), evenly spread, always the same."""
        count = min(max(self.heldout_tokens // self._heldout.max_length, 1), len(self._heldout))
        return [self._heldout.natural(i * len(self._heldout) // count) for i in range(count)]


class Data:
    """Which corpus, where its store is, and how it is cut.

    corpus: where documents come from: stdlib (the source of Python's own standard library) or text (UTF-8 files). path:
    the file of a text corpus, or its folder; null for stdlib. store: the folder of the token store; null for one in the
    user's cache, named by the corpus and its identity. max_length: tokens in a sequence. heldout: the fraction of
    documents, in (0, 1), that is never trained on. heldout_tokens: how many of their tokens an evaluation reads. Raises
    ValueError, one line that opens with the key, for a value out of range.
    """

    def __init__(
        self,
        *,
        corpus: str,
        path: str | None = None,
        store: str | None = None,
        max_length: int = 4096,
        heldout: float = 0.03,
        heldout_tokens: int = 65536,
    ) -> None:
        for key, tokens in (("max_length", max_length), ("heldout_tokens", heldout_tokens)):
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                raise ValueError(f"data.{key}={tokens}: expected a positive whole number of tokens")
        if not isinstance(heldout, float) or not 0 < heldout < 1:
            raise ValueError(f"data.heldout={heldout}: expected a fraction of documents between 0 and 1, exclusive")
        self.corpus = corpus
        self.path = path
        self.store = store
        self.max_length = max_length
        self.heldout = heldout
        self.heldout_tokens = heldout_tokens

    def check(self) -> None:
        """Raises ValueError, one line, if the corpus cannot be read or the store not written. Cheap."""
        self._source().check()
        if self.store is None:
            return
        place = Path(self.store).expanduser().absolute()
        ground = next(folder for folder in (place, *place.parents) if folder.exists())
        if not ground.is_dir():
            raise ValueError(f"data.store={self.store}: {ground} is a file; expected a folder")
        if ground != place and not os.access(ground, os.W_OK):
            raise ValueError(f"data.store={self.store}: {ground} cannot be written to")

    def prepare(self) -> Path:
        """Builds the token store, or finds it built, and returns its folder."""
        self.check()
        source = self._source()
        return build(source, Bytes(), self._folder(source)).folder

    def open(self, batch_tokens: int) -> Batches:
        """The batches of `batch_tokens` tokens each, over the store (built if it is not there)."""
        return Batches(
            Store(self.prepare()),
            tokenizer=Bytes(),
            batch_tokens=batch_tokens,
            max_length=self.max_length,
            heldout=self.heldout,
            heldout_tokens=self.heldout_tokens,
        )

    def _source(self) -> Corpus:
        if self.corpus not in CORPORA:
            nearest = get_close_matches(str(self.corpus), CORPORA, n=1, cutoff=0)[0]
            raise ValueError(f"data.corpus={self.corpus}: expected one of {', '.join(CORPORA)}; nearest {nearest}")
        return CORPORA[self.corpus](path=self.path)

    def _folder(self, source: Corpus) -> Path:
        if self.store is not None:
            return Path(self.store).expanduser()
        key = hashlib.sha256(json.dumps(source.identity(), sort_keys=True).encode()).hexdigest()[:12]
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "farspan" / f"{self.corpus}-{key}"
