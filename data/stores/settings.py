"""Settings of a store: the keys that decide how a corpus becomes one, checked, and the store itself."""

import hashlib
import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from inspect import signature
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from data.corpora.corpus import CORPORA, Prepared
from data.corpora.files import BESIDE, ON_ERROR, is_there
from data.corpora.generated import SAFE, Generated
from data.corpora.megatron import Megatron
from data.hf_tokenizer import from_file
from data.stores.fetch import StoreAddress, fetch, is_address
from data.stores.parts import Runner
from data.stores.prepare import VERSION, Watch
from data.stores.store import Store, build
from data.tokenizer import Bytes, Given, Untrained

VOCABULARY = 8192  # of a bpe, where none is asked for
_OF_A_CORPUS = (  # keys that some corpora have
    *("field", "subset", "split", "streaming", "on_error"),
    *("documents", "lengths", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class Storing:
    """The source of documents, their tokenizer and their store: the keys that `Data` has for these.

    Raises ValueError, one line that opens with the key, for a value out of range.
    """

    corpus: str | None
    path: str | None = None
    field: str = "text"
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    on_error: str = "stop"
    documents: int | None = None
    lengths: list[int] | None = None
    seed: int = 0
    tokenizer: str = "bytes"
    vocabulary: int | None = None
    document: str | None = None
    store: str | None = None
    local: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.corpus is None:  # not known yet: `launch.preflight.init_from` fills it in
            return
        if self.corpus not in CORPORA:
            nearest = get_close_matches(str(self.corpus), CORPORA, n=1, cutoff=0)[0]
            raise ValueError(f"data.corpus={self.corpus}: expected one of {', '.join(CORPORA)}; nearest {nearest}")
        known = signature(CORPORA[self.corpus]).parameters
        for key in _OF_A_CORPUS:
            if key not in known and getattr(self, key) != getattr(Storing, key):
                raise ValueError(f"data.{key}={getattr(self, key)}: corpus {self.corpus} takes none")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={self.on_error}: must be one of {', '.join(ON_ERROR)}")
        for key in ("vocabulary", "workers"):
            count = getattr(self, key)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise ValueError(f"data.{key}={count}: must be a positive whole number, or null")
        has_own = f"must be null: data.tokenizer={self.tokenizer} has its own"
        if self.vocabulary is not None and self.tokenizer not in (Untrained.name, Given.name):
            raise ValueError(f"data.vocabulary={self.vocabulary}: {has_own}")
        if self.document is not None and self.tokenizer in (Bytes.name, Untrained.name, Given.name):
            raise ValueError(f"data.document={self.document}: {has_own}")

    def check(self) -> None:
        """Raises ValueError, one line, if the corpus cannot be read or the store not written. Cheap."""
        if self.corpus is None:
            raise ValueError(
                f"data.corpus=null: must be one of {', '.join(CORPORA)}; null is of an old source, with init_from=RUN"
            )
        source = self.source
        source.check()
        if self.local is not None and is_there("data.local", local := Path(self.local).expanduser()):
            if not local.is_dir():
                raise ValueError(f"data.local={self.local}: is a file; must be a folder")
        if isinstance(source, Prepared):
            if self.store is None:
                raise ValueError("data.store=null: must be the folder, or the address, of a store")
            if is_address(self.store) and self.local is None:
                raise ValueError(f"data.local=null: must be a folder that {self.store} can be copied to")
            if not is_address(self.store):
                is_there("data.store", Path(self.store).expanduser())
            StoreAddress(self.store).card()
            return
        self._tokenizer(source)
        if self.store is None:
            return
        if is_address(self.store):
            raise ValueError(
                f"data.store={self.store}: must be a folder; data=store reads it from there, once it has been put there"
            )
        place = Path(self.store).expanduser().absolute()
        is_there("data.store", place)
        ground = next(folder for folder in (place, *place.parents) if folder.exists())
        if not ground.is_dir():
            raise ValueError(f"data.store={self.store}: {ground} is a file; expected a folder")
        if ground != place and not os.access(ground, os.W_OK):
            raise ValueError(f"data.store={self.store}: {ground} cannot be written to")

    def check_heldout(self, heldout: float) -> None:
        """Raises ValueError, one line, for a split that may hold out text that generated documents are made of."""
        if self.corpus and issubclass(CORPORA[self.corpus], Generated) and heldout > SAFE:
            raise ValueError(
                f"data.heldout={heldout}: must be at most {SAFE} for corpus {self.corpus}: the rest is its hay"
            )

    def prepare(self, runner: Runner | None = None, watch: Watch | None = None) -> Path:
        """Builds the token store, or finds it built, and returns its folder, or that of this machine's copy.

        runner: who tokenises; null for processes of this machine. watch: is told how far it is.
        """
        self.check()
        source = self.source
        if isinstance(source, Prepared):
            store = str(self.store)
        else:
            tokenizer = self._tokenizer(source)
            workers = 1 if current_process().daemon else self.workers or _cores()
            identity = source.identity()
            folder = self._folder(identity, tokenizer)
            made = build(source, tokenizer, folder, identity=identity, workers=workers, runner=runner, watch=watch)
            store = str(made.folder)
        return fetch(store, self.local) if self.local is not None else Path(store).expanduser()

    def left_out(self, folder: Path) -> dict[str, int]:
        """Counts documents left out by `prepare`, by reason, and the tokens that stand for text that the tokenizer
        does not know. Files that lie beside the corpus are counted as they are now."""
        store = Store(folder)
        counts = dict(store.card["skipped"])
        if not isinstance(self.source, Prepared):
            beside = self.source.left_out()
            counts = {reason: count for reason, count in counts.items() if reason not in BESIDE} | beside
        if unknown := store.card.get("unknown", 0):
            counts[f"of {store.card['tokens']:,} tokens unknown to the tokenizer"] = unknown
        return counts

    @cached_property
    def source(self) -> Any:
        """The corpus (`data.corpora.corpus.Corpus`), not yet checked."""
        corpus = CORPORA[str(self.corpus)]
        known = signature(corpus).parameters
        return corpus(**{key: getattr(self, key) for key in ("path", *_OF_A_CORPUS) if key in known})

    def vocabulary_size(self) -> int | None:
        """The size of the vocabulary, where it is known before any tokens are made."""
        source = self.source
        return None if isinstance(source, Prepared) else self._tokenizer(source).size or None

    def _tokenizer(self, source: Any) -> Any:
        if self.tokenizer == Given.name:
            if not isinstance(source, Megatron):
                raise ValueError(f"data.tokenizer=ids: corpus {self.corpus} is text; must be bytes, bpe or a file")
            return Given(self.vocabulary, source.closing())
        if self.tokenizer == Untrained.name and isinstance(source, Megatron):
            raise ValueError("data.tokenizer=bpe: corpus megatron is tokenised already; must be ids or a file")
        try:
            if self.tokenizer == Bytes.name:
                return Bytes()
            if self.tokenizer == Untrained.name:
                return Untrained(self.vocabulary or VOCABULARY)
            path = Path(self.tokenizer).expanduser()
            is_folder = is_there("data.tokenizer", path) and path.is_dir()
            for file in sorted(path.iterdir()) if is_folder else ():
                is_there("data.tokenizer", file)
            return from_file(self.tokenizer, self.document)
        except ValueError as error:
            if str(error).startswith("data."):
                raise
            key = f"vocabulary={self.vocabulary}" if self.tokenizer == Untrained.name else f"tokenizer={self.tokenizer}"
            raise ValueError(f"data.{key}: {error}") from None

    def _folder(self, identity: dict[str, Any], tokenizer: Any) -> Path:
        if self.store is not None:
            return Path(self.store).expanduser()
        made_of = json.dumps([identity, tokenizer.identity, VERSION], sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "farspan" / f"{self.corpus}-{key}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
