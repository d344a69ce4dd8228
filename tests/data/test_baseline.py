import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from data.baseline import ngram_losses
from data.pack import NO_TARGET, Packed
from data.tokenizer import Bytes


def packed(tokens: list[int], targets: list[int], starts: list[int]) -> Packed:
    return Packed(np.array(tokens), np.array(targets), np.isin(np.arange(len(tokens)), [0, *starts]))


def drawn(seed: int, count: int, length: int, alphabet: list[int]) -> list[Packed]:
    """Windows with documents, starts without DOCUMENT and the other way round, and places without a target."""
    draw = random.Random(seed)
    windows = []
    for _ in range(count):
        stream = draw.choices([*alphabet, Bytes.DOCUMENT], k=length + 1)
        targets = [NO_TARGET if draw.random() < 0.1 else token for token in stream[1:]]
        starts = [i for i in range(length) if draw.random() < (0.8 if stream[i] == Bytes.DOCUMENT else 0.05)]
        windows.append(packed(stream[:-1], targets, starts))
    return windows


def examples(windows: list[Packed]) -> list[tuple[tuple[int, ...], int]]:
    """(all symbols of the piece so far, the byte after them)."""
    found: list[tuple[tuple[int, ...], int]] = []
    history: tuple[int, ...] = ()
    for window in windows:
        for token, target, start in zip(window.tokens, window.targets, window.starts, strict=True):
            history = (int(token),) if start else (*history, int(token))
            if 0 <= target < 256:
                found.append((history, int(target)))
    return found


def slow_losses(train: list[Packed], heldout: list[Packed], longest: int) -> list[float]:
    """Witten-Bell from its definition, with dictionaries, by recursion."""
    followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for history, byte in examples(train):
        for order in range(min(longest, len(history)) + 1):
            followers[history[len(history) - order :]][byte] += 1

    def probability(byte: int, context: tuple[int, ...]) -> float:
        shorter = probability(byte, context[1:]) if context else 1 / 256
        if context not in followers:
            return shorter
        seen = followers[context]
        return (seen[byte] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    scored = examples(heldout)
    return [
        -sum(math.log(probability(byte, history[max(len(history) - order, 0) :])) for history, byte in scored)
        / len(scored)
        for order in range(longest + 1)
    ]


@pytest.mark.parametrize("length", [1, 5, 100])
def test_losses_equal_the_definition(length: int) -> None:
    train = drawn(0, 2000 // length, length, [0, 1, 97, 255])
    heldout = drawn(1, 500 // length, length, [0, 1, 97, 98, 255])
    losses = ngram_losses(iter(train), iter(heldout), orders=(0, 1, 2, 4, 6))
    slow = slow_losses(train, heldout, 6)
    assert list(losses) == [0, 1, 2, 4, 6]
    for order, loss in losses.items():
        assert loss == pytest.approx(slow[order], rel=1e-12)


def test_a_unigram_by_hand() -> None:
    train = [packed([256, 97, 97, 98], [97, 97, 98, 256], [])]
    heldout = [packed([256, 97, 99], [97, NO_TARGET, 99], [])]
    seen, unseen = (2 + 2 / 256) / (3 + 2), (2 / 256) / (3 + 2)
    assert ngram_losses(train, heldout, orders=(0,))[0] == pytest.approx(-(math.log(seen) + math.log(unseen)) / 2)


def test_a_context_stops_at_the_start_of_its_piece() -> None:
    """Only the symbol before the start tells the byte after it."""
    draw = random.Random(0)
    tokens = [token for _ in range(500) for token in [draw.choice([97, 98]), 256]]
    targets = [before if token == 256 else NO_TARGET for before, token in zip([0, *tokens], tokens, strict=False)]
    joined = packed(tokens, targets, [])
    pieces = packed(tokens, targets, [i for i, token in enumerate(tokens) if token == 256])
    assert ngram_losses([joined], [joined], orders=(2,))[2] < 0.1
    losses = ngram_losses([pieces], [pieces], orders=(1, 2))
    assert losses[2] == losses[1] > 0.6


def test_training_without_a_byte_leaves_the_uniform_model() -> None:
    heldout = drawn(0, 1, 50, [97, 98])
    losses = ngram_losses([packed([256], [256], [])], heldout)
    assert losses == pytest.approx(dict.fromkeys((0, 1, 4), math.log(256)))


def test_refusals() -> None:
    windows = drawn(0, 1, 50, [97, 98])
    with pytest.raises(ValueError, match="from 0 to 6"):
        ngram_losses(windows, windows, orders=(0, 7))
    with pytest.raises(ValueError, match="no byte to score"):
        ngram_losses(windows, [packed([256], [256], [])])
