"""The cost of a window to a trained model, layer by layer: a conversion lets those layers stay that need the most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.hub.architecture import Node
from models.kernels.cross_entropy import NO_TARGET
from models.sequence import Whole
from train.inference.decode import Decoder

TOKENS = 16_384  # that are read, once as the model is and once for each layer
WINDOW = 64  # of the layer that is scored, where the conversion leaves none


@torch.no_grad()
def score(path: Path, model: Node, layers: list[int], window: int | None, batches: Any, seed: int) -> dict[int, float]:
    """By layer, the mean loss in nats a token where its attention alone sees so many tokens, less the model's own.

    path: the checkpoint, or folder of Hugging Face's. model: its section. layers: of softmax attention. window: null
    for 64. batches: of a run; the first ones of `seed` are read. The model is read whole, in fp32, by this process.
    """
    lm = Decoder.load(model, path).model
    read, sequences, step = 0, list[Any](), 0
    while read < TOKENS:
        sequences += (batch := batches.batch(seed, step))
        read, step = read + sum(len(s.tokens) for s in batch), step + 1
    whole, costs = _loss(lm, sequences), dict[int, float]()
    for i in layers:
        attention: Any = lm.layers[str(i)].mixer
        before, attention.window = attention.window, window or WINDOW
        costs[i] = _loss(lm, sequences) - whole
        attention.window = before
    return costs


def _loss(lm: Any, sequences: list[Any]) -> float:
    nats, targets = 0.0, 0
    for s in sequences:
        tokens, asked, positions = (torch.from_numpy(x)[None] for x in (s.tokens, s.targets, s.positions))
        nats += lm(tokens, Whole.of(positions), asked).cross_entropy.item()
        targets += int((asked != NO_TARGET).sum())
    return nats / max(targets, 1)
