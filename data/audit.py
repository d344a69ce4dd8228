"""The proof that some steps of a run lose no token and see none twice: `farspan plan data.audit=N`.

Every sequence of every step is looked up as pieces of the store, and read. Of each pool, in each epoch: no token is in
two pieces; the sequences are those of the order one after another, none left out; an epoch that ended had every token
that its pool keeps. What is read is what the store holds there, and all steps have the same number of tokens. Memory
grows with the steps that are audited, by two numbers a piece. Before that, every part of every store is held against
its checksum.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data.batches import Batches
from data.samplers.index import Ints
from data.samplers.sampler import Slot, SourcePart
from data.stores.checks import verify
from data.stores.store import Store

Epoch = tuple[int, int]  # of a part, by its place in `found.parts`


def audit(batches: Batches, seed: int, steps: int, first: int = 0, skips: int = 0) -> list[str]:
    """Returns the findings, a line each. Raises AssertionError for a wrong batch, ValueError for a damaged store."""
    stores = [getattr(source.store, "whole", source.store) for source in batches.sources]
    verified = sum(verify(store)[0] for store in stores if isinstance(store, Store))
    parts: dict[int, tuple[int, SourcePart]] = {}
    pieces: dict[Epoch, list[Ints]] = defaultdict(list)
    places: dict[Epoch, list[int]] = defaultdict(list)
    before = batches.drawn(first, skips)
    for step in range(first, first + steps):
        slots = batches.slots(step, skips)
        pieces_by_slot = [slot.pieces(seed) for slot in slots]
        _read(batches, slots, pieces_by_slot, seed, step, skips)
        for slot, held in zip(slots, pieces_by_slot, strict=True):
            number, _ = parts.setdefault(id(slot.part), (len(parts), slot.part))
            epoch, place = divmod(slot.index, slot.part.pool.count)
            pieces[number, epoch].append(held)
            places[number, epoch].append(place)
    by_number = dict(parts.values())
    ended = sum(_epoch(by_number[key[0]], key, pieces[key], places[key]) for key in sorted(pieces))
    after = batches.drawn(first + steps, skips)
    drawn = {name: tokens - before.get(name, 0) for name, tokens in after.items()}
    sizes = [batches.tokens(step, skips) for step in range(first, first + steps)]
    expected = sum(sizes)
    if sum(drawn.values()) != expected:
        raise AssertionError(f"{sum(drawn.values()):,} tokens are said to be drawn, {expected:,} were")
    read = sum(int((held[:, 1] - held[:, 0]).sum()) for epoch in pieces.values() for held in epoch)
    padding = expected - read
    shown = ", ".join(f"{name} {tokens:,}" for name, tokens in drawn.items() if tokens)
    step_tokens = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    return [
        f"{steps:,} steps of {step_tokens} tokens: no token lost, none seen twice in an epoch",
        f"{read:,} tokens of documents, {padding:,} of padding; {ended} epochs of a pool ended, each with all of it",
        f"drawn: {shown}",
        f"{verified:,} parts of the stores' files: each is what was written",
    ]


def passed_over(skipped: list[list[int]], step: int, skips: int, trained: dict[int, int]) -> str:
    """Formats the batches that a run has passed over.

    skipped: [begin, end) of batches, by their place in the order, as a checkpoint at `step` lists them. trained: of
    each step the place of its batch, by the run's own record. Raises AssertionError where a batch up to here was
    neither trained on nor passed over, or both.
    """
    over = [place for begin, end in skipped for place in range(begin, end)]
    if len(over) != skips or len(set(over)) != skips:
        raise AssertionError(f"{len(set(over)):,} batches are listed as passed over, {skips:,} are counted")
    if lost := sorted(set(range(1, step + 1)) - trained.keys()):
        raise AssertionError(f"no record of step {lost[0]}")
    seen = [trained[n] for n in range(1, step + 1)]
    if both := set(seen) & set(over):
        raise AssertionError(f"batch {min(both)} is listed as passed over, and was trained on")
    if missing := sorted(set(range(step + skips)) - set(seen) - set(over)):
        raise AssertionError(f"batch {missing[0]} was neither trained on nor passed over")
    if not skips:
        return f"{step:,} steps before, no batch passed over"
    rows = ", ".join(str(begin) if end == begin + 1 else f"{begin} to {end - 1}" for begin, end in skipped)
    return f"{step:,} steps before, {skips:,} batches passed over: {rows}; every other one trained on once"


def _read(batches: Batches, slots: Sequence[Slot], results: list[Ints], seed: int, step: int, skips: int) -> None:
    """Holds what a step reads against the store, token by token."""
    batch = batches.batch(seed, step, skips)
    if sum(len(s.tokens) for s in batch) != batches.tokens(step, skips):
        raise AssertionError(f"step {step} has {sum(len(s.tokens) for s in batch):,} tokens")
    for slot, held, packed in zip(slots, results, batch, strict=True):
        stored = np.concatenate([slot.part.source.store.tokens[a:b] for a, b in held.tolist()])
        if not np.array_equal(packed.tokens[: len(stored)], stored):
            raise AssertionError(f"step {step} does not read what the store holds")


def _epoch(part: SourcePart, key: Epoch, pieces: list[Ints], places: list[int]) -> bool:
    """Checks one epoch of a pool; whether it was seen to its end from its start."""
    if places != list(range(places[0], places[0] + len(places))):
        raise AssertionError(f"{part.name}, epoch {key[1]}: sequences are left out or come twice")
    rows = np.concatenate(pieces)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    if (rows[1:, 0] < rows[:-1, 1]).any() or (rows[:, 1] <= rows[:, 0]).any():
        raise AssertionError(f"{part.name}, epoch {key[1]}: a token is seen twice")
    if len(places) < part.pool.count:
        return False
    if (seen := int((rows[:, 1] - rows[:, 0]).sum())) != part.pool.tokens:
        raise AssertionError(f"{part.name}, epoch {key[1]}: {part.pool.tokens - seen:,} tokens are lost")
    return True
