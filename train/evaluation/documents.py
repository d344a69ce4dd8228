"""Evaluation on held-out documents: the loss by source, by length, by position, and what far context is worth."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from data.batches import Batches
from data.pack import NO_TARGET, Packed
from data.roles import roles_of
from train.evaluation.score import OnProgress, Score, Scorer
from train.evaluation.texts import EvaluationText, documents, hay, natural, packed, spelled

RISES = 1.1  # times the loss of the same targets with the trained length before them: a loss above it counts as risen


class Mean:
    """Means over targets."""

    def __init__(self) -> None:
        self.documents = self.targets = 0
        self.nats = self.right = 0.0

    def add(self, nats: Any, right: Any) -> None:
        """Those of one document, [n] each."""
        self.documents += 1
        self.targets += len(nats)
        self.nats += float(nats.sum())
        self.right += float(right.sum())

    def facts(self) -> dict[str, Any]:
        """loss: nats per target. accuracy: the share of targets that are the likeliest token."""
        count = max(self.targets, 1)
        facts = {"documents": self.documents, "targets": self.targets}
        return facts | {"loss": self.nats / count, "accuracy": self.right / count}


def loss(scores: Sequence[tuple[EvaluationText, Score]], tokenizer: Any) -> dict[str, Any]:
    """The loss of all documents, of each source, and by length of document, from powers of two."""
    everything, sources, buckets = Mean(), dict[str, Mean](), dict[int, Mean]()
    size = 0
    for text, score in scores:
        targets = text.packed.targets != NO_TARGET
        if hasattr(tokenizer, "decode") and tokenizer.name != "ids":
            size += spelled(tokenizer, text.packed)
        means = [everything, sources.setdefault(text.source, Mean())]
        for mean in [*means, buckets.setdefault(text.length.bit_length() - 1, Mean())]:
            mean.add(score.nats[targets], score.right[targets])
    facts = everything.facts()
    if size:
        facts["loss_per_byte"] = everything.nats / size
    return facts | {
        "sources": {name: mean.facts() for name, mean in sources.items()},
        "lengths": [{"from": 1 << power, **buckets[power].facts()} for power in sorted(buckets)],
    }


def positions(scores: Sequence[tuple[EvaluationText, Score]]) -> list[dict[str, Any]]:
    """The loss by how many tokens of its document a target has before it, from powers of two."""
    sums = np.zeros((3, 64))
    for text, score in scores:
        places = np.flatnonzero(text.packed.targets != NO_TARGET)
        power = np.frexp(places + 1)[1] - 1  # the binary logarithm, rounded down: exact
        for row, weights in zip(sums, (np.ones(len(places)), score.nats[places], score.right[places]), strict=True):
            row += np.bincount(power, weights=weights, minlength=64)
    return [
        {"from": 1 << p, "targets": int(count), "loss": nats / count, "accuracy": right / count}
        for p, (count, nats, right) in enumerate(sums.T.tolist())
        if count
    ]


def long_range(
    scorer: Scorer, batches: Any, *, length: int, context: int, most: int, tell: OnProgress
) -> dict[str, Any]:
    """Returns what the context before the last `context` tokens is worth, in documents of twice as many and more.

    Scored are the targets among the last context / 4 tokens of what is read of a document, once with all of it before
    them and once with the last `context` tokens of it alone, of which a target has from 3/4 to all before it.
    gain: nats by which the loss is lower with all.
    """
    tail, rows, pairs = context // 4, [], []
    if isinstance(batches, Batches):
        read = 2 * context
        while read <= length:
            for held in batches.heldout_documents:
                for _, document in zip(range(most), documents(held, read + 1), strict=False):
                    whole = document[: read + 1]
                    pairs.append((read, packed(whole, slice(read - tail, read))))
                    pairs.append((read, packed(whole[-context - 1 :], slice(context - tail, context))))
            read *= 2
    scores = scorer([sequence for _, sequence in pairs], tell)
    losses: dict[int, list[tuple[float, float]]] = {}
    for i in range(0, len(pairs), 2):
        full, near = (float(s.nats.sum()) / tail for s in scores[i : i + 2])
        losses.setdefault(pairs[i][0], []).append((full, near))
    for read, each in losses.items():
        full, near = np.mean(each, axis=0).tolist()
        spread = float(np.std([b - a for a, b in each], ddof=1) / len(each) ** 0.5) if len(each) > 1 else None
        rows.append(
            {"length": read, "documents": len(each), "full": full, "near": near, "gain": near - full, "error": spread}
        )
    return {"context": context, "scored": tail, "lengths": rows}


def extrapolation(
    scorer: Scorer, batches: Any, *, trained: int, beyond: int, most: int, tokens: int, tell: OnProgress
) -> dict[str, Any]:
    """The loss beyond the trained length, octave by octave, beside that of the last one within: of the same documents.

    A recurrent state that was never trained to forget collapses there (2410.07145), and rotary angles are new. Read are
    documents of `beyond` times the trained length and more, or, where there are fewer than two, stretches of that many
    tokens of documents end to end, without the marks between them; neither of generated documents, whose ends differ
    from their begins. rise: nats by which the loss is higher than within; error: its standard error over sequences;
    ratio: of the two losses.

    Far parts of a document may be harder than near ones for any reader. Therefore the last `trained` / 4 targets of
    each octave beyond are scored a second time, by the last `trained` tokens alone, of which a target has from 3/4 to
    all before it: `matched` has that loss as `within`, that of the same targets with all before them as `loss`, and
    their rise, error and ratio.
    """
    read, tail = trained * beyond, max(trained // 4, 1)
    whole = [packed(text[: read + 1]) for text in _long(batches, read + 1, most)]
    texts = whole if len(whole) > 1 else _stretches(batches, read + 1, most)
    texts = texts[: max(2, tokens // read)]
    octaves = _octaves(trained, read) if texts else []
    ends = [end for _, end in octaves[1:]]
    near = [packed(t.tokens[end - trained : end + 1], slice(trained - tail, trained)) for t in texts for end in ends]
    scores = scorer([*texts, *near], tell)
    nats = [score.nats for score in scores[: len(texts)]]
    rows: list[dict[str, Any]] = []
    for n, (begin, end) in enumerate(octaves):
        rows.append({"from": begin, "to": end} | _risen([(x[trained // 2 : trained], x[begin:end]) for x in nats]))
        if n:
            windows = [score.nats[trained - tail : trained] for score in scores[len(texts) + n - 1 :: len(ends)]]
            rows[-1]["matched"] = _risen([(a, x[end - tail : end]) for a, x in zip(windows, nats, strict=True)])
            rows[-1]["matched"] |= {"within": float(np.mean(windows)), "targets": tail * len(windows)}
    facts = {"trained": trained, "sequences": len(texts), "whole": len(whole) > 1, "octaves": rows}
    return facts | {"verdict": _verdict(rows)}


def _risen(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """The mean of the second losses, and how it compares with that of the first; a pair for each sequence."""
    within, loss = np.array([[float(a.mean()), float(b.mean())] for a, b in pairs]).T
    error = float(np.std(loss - within, ddof=1) / len(pairs) ** 0.5) if len(pairs) > 1 else None
    mean, rise = float(loss.mean()), float((loss - within).mean())
    return {"loss": mean, "rise": rise, "error": error, "ratio": mean / max(float(within.mean()), 1e-12)}


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "not measured"
    for row in rows[1:]:
        same = row["matched"]
        if same["ratio"] > RISES and same["rise"] > 2 * (same["error"] or 0.0):
            return f"the loss RISES from {row['from']:,} tokens on: the model does not hold beyond its trained length"
    return f"the loss holds to {rows[-1]['to']:,} tokens"


def _octaves(trained: int, read: int) -> list[tuple[int, int]]:
    """The last one within the trained length, then those beyond: how many tokens come before."""
    octaves = [(trained // 2, trained)]
    while octaves[-1][1] < read:
        octaves.append((octaves[-1][1], min(2 * octaves[-1][1], read)))
    return octaves


def _long(batches: Any, least: int, most: int) -> list[Any]:
    """Held-out documents of so many tokens, at most so many of each source."""
    if not isinstance(batches, Batches):
        return []
    return [text for held in natural(batches) for text in islice(documents(held, least), most)]


def _stretches(batches: Any, length: int, most: int) -> list[Packed]:
    """So many tokens each of held-out documents end to end, no token twice."""
    if not isinstance(batches, Batches):
        return []
    roles = roles_of(batches.tokenizer)
    begin, around = list(roles.begin), len(roles.begin) + len(roles.closing)
    room = length - len(begin)
    there = sum(len(held) - around * len(held.ids) for held in natural(batches)) // room
    text = hay(batches, min(there, most) * room).reshape(-1, room)
    return [packed(np.concatenate([begin, each])) for each in text]
