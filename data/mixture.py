"""Several corpora in one run: `Mixture`, what `conf/data/mixture.yaml` builds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data.batches import Batches, Sequencing, TooLong, checked_audit
from data.curriculum import Curriculum
from data.loader import Data
from data.samplers import PackingName
from data.samplers.decompose import Overlong
from data.samplers.sampler import Source
from data.stores.store import Store

Weight = tuple[tuple[int, Fraction], ...]  # (token, weight), from which token of the run on


class Portion:
    """A corpus of a mixture, and its share of the run.

    data: the corpus, as in data=…; the mixture sets packing and the held-out split for all. weight: weight relative to
    the other sources, by tokens; or [[token, weight], …]: the weight from each of these tokens of the run on. epochs:
    times that any of it is seen, at most, after which it leaves and the others go on by their weights; null for no
    limit. long: [[tokens, factor], …]: documents of at least so many tokens come so many times as often. order: another
    number is another order of the same documents, to replay a corpus in one that it was not trained on. old: true for a
    corpus that the run's first weights were trained on: data.replay gives its share of the run, and every evaluation
    reports how much of it is forgotten.
    """

    def __init__(
        self,
        *,
        data: Any,
        weight: Any = 1.0,
        epochs: float | None = None,
        long: list[Any] | None = None,
        order: int = 0,
        old: bool = False,
    ) -> None:
        self.data, self.weight, self.epochs, self.long, self.order, self.old = data, weight, epochs, long, order, old

    def source(self, name: str, store: Any = None) -> Source:
        """Builds the source that a sampler reads. Raises ValueError for a value out of range, with the full key."""
        at = f"data.sources.{name}"
        if not isinstance(self.data, Data):
            raise ValueError(f"{at}.data: must be a data.Data")
        lines = self.weight if isinstance(self.weight, list | tuple) else [[0, self.weight]]
        weight = _lines(f"{at}.weight", self.weight, lines)
        if not weight or weight[0][0] != 0:
            raise ValueError(f"{at}.weight={self.weight}: must begin with token 0")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"{at}.epochs={self.epochs}: must be above 0, or null")
        long = _lines(f"{at}.long", self.long, self.long or [])
        if long and long[0][0] < 1:
            raise ValueError(f"{at}.long={self.long}: must begin with 1 token or more")
        epochs = None if self.epochs is None else Fraction(str(self.epochs))
        return Source(name, store, weight, epochs, long, self.order)


def _lines(key: str, given: Any, lines: Sequence[Any]) -> tuple[tuple[int, Fraction], ...]:
    """[[tokens, number], …] in whole tokens and exact numbers. Raises ValueError."""
    loaded = []
    for line in lines:
        numbers = line if isinstance(line, list | tuple) else ()
        if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            raise ValueError(f"{key}={given}: must be lines of [tokens, number]")
        tokens, number = Fraction(str(numbers[0])), Fraction(str(numbers[1]))
        if tokens.denominator != 1 or tokens < 0 or number < 0:
            raise ValueError(f"{key}={given}: must not be negative")
        loaded.append((int(tokens), number))
    if [tokens for tokens, _ in loaded] != sorted({tokens for tokens, _ in loaded}):
        raise ValueError(f"{key}={given}: must have its tokens in order")
    return tuple(loaded)


class Mixture:
    """Several corpora, drawn from by weight; the order of each is its own. Every record has the tokens of each
    (`drawn`).

    sources: by name, `data.Portion`s. replay: the share of the run's tokens that the old ones have together,
    from 0 to 1, the others having the rest (2403.08763), and weights dividing each of the two; null for weights alone.
    max_length, packing, min_length, overlong, too_long, document_mask, heldout, audit: as of one corpus.
    heldout_tokens: held-out tokens that an evaluation reads, the same of each. Raises ValueError,
    one line that opens with the key, for a value out of range.
    """

    def __init__(
        self,
        *,
        sources: dict[str, Any],
        replay: float | None = None,
        max_length: int = 4096,
        packing: PackingName = "concat",
        min_length: int = 256,
        overlong: Overlong = "random",
        too_long: TooLong = "split",
        document_mask: bool = True,
        heldout: float = 0.03,
        heldout_tokens: int = 65536,
        audit: int | None = None,
    ) -> None:
        for name, portion in sources.items():
            if not isinstance(portion, Portion) or "/" in name:
                raise ValueError(f"data.sources.{name}: must be a data.Portion, under a name without /")
        parts = [portion.source(name) for name, portion in sources.items()]
        for token in sorted({token for source in parts for token, _ in source.weight}) or [0]:
            if not any(source.weight_at(token) for source in parts):
                raise ValueError(f"data.sources: some weight must be above 0 from token {token} on")
        self.sources, self.replay = dict(sources), replay
        self.weights = {source.name: source.weight for source in parts}
        if replay is not None:
            self.weights = _shared(parts, {name for name, portion in sources.items() if portion.old}, replay)
        self.sequencing = Sequencing(
            max_length=max_length,
            packing=packing,
            min_length=min_length,
            overlong=overlong,
            too_long=too_long,
            document_mask=document_mask,
            heldout=heldout,
            heldout_tokens=heldout_tokens,
        )
        self.audit = checked_audit(audit)

    def check(self) -> None:
        """Raises ValueError, one line, if a corpus cannot be read or its store not written. Cheap."""
        for name, portion in self.sources.items():
            with _named(name):
                portion.data.check()
            portion.data.check_heldout(self.sequencing.heldout)

    def prepare(self, *more: Any) -> list[Path]:
        """Builds the token stores, or finds them built, and returns their folders."""
        self.check()
        return [portion.data.prepare(*more) for portion in self.sources.values()]

    def open(self, batch_tokens: int, curriculum: Curriculum | None = None) -> Batches:
        """The batches of `batch_tokens` tokens each, over the stores (built if they are not there)."""
        self.check()
        sources, tokenizers = [], {}
        for name, portion in self.sources.items():
            with _named(name):
                store = Store(portion.data.prepare())
            tokenizers[name] = store.tokenizer
            sources.append(replace(portion.source(name, store), weight=self.weights[name], old=portion.old))
        first, *others = tokenizers
        for name in others:
            if tokenizers[name].card() != tokenizers[first].card():
                raise ValueError(f"data.sources.{name}.data.tokenizer: must be that of data.sources.{first}")
        _other_than_old(sources)
        return Batches(
            sources,
            tokenizer=tokenizers[first],
            batch_tokens=batch_tokens,
            sequencing=self.sequencing,
            curriculum=curriculum,
        )


def _shared(parts: list[Source], old: set[str], replay: float) -> dict[str, Weight]:
    """Weights such that the old sources have `replay` of all together at every token. Raises ValueError."""
    if isinstance(replay, bool) or not isinstance(replay, int | float) or not 0 <= replay <= 1:
        raise ValueError(f"data.replay={replay}: must be a share from 0 to 1, or null")
    share, tokens = Fraction(str(replay)), sorted({token for source in parts for token, _ in source.weight})
    weights: dict[str, list[tuple[int, Fraction]]] = {source.name: [] for source in parts}
    for of, names in ((share, old), (1 - share, set(weights) - old)):
        members = [source for source in parts if source.name in names]
        for token in tokens:
            total = sum(source.weight_at(token) for source in members)
            if of and not total:
                which = "old: true" if names is old else "old: false"
                raise ValueError(
                    f"data.replay={replay}: some source with {which} must have a weight from token {token} on"
                )
            for source in members:
                weights[source.name].append((token, of * source.weight_at(token) / total if total else Fraction(0)))
    return {name: tuple(lines) for name, lines in weights.items()}


def _other_than_old(sources: Sequence[Source]) -> None:
    """Raises ValueError for a new corpus all of whose documents are an old one's: it would be replayed, not learnt."""
    for old in (source for source in sources if source.old):
        for new in (source for source in sources if not source.old):
            first = (old.store.hashes == new.store.hashes[0]).any()  # cheap, and as a rule the answer
            if first and np.isin(new.store.hashes, old.store.hashes).all():
                raise ValueError(
                    f"data.sources.{new.name}.data: must be another corpus than data.sources.{old.name}, "
                    "which has all of its documents"
                )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts a source's name into what its corpus refuses: data.path becomes data.sources.NAME.data.path."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("data."):
            raise
        raise ValueError(f"data.sources.{name}.{error}") from None
