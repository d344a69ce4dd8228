"""Evaluation on generated examples: whether a model finds a needle, recalls pairs, says a sequence again.

A needle is a sentence in held-out text, in the tokenizer's own words; of tokens that spell nothing, a mark, a key and
an answer among symbols, as in `data.tasks`. Recall and copy are those of `data.tasks` for every vocabulary, their
symbols the tokens that held-out text has most often. Examples are a pure function of their number.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from data.corpora.generated import KEY, QUESTION
from data.pack import NO_TARGET, Packed
from data.roles import roles_of
from data.samplers.index import Ints
from data.tasks import MARK, MQAR, Copy, Draw
from data.tokenizer import Bytes, Json
from train.evaluation.score import OnProgress, Score, Scorer
from train.evaluation.texts import alphabet, hay, packed

SEED, NEEDLE, RECALL, COPY = 0, 0, 1, 2  # what the draws are keyed by


class NeedleExamples:
    """Needles in hay of a run's vocabulary."""

    def __init__(self, batches: Any, longest: int):
        self.batches, tokenizer = batches, batches.tokenizer
        roles = roles_of(tokenizer)
        self.begin, self.mark = np.array(roles.begin, dtype=np.int64), (roles.entry or (roles.fill,))[0]
        self.encode = tokenizer.encode if isinstance(tokenizer, Bytes | Json) else None
        self.symbols = alphabet(batches, 64) if self.encode is None else np.empty(0, np.int64)
        self.hay = hay(batches, 2 * longest)

    def example(self, draw: Draw, length: int, depth: float) -> Packed:
        """A text of `length` tokens: its begin, hay with the needle at `depth` (0 first, 1 last), question and answer.
        Raises ValueError where it has no room."""
        needle, question, answer = self._words(draw)
        room = length - len(self.begin) - len(needle) - len(question) - len(answer)
        if room < 0:
            raise ValueError(
                f"evaluate.lengths={length}: must be at least {length - room}, for a needle and a question"
            )
        begin, at = int(draw.below(len(self.hay) - room + 1, 1)[0]), round(depth * room)
        straw = self.hay[begin : begin + room]
        tokens = np.concatenate([self.begin, straw[:at], needle, straw[at:], question, answer])
        return packed(tokens, slice(length - 1 - len(answer), length - 1))

    def fits(self, length: int) -> bool:
        try:
            self.example(Draw(SEED, NEEDLE), length, 0.0)
        except ValueError:
            return False
        return True

    def _words(self, draw: Draw) -> tuple[Ints, Ints, Ints]:
        if self.encode is None:
            key, *answer = self.symbols[draw.below(len(self.symbols), 5)].tolist()
            return np.array([self.mark, key, *answer]), np.array([self.mark, key]), np.array(answer)
        number = 10_000 + int(draw.below(90_000, 1)[0])
        texts = KEY.format(number), QUESTION, f" {number}"
        return tuple(self.encode(text.encode()).astype(np.int64) for text in texts)  # type: ignore[return-value]


def answered(example: Packed, score: Score) -> tuple[float, bool, int, int]:
    """(log-probability of the answer, whether all of it is right, how many of its tokens are, of how many)."""
    targets = example.targets != NO_TARGET
    right = score.right[targets]
    return -float(score.nats[targets].sum()), bool(right.all()), int(right.sum()), len(right)


def needle(
    scorer: Scorer, batches: Any, *, lengths: list[int], depths: int, samples: int, all_fit: bool, tell: OnProgress
) -> dict[str, Any]:
    """Needles by length and depth: the mean log-probability of the answer, and how often all of it is the likeliest
    text.
    Lengths without room for a needle are left out, unless all have to fit."""
    places = [d / max(depths - 1, 1) for d in range(depths)]
    needles = NeedleExamples(batches, max(lengths))
    lengths = [length for length in lengths if all_fit or needles.fits(length)]
    cells = [(length, depth, n) for length in lengths for depth in places for n in range(samples)]
    examples = [needles.example(Draw(SEED, NEEDLE, length, n), length, depth) for length, depth, n in cells]
    answers = [answered(e, s)[:2] for e, s in zip(examples, scorer(examples, tell), strict=True)]
    grid = np.array(answers, dtype=float).reshape(len(lengths), depths, samples, 2).mean(axis=2)
    return {
        "lengths": lengths,
        "depths": places,
        "samples": samples,
        "words": needles.encode is not None,
        "logprob": grid[..., 0].tolist(),
        "exact": grid[..., 1].tolist(),
    }


def recall(
    scorer: Scorer, batches: Any, *, lengths: list[int], symbols: int, pairs: int, samples: int, tell: OnProgress
) -> dict[str, Any]:
    """Multi-query associative recall (`data.tasks.MQAR`) by length."""
    known = alphabet(batches, symbols)
    pairs = min(pairs, len(known) // 2 - 1)
    fits = [length // 2 * 2 for length in lengths if length >= 4 * pairs]
    tasks = {n: MQAR(max_length=n, symbols=len(known), pairs=pairs) for n in fits}
    return {"pairs": pairs, **_asked(scorer, batches, tasks, known, RECALL, samples, tell)}


def copy(
    scorer: Scorer, batches: Any, *, lengths: list[int], symbols: int, samples: int, tell: OnProgress
) -> dict[str, Any]:
    """A sequence said again (`data.tasks.Copy`) by length, that of both together."""
    known = alphabet(batches, symbols)
    tasks = {n // 2 * 2: Copy(max_length=n // 2 * 2, symbols=len(known)) for n in lengths if n >= 4}
    return _asked(scorer, batches, tasks, known, COPY, samples, tell)


def _asked(
    scorer: Scorer, batches: Any, tasks: dict[int, Any], known: Ints, key: int, samples: int, tell: OnProgress
) -> dict[str, Any]:
    """accuracy: the share of answers that are the likeliest token. loss: nats an answer. chance: of a guess."""
    roles = roles_of(batches.tokenizer)
    mark = (roles.entry or (roles.fill,))[0]
    spelled = np.concatenate([[mark], known])  # a symbol's token; the mark is MARK
    assert MARK == 0
    examples, lengths = [], []
    for length, task in tasks.items():
        for n in range(samples):
            tokens, targets = task.example(Draw(SEED, key, length, n))
            answers = np.where(targets == NO_TARGET, NO_TARGET, spelled[np.maximum(targets, 0)])
            examples.append(replace(packed(spelled[tokens]), targets=answers))
            lengths.append(length)
    rows: dict[int, list[tuple[float, bool, int, int]]] = {}
    for length, example, score in zip(lengths, examples, scorer(examples, tell), strict=True):
        rows.setdefault(length, []).append(answered(example, score))
    results = []
    for length, each in rows.items():
        logprob, _, right, count = (sum(column) for column in zip(*each, strict=True))
        results.append({"length": length, "answers": count, "loss": -logprob / count, "accuracy": right / count})
    return {"symbols": len(known), "chance": 1 / len(known), "lengths": results}
