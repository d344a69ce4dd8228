"""Generated tasks that tell mixers apart: copy, associative recall, a needle, induction. `TASKS` names them.

A task has no corpus. Example n of a seed is a pure function of (seed, n), so a batch is one of (seed, step) at any
world size and after any resume, and no file is read. Held-out examples are drawn under a key of their own. Only the
answers are targets: what a model cannot know from the example is never scored.

Draws are the raw bits of a counter-based generator, which NumPy keeps for ever (see `data.pack`); a remainder of 64
bits is uniform but for some 1e-17.

Token 0 is the mark, which is never an answer; symbols are 1..S. Legend: S symbols, L tokens of an example.
"""

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.curriculum import Curriculum
from data.pack import NO_TARGET, Packed
from data.tokenizer import Symbols

Ints = NDArray[np.int64]

MARK = Symbols.DOCUMENT
TRAIN, HELDOUT = 0, 1  # keys of the two sides: no example of one is drawn as the other's
HELDOUT_SEED = 0  # whatever the run's: all runs of a task answer the same questions


class Draw:
    """The random numbers of one example, a function of (seed, *key)."""

    def __init__(self, seed: int, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))

    def below(self, limit: int, count: int) -> Ints:
        """`count` numbers in 0..limit-1, int64 [count]."""
        return (self._bits.random_raw(count) % np.uint64(limit)).astype(np.int64)

    def choose(self, count: int, weights: NDArray[np.floating]) -> Ints:
        """`count` different places of weights [n], one after another by weight among those left, int64 [count].

        The smallest of exponential waits at these rates (Efraimidis and Spirakis, 2006).
        """
        uniform = (self._bits.random_raw(len(weights)) + 0.5) / 2**64
        return np.argsort(-np.log(uniform) / weights, kind="stable")[:count]

    def distinct(self, limit: int, count: int) -> Ints:
        """`count` different numbers in 0..limit-1, in random order, int64 [count]."""
        return self.choose(count, np.ones(limit))


class Questions:
    """Global batches of a task: `batch_tokens // max_length` examples each. The counterpart of `data.loader.Batches`.

    `chance`: the share of answers that guessing a symbol gets right.
    """

    def __init__(self, task: "Task", batch_tokens: int) -> None:
        length = task.max_length
        if batch_tokens < length or batch_tokens % length:
            raise ValueError(
                f"train.batch_tokens={batch_tokens}: must be a multiple of data.max_length={length}; "
                f"nearest {max(round(batch_tokens / length), 1) * length}"
            )
        self.task = task
        self.tokenizer = Symbols(task.symbols + 1)
        self.vocab_size = self.tokenizer.size
        self.windows_per_batch = batch_tokens // length
        self.chance = 1 / task.symbols
        self.sides: dict[str, bool] = {}
        key = [task.name, task.version, task.settings(), batch_tokens]
        self.order = {"task": task.name, "version": task.version, "train.batch_tokens": batch_tokens}
        self.order |= {f"data.{name}": value for name, value in task.settings().items()}
        self.fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def card(self) -> dict[str, Any]:
        """The card of the task that a run and its checkpoints save."""
        return {
            "task": self.task.name,
            "version": self.task.version,
            **self.task.settings(),
            "batches": self.fingerprint,
        }

    def batch(self, seed: int, step: int, skips: int = 0) -> list[Packed]:
        """The global batch of a step, `skips` batches having been skipped before it."""
        first = (step + skips) * self.windows_per_batch
        return [self._example(seed, TRAIN, first + i) for i in range(self.windows_per_batch)]

    def drawn(self, step: int, skips: int = 0) -> dict[str, int]:
        """The tokens before a step: all of one task."""
        return {self.task.name: (step + skips) * self.windows_per_batch * self.task.max_length}

    def filled(self, step: int) -> float:
        """The share of the places before a step that hold a token: all."""
        return 1.0

    def rope_theta(self, step: int, skips: int = 0) -> None:
        """The model's own."""

    def shapes(self) -> list[list[int]]:
        """The lengths of every kind of batch that there is."""
        return [[self.task.max_length] * self.windows_per_batch]

    def heldout(self) -> list[Packed]:
        """`heldout_tokens // max_length` examples, at least one, always the same."""
        count = max(self.task.heldout_tokens // self.task.max_length, 1)
        return [self._example(HELDOUT_SEED, HELDOUT, n) for n in range(count)]

    def heldout_by_source(self) -> dict[str, list[Packed]]:
        """The same: a task is a source without a name."""
        return {"": self.heldout()}

    def _example(self, seed: int, side: int, n: int) -> Packed:
        tokens, targets = self.task.example(Draw(seed, side, n))
        starts = np.zeros(len(tokens), dtype=bool)
        starts[0] = True
        return Packed(tokens=tokens, targets=targets, starts=starts)


class Task:
    """A generated task, as `conf/data/*.yaml` builds it: its sizes, and the drawing of an example.

    `example(draw)` -> tokens and targets, int64 [L]. A `version` counts changes of what is drawn.
    """

    name = ""
    version = 1

    def __init__(self, *, max_length: int, symbols: int, heldout_tokens: int, **sizes: int) -> None:
        self.max_length = max_length
        self.symbols = symbols
        self.heldout_tokens = heldout_tokens
        self._sizes = {"max_length": max_length, "symbols": symbols, **sizes}
        for key, size in {**self._sizes, "heldout_tokens": heldout_tokens}.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"data.{key}={size}: must be a whole number from 1")

    def settings(self) -> dict[str, float]:
        """Everything that an example depends on."""
        return dict(self._sizes)

    def check(self) -> None:
        """There is nothing to read."""

    def open(self, batch_tokens: int, curriculum: Curriculum | None = None) -> Questions:
        """The batches of `batch_tokens` tokens each. Raises ValueError for a curriculum: examples have one length."""
        if curriculum is not None and curriculum.odds != "uniform":
            raise ValueError(f"curriculum.odds={curriculum.odds}: must be uniform for a generated task")
        if curriculum is not None and curriculum.context is not None:
            stages = [list(stage) for stage in curriculum.context]
            raise ValueError(f"curriculum.context={stages}: must be null for a generated task")
        return Questions(self, batch_tokens)

    def example(self, draw: Draw) -> tuple[Ints, Ints]:
        raise NotImplementedError

    def _at_least(self, length: int, why: str) -> None:
        if self.max_length < length:
            raise ValueError(f"data.max_length={self.max_length}: must be at least {length}, for {why}")


class Copy(Task):
    """Say it again: symbols, a mark, and the same symbols, which are the answers (2402.01032, section 3).

    A fixed-size state holds only so many symbols, attention any number.

    max_length: tokens of an example, even: half of them less the mark are copied. symbols: number of different symbols
    to copy. heldout_tokens: tokens of the held-out examples that an evaluation reads.
    """

    name = "copy"

    def __init__(self, *, max_length: int = 128, symbols: int = 64, heldout_tokens: int = 16384) -> None:
        super().__init__(max_length=max_length, symbols=symbols, heldout_tokens=heldout_tokens)
        self._at_least(4, "a symbol, the mark and their answers")
        if max_length % 2:
            raise ValueError(f"data.max_length={max_length}: must be even: what is copied stands there twice")

    def example(self, draw: Draw) -> tuple[Ints, Ints]:
        text = 1 + draw.below(self.symbols, self.max_length // 2 - 1)
        tokens = np.concatenate([[MARK], text, [MARK], text])
        return tokens, _next(tokens, scored=np.arange(len(text) + 1, len(tokens) - 1))


class MQAR(Task):
    """Multi-query associative recall (Zoology, 2312.04927, section 3 and appendix): pairs of a key and its value, then
    each key once more, whose answer is its value.

    Keys are of the lower half of the symbols, values of the upper. A key comes back after a gap drawn from a power law,
    between symbols that are none of the example's keys.

    max_length: tokens of an example, even, at least four a pair. symbols: number of keys and values together, even.
    pairs: number of pairs that an example binds: the load on a state. gap_power: the density of a gap g falls as
    g^(gap_power - 1); small ones ask most keys again soon, 1 asks them anywhere. heldout_tokens: tokens of the held-out
    examples that an evaluation reads.
    """

    name = "mqar"

    def __init__(
        self,
        *,
        max_length: int = 64,
        symbols: int = 64,
        pairs: int = 8,
        gap_power: float = 0.01,
        heldout_tokens: int = 16384,
    ) -> None:
        super().__init__(max_length=max_length, symbols=symbols, heldout_tokens=heldout_tokens, pairs=pairs)
        self._at_least(4 * pairs, f"data.pairs={pairs} and as many questions")
        for key, size in (("max_length", max_length), ("symbols", symbols)):
            if size % 2:
                raise ValueError(f"data.{key}={size}: must be even")
        if pairs > symbols // 2 - 1:
            raise ValueError(f"data.pairs={pairs}: must be below half of data.symbols={symbols}, the number of keys")
        if not gap_power > 0:
            raise ValueError(f"data.gap_power={gap_power}: must be above 0")
        self.pairs = pairs
        self.gap_power = gap_power

    def settings(self) -> dict[str, float]:
        return {**super().settings(), "gap_power": self.gap_power}

    def example(self, draw: Draw) -> tuple[Ints, Ints]:
        half, context = self.symbols // 2, 2 * self.pairs
        keys = 1 + draw.distinct(half, self.pairs)
        values = 1 + half + draw.distinct(half, self.pairs)
        places = (self.max_length - context) // 2
        gaps = draw.choose(self.pairs, np.arange(1.0, places + 1) ** (self.gap_power - 1))
        others = np.setdiff1d(np.arange(1, self.symbols + 1), keys)
        tokens = others[draw.below(len(others), self.max_length)]
        tokens[:context] = np.stack([keys, values], axis=1).ravel()
        targets = np.full(self.max_length, NO_TARGET)
        tokens[context + 2 * gaps] = keys
        targets[context + 2 * gaps] = values
        return tokens, targets


class Needle(Task):
    """A needle in a haystack, with distractors: marked pairs of a key and an answer, scattered over random symbols;
    at the end the mark and one of the keys, to be answered (passkey retrieval, 2305.16300, section 4.2; several needles
    as in RULER, 2404.06654, section 3.1).

    max_length: tokens of an example. symbols: number of different symbols of keys, answers and hay. distractors: pairs
    under other keys, which are not asked for. answer: symbols of an answer. heldout_tokens: tokens of the held-out
    examples that an evaluation reads.
    """

    name = "needle"

    def __init__(
        self,
        *,
        max_length: int = 256,
        symbols: int = 64,
        distractors: int = 3,
        answer: int = 1,
        heldout_tokens: int = 32768,
    ) -> None:
        super().__init__(max_length=max_length, symbols=symbols, heldout_tokens=heldout_tokens, answer=answer)
        if not isinstance(distractors, int) or isinstance(distractors, bool) or distractors < 0:
            raise ValueError(f"data.distractors={distractors}: must be a whole number from 0")
        if distractors >= symbols:
            raise ValueError(f"data.distractors={distractors}: must be below data.symbols={symbols}: keys differ")
        self.distractors = distractors
        self.answer = answer
        self._at_least((distractors + 2) * (2 + answer), f"{distractors + 1} pairs and the question")

    def settings(self) -> dict[str, float]:
        return {**super().settings(), "distractors": self.distractors}

    def example(self, draw: Draw) -> tuple[Ints, Ints]:
        count, width = self.distractors + 1, 2 + self.answer
        pairs = np.empty((count, width), dtype=np.int64)
        pairs[:, 0] = MARK
        pairs[:, 1] = 1 + draw.distinct(self.symbols, count)
        pairs[:, 2:] = 1 + draw.below(self.symbols, count * self.answer).reshape(count, -1)
        hay = self.max_length - (count + 1) * width
        slots = np.sort(draw.distinct(hay + count, count))  # each arrangement of pairs among hay is as likely
        begins = slots + np.arange(count) * (width - 1)
        tokens = 1 + draw.below(self.symbols, self.max_length)
        tokens[begins[:, None] + np.arange(width)] = pairs
        tokens[-width:] = pairs[draw.below(count, 1)[0]]
        end = self.max_length
        return tokens, _next(tokens, scored=np.arange(end - self.answer - 1, end - 1))


class Induction(Task):
    """Induction heads (2209.11895), as one question: a mark somewhere among random symbols, and the mark again at the
    end, whose answer is the symbol that followed it (H3, 2212.14052, section 3.1; Mamba, 2312.00752, section 4.1.2).

    max_length: tokens of an example. symbols: number of different symbols. heldout_tokens: tokens of the held-out
    examples that an evaluation reads.
    """

    name = "induction"

    def __init__(self, *, max_length: int = 64, symbols: int = 16, heldout_tokens: int = 16384) -> None:
        super().__init__(max_length=max_length, symbols=symbols, heldout_tokens=heldout_tokens)
        self._at_least(3, "the mark, its symbol and the mark again")

    def example(self, draw: Draw) -> tuple[Ints, Ints]:
        tokens = 1 + draw.below(self.symbols, self.max_length)
        place = draw.below(self.max_length - 2, 1)[0]
        tokens[[place, -1]] = MARK
        targets = np.full(self.max_length, NO_TARGET)
        targets[-1] = tokens[place + 1]
        return tokens, targets


TASKS: dict[str, type[Task]] = {task.name: task for task in (Copy, MQAR, Needle, Induction)}


def _next(tokens: Ints, *, scored: Ints) -> Ints:
    """Targets int64 [L]: at the `scored` places the token after, elsewhere none."""
    targets = np.full(len(tokens), NO_TARGET)
    targets[scored] = tokens[scored + 1]
    return targets
