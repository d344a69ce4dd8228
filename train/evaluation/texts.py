"""The held-out documents of a run, whole or as far as they are read, source by source."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.batches import Batches
from data.corpora.generated import Copies, Needles
from data.pack import NO_TARGET, Packed
from data.roles import Roles, roles_of
from data.samplers.documents import Documents
from data.samplers.index import Ints
from data.samplers.sampler import Source
from data.tokenizer import Given


@dataclass(frozen=True)
class EvaluationText:
    """A document. length: its tokens, of which `packed` may have fewer, from its begin."""

    source: str
    length: int
    packed: Packed


def packed(tokens: Any, scored: slice = slice(None)) -> Packed:
    """One document, whose tokens at `scored` have the one after them as a target; its last has none."""
    tokens = np.asarray(tokens, dtype=np.int64)
    every = np.append(tokens[1:], NO_TARGET)
    targets = np.full(len(tokens), NO_TARGET)
    targets[scored] = every[scored]
    starts = np.zeros(len(tokens), dtype=bool)
    starts[0] = True
    return Packed(tokens=tokens, targets=targets, starts=starts)


def texts(batches: Any, tokens: int, length: int) -> list[EvaluationText]:
    """Documents of each source, at most `length` tokens of each, until there are `tokens` of the source; of a generated
    task as many of its held-out examples."""
    if not isinstance(batches, Batches):
        examples = [example for example in batches.heldout() if len(example.tokens) <= length]
        return [
            EvaluationText(batches.task.name, len(e.tokens), e)
            for e in examples[: -(-tokens // batches.task.max_length)]
        ]
    texts, roles = [], roles_of(batches.tokenizer)
    for source, held in zip(batches.sources, batches.heldout_documents, strict=True):
        read = 0
        for document in documents(held):
            if read >= tokens:
                break
            if len(document) > 1:
                texts.append(EvaluationText(source.name or "corpus", len(document), _text(document[:length], roles)))
                read += min(len(document), length)
    return texts


def _text(document: Any, roles: Roles) -> Packed:
    """A document whose targets are its text: neither its begin nor its own end is scored."""
    text = packed(document)
    marks = () if roles.joint else (*roles.marks,)
    return replace(text, targets=np.where(np.isin(text.targets, marks), NO_TARGET, text.targets))


def spelled(tokenizer: Any, sequence: Packed) -> int:
    """Returns how many bytes the targets of a sequence spell: what a piece has more than the tokens before its first
    target."""
    size, begins = 0, [*np.flatnonzero(sequence.starts).tolist(), len(sequence.tokens)]
    for begin, end in itertools.pairwise(begins):
        places = np.flatnonzero(sequence.targets[begin:end] != NO_TARGET)
        if len(places):
            read = sequence.tokens[begin : begin + int(places[-1]) + 1]
            whole = np.append(read, sequence.targets[begin + int(places[-1])])
            size += len(tokenizer.decode(whole)) - len(tokenizer.decode(whole[: int(places[0]) + 1]))
    return size


def bytes_per_target(batches: Any, windows: Sequence[Any] | None = None) -> float | None:
    """Returns how many bytes of text a target of these held-out windows is, by default of all, on average; None of
    tokens that spell no text."""
    tokenizer = batches.tokenizer
    if not hasattr(tokenizer, "decode") or isinstance(tokenizer, Given) or batches.chance is not None:
        return None
    windows, marks = batches.heldout() if windows is None else windows, [NO_TARGET, *roles_of(tokenizer).marks]
    targets = sum(int(np.count_nonzero(~np.isin(window.targets, marks))) for window in windows)
    return sum(spelled(tokenizer, window) for window in windows) / max(targets, 1) or None


def documents(held: Documents, least: int = 0) -> Iterator[Any]:
    """The tokens of documents of at least so many, in the order of their hashes: any number of them is a sample."""
    ids: Ints = np.asarray(held.ids)
    lengths = held.store.offsets[ids + 1] - held.store.offsets[ids]
    ids = ids[lengths >= least]
    for i in ids[np.argsort(held.store.hashes[ids], kind="stable")].tolist():
        yield held.store.tokens[held.store.offsets[i] : held.store.offsets[i + 1]]


def hay(batches: Any, tokens: int) -> Ints:
    """So many tokens of held-out text, without marks between documents, from its begin again where it ends before."""
    if not isinstance(batches, Batches):
        return 1 + np.arange(tokens) % batches.task.symbols
    marks, parts, count = [*roles_of(batches.tokenizer).marks], [], 0
    for held in natural(batches):
        for document in documents(held):
            parts.append(np.asarray(document)[~np.isin(document, marks)].astype(np.int64))
            count += len(parts[-1])
            if count >= tokens:
                return np.concatenate(parts)[:tokens]
    return np.resize(np.concatenate(parts), tokens)


def natural(batches: Any) -> list[Documents]:
    """Returns what is held out of each source whose documents nobody generated; of all, where there is none."""
    both = zip(batches.sources, batches.heldout_documents, strict=True)
    return [held for source, held in both if not _made(source)] or list(batches.heldout_documents)


def _made(source: Source) -> bool:
    """Says whether its documents are generated: there are other needles in those."""
    identity = getattr(source.store, "card", {}).get("identity", {})
    return identity.get("corpus") in (Needles.name, Copies.name)


def alphabet(batches: Any, symbols: int) -> Ints:
    """At most so many tokens, an even number of them, that held-out text has most often; of a task its symbols."""
    if not isinstance(batches, Batches):
        symbols_there = np.arange(1, 1 + min(symbols, batches.task.symbols))
    else:
        counts = np.bincount(hay(batches, 1 << 18), minlength=batches.vocab_size)
        symbols_there = np.argsort(-counts, kind="stable")[: min(symbols, int(np.count_nonzero(counts)))]
    return symbols_there[: len(symbols_there) // 2 * 2]
