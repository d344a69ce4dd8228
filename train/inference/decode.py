"""Decoding from a checkpoint: a prompt is read in spans, over one rank or several, and goes on a token at a time.

What has been read is held as a span leaves it to the next (`models.sequence.Memory`): a state for each recurrent layer,
the last inputs of a convolution, the keys and values of softmax layers, of a window no more than it shows. So a token
costs the same however long the text is, but for softmax layers without a window.

Several texts are decoded together, each at a place of its own: their memories are rows of one.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.pack import NO_TARGET, Packed
from models.decoding import TextRows
from models.kv_cache import KVCache
from models.lm import LM
from models.sequence import Memory
from parallel.collectives import Comm
from parallel.schedule import time_spans
from parallel.schedule.plan import Group, MicroStep
from parallel.sequence.attention import GatherKeys
from parallel.sequence.place import place
from parallel.sequence.states import GatherEffects
from train.checkpoints import checkpoint
from train.instantiate import construct
from train.rope_base import rebase

ALONE = Comm((0,), 0)


@dataclass(frozen=True)
class Sampling:
    """The drawing of a token from its logits.

    temperature: what the logits are divided by; 0 takes the likeliest token. top_p: of the likeliest tokens, how much
    probability is drawn from: the fewest that have at least so much together (nucleus sampling, 1904.09751). seed: of
    the draws; every text has its own row of them, so that it does not depend on those beside it. Raises ValueError.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature:g}: must not be negative; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p:g}: must be above 0 and at most 1")

    def start(self, sample: int = 0) -> torch.Generator:
        """The draws of a text; sample: which of several continuations of one prompt it is."""
        return torch.Generator().manual_seed(self.seed + sample if self.seed + sample < 1 << 63 else sample)

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """Raises ValueError for logits that are not finite."""
        if not bool(logits_V.isfinite().all()):
            raise ValueError("the model's logits are not finite: no token can be drawn from them")
        if self.temperature == 0:
            return int(logits_V.argmax())
        scaled_V = logits_V.cpu() / self.temperature
        if not bool(scaled_V.isfinite().all()):  # a temperature so low that no other token than the likeliest is left
            return int(logits_V.argmax())
        p_V = scaled_V.softmax(-1)
        if self.top_p == 1:
            return int(torch.multinomial(p_V, 1, generator=generator))
        p_V, order_V = p_V.sort(descending=True, stable=True)
        likely = p_V[p_V.cumsum(-1) - p_V < self.top_p]
        return int(order_V[torch.multinomial(likely, 1, generator=generator)])


@dataclass(frozen=True)
class Prefilled:
    """The state behind a text that has been read. entering: by slot. tokens: how many. logits: [vocabulary] of what
    follows, None on
    ranks that do not hold the text's end."""

    entering: dict[str, Any]
    tokens: int
    logits: Tensor | None


class Decoder:
    """A model that reads and continues texts. span: the most tokens that a rank reads at a time."""

    def __init__(self, model: LM, span: int = 8192):
        self.model = model.eval()
        self.span = span
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, model: dict[str, Any], path: Path, *, average: bool = False) -> "Decoder":
        """The model of a configuration with a checkpoint's weights, or their average, on the CPU in fp32."""
        built: LM = construct(model)
        weights = built.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that no process group is there; none is needed
            checkpoint.read({"model": weights}, path, alone=True)
            if average:
                parameters = {name: weights[name] for name, _ in built.named_parameters()}
                checkpoint.read({"average": {"mean": parameters}}, path, alone=True)
        built.load_state_dict(weights)
        rebase(built, checkpoint.manifest(path).get("rope_theta"))
        return cls(built)

    @torch.no_grad()
    def read(self, tokens: list[int], comm: Comm = ALONE) -> Prefilled:
        """Reads a text of at least one token. With several ranks each takes a part of every span, and all of them have
        what the text leaves; a text of fewer tokens than ranks is read by each of them. Collective."""
        if len(tokens) < comm.size:
            scores = self.read(tokens)
            return scores if comm.rank == comm.size - 1 else Prefilled(scores.entering, scores.tokens, None)
        group = Group(tuple(range(comm.size)), (0,), ((),) * comm.size)
        spans = time_spans.count(MicroStep((group,)), (len(tokens),), self.span)
        text, memory = _packed(tokens), Memory()
        for span in time_spans.in_time(group, (len(tokens),), spans):
            placed = place(
                span,
                [text],
                comm,
                device=self.device,
                recurrence=GatherEffects(),
                attention=GatherKeys(),
                memory=memory,
            )
            logits = self.model(placed.tokens, placed.seq, last=1).logits[0, -1]
            memory.advance()
        return Prefilled(memory.entering, len(tokens), logits if comm.rank == comm.size - 1 else None)

    def extend(
        self,
        texts: Sequence[Prefilled],
        count: int,
        sampling: Sampling,
        take: Callable[[int, int], bool],
        *,
        samples: int = 1,
    ) -> None:
        """Continues texts together by at most `count` tokens each: `take(text, token)` is told every one of them, and
        says whether that text goes on. samples: so many texts on end have been read from one prompt, and part."""
        # Inference mode costs an operator less than no_grad does; sharded weights are gathered into tensors of before.
        plain = all(type(p) is nn.Parameter for p in self.model.parameters())
        with torch.inference_mode() if plain else torch.no_grad():
            self._extend(texts, count, sampling, take, samples)

    def _extend(
        self,
        texts: Sequence[Prefilled],
        count: int,
        sampling: Sampling,
        take: Callable[[int, int], bool],
        samples: int,
    ) -> None:
        rows, draws = list(range(len(texts))), [sampling.start(text % samples) for text in range(len(texts))]
        seq = TextRows(_joined([text.entering for text in texts]), [text.tokens for text in texts], self.device)
        logits = [text.logits for text in texts]
        for left in range(count, 0, -1):
            drawn = [sampling.draw(each, draws[row]) for row, each in zip(rows, logits, strict=True)]  # type: ignore[arg-type]
            going = [i for i, (row, token) in enumerate(zip(rows, drawn, strict=True)) if take(row, token)]
            if not going or left == 1:
                return
            if len(going) < len(rows):
                seq.keep(going)
                rows, drawn = ([xs[i] for i in going] for xs in (rows, drawn))
            tokens = torch.tensor(drawn, device=self.device).unsqueeze(1)
            logits = list(self.model(tokens, seq).logits[:, -1])
            seq.advance()


def _packed(tokens: list[int]) -> Packed:
    starts = np.zeros(len(tokens), dtype=bool)
    starts[0] = True
    return Packed(np.array(tokens), np.full(len(tokens), NO_TARGET), starts)


def _joined(entering: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what several texts have left, as rows of one, in memory of their own: decoding changes it in place. Keys
    and values stay a list, a cache for each text: `TextRows` places them once it knows what a layer sees of them."""
    return {
        slot: values if isinstance(values[0], KVCache) else torch.cat(values)
        for slot, values in ((slot, [each[slot] for each in entering]) for slot in entering[0])
    }
