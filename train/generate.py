"""Decoding from a checkpoint on one device: constant memory a token in recurrent layers, cached keys in softmax."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.lm import LM
from models.sequence import Memory, Whole
from train import checkpoint
from train.construct import construct
from train.context import rebase


class Decoder:
    """A model and the memory of what it has read."""

    def __init__(self, model: LM):
        self.model = model.eval()
        self.memory = Memory()
        self.read = 0

    @classmethod
    def load(cls, model: dict[str, Any], path: Path) -> "Decoder":
        """The model of a configuration with a checkpoint's weights, on the CPU in fp32."""
        built: LM = construct(model)
        weights = built.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that no process group is there; none is needed
            checkpoint.read({"model": weights}, path, alone=True)
        built.load_state_dict(weights)
        rebase(built, checkpoint.manifest(path).get("rope_theta"))
        return cls(built)

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> Tensor:
        """Reads tokens of the current document; the logits [vocabulary] of what follows."""
        positions = torch.arange(self.read, self.read + len(tokens)).unsqueeze(0)
        logits = self.model(torch.tensor([tokens]), Whole.of(positions, memory=self.memory)).logits[0, -1]
        self.memory.advance()
        self.read += len(tokens)
        return logits

    def continue_from(self, prompt: list[int], count: int, *, temperature: float, seed: int) -> Iterator[int]:
        """`count` more tokens, one at a time; the same for the same seed. temperature 0 takes the likeliest."""
        generator = torch.Generator().manual_seed(seed)
        logits = self.feed(prompt)
        for _ in range(count):
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            yield token
            logits = self.feed([token])
