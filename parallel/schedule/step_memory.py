"""The most bytes that a rank holds at a time in a step: its states, and a walk through the step's instants.

A layer's tensors are known by themselves (`models.footprint`). FSDP adds what it gathers and reduces around them: a
layer's weights whole while it computes, in the forward pass beside the buffer that they arrived in, in the backward
pass beside those of the layer before, which are fetched meanwhile; gradients whole, beside the buffer that they leave
in. Gradients of all micro-steps but the last stay whole, for they are reduced once a step; so do weights that are not
let go after a forward pass. So the peak lies at one of a few instants a layer:

    forward i    saved of the layers before i, and the most of i's forward pass; its weights, and what they came in
    head         saved of all layers, and the most of the loss
    backward i   saved of the layers before i, and the most of i's backward pass; gradients of the layers after i;
                 before the last micro-step gradients and, where they stay, weights of all layers
    reduce i     saved of the layers before i, i's gradients twice
    end          all gradients, the root's twice
    update       the gradients of this rank's shares, and what the optimizer makes beside them

A backward pass that is taken in two leaves more than it found: saved tensors stay for the weights' half, and gradients
between layers' operators beside them.

States, there all the time, are weights, the optimizer's moments, averages. Each instant has its bytes by parts, so
that whoever has too little memory sees which part to make smaller. Nothing that is not a tensor of the step is counted:
neither the runtime, nor what an allocator keeps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Parts = dict[str, float]

STATES, GRADIENTS, GATHERED, ACTIVATIONS, MESSAGES, UPDATE = (
    "weights, moments",
    "gradients",
    "gathered weights",
    "activations",
    "messages",
    "optimizer's step",
)


class LayerMemory(NamedTuple):
    """Bytes of a layer on a rank. saved, forward, backward: `models.footprint.Footprint.under`. whole, shard: of its
    gradients, whole and as they are sharded. sent: the most of its messages to other ranks at a time, in either pass.
    half: left by half of a backward pass, where these are taken in two. few: of its gathered weights, where these have
    fewer bits than gradients.
    """

    saved: float
    forward: float
    backward: float
    whole: float
    shard: float
    sent: float = 0.0
    half: float = 0.0
    few: float | None = None

    @property
    def weights(self) -> float:
        """Bytes of its weights, gathered."""
        return self.whole if self.few is None else self.few


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """A rank's step. Bytes throughout.

    layers: those of the rank, in their order. head: of the norm, the head and the loss, whose weights are the `root`'s.
    root, root_shard: weights outside of the layers, whole and as they are sharded. entering: of what enters the first
    layer. states: weights, moments and averages. alone: FSDP shards over this rank only, and gathers nothing. reshard:
    a layer's weights are let go after its forward pass; else they stay until the last micro-step's backward pass.
    whole: no weights are let go before the step ends, as a pipeline that takes backward passes in two has it.
    micro_steps: of the step. flying: micro-steps in flight, the one that computes among them, over those that this
    rank's layers keep; and those of which half a backward pass is done.
    update: the most that the optimizer makes at a time beside states and gradients.
    """

    layers: Sequence[LayerMemory]
    head: LayerMemory | None
    root: float
    entering: float
    states: float
    alone: bool = False
    reshard: bool = True
    whole: bool = False
    micro_steps: int = 1
    flying: Sequence[tuple[float, float]] = ((1.0, 0.0),)
    root_shard: float = 0.0
    update: float = 0.0

    def peak(self) -> Parts:
        """The parts of the fullest instant; their sum is the peak."""
        return max(self._instants(), key=lambda parts: sum(parts.values()))

    def most(self) -> float:
        return sum(self.peak().values())

    def _instants(self) -> Iterator[Parts]:
        layers, buffers = self.layers, 0.0 if self.alone else 1.0
        own = sum(each.saved for each in layers) + self.entering
        half = sum(each.half for each in layers)
        waiting = max((held - 1) * own + halved * half for held, halved in self.flying)  # of other micro-steps
        accumulated = sum(each.whole for each in layers) + self.root if self.micro_steps > 1 else 0.0
        held, stays, buffer = self.entering + waiting, 0.0, 0.0
        # Where weights stay, the first micro-step gathers them, beside no gradients, and later ones have both whole.
        every, again = sum(each.weights for each in layers), self._stays and self.micro_steps > 1
        before_this = 0.0 if again else accumulated
        for each in layers:
            buffer = each.weights * buffers
            yield self._instant(held + each.forward, self.root + stays + each.weights + buffer, before_this, each.sent)
            if again:
                yield self._instant(held + each.forward, self.root + every, accumulated, each.sent)
            held += each.saved
            stays = stays + each.weights if self._stays else 0.0
        of_head = halves = 0.0
        if self.head is not None:
            for most in (self.head.forward, self.head.backward):
                yield self._instant(held + most, self.root + stays + buffer, before_this)
                if again:
                    yield self._instant(held + most, self.root + every, accumulated)
            of_head = self.head.whole  # its gradient stays until the root's leave
        done, leaving = 0.0, 0.0
        for i in range(len(layers) - 1, -1, -1):
            each, before = layers[i], layers[i - 1].weights * buffers if i else 0.0
            held -= each.saved
            weights = stays if self._stays else before + each.weights
            gradients = accumulated + of_head + done
            if again:  # none but the last lets go of weights, or sends gradients
                yield self._instant(halves + held + each.backward, self.root + every, accumulated + of_head, each.sent)
            yield self._instant(halves + held + each.backward, self.root + weights + leaving, gradients, each.sent)
            halves += each.half
            if accumulated == 0:  # its weights are let go, and its gradients copied into what leaves
                gradients += each.whole
            yield self._instant(halves + held, self.root + weights, gradients)
            stays -= 0.0 if self.whole else each.weights
            leaving = each.whole * buffers
            done += each.shard
        # The root's gradients leave last; that of the embedding is dense.
        yield self._instant(waiting, 2 * self.root, accumulated + done + self.root)
        shards = sum(each.shard for each in layers) + self.root_shard
        yield self._instant(0.0, 0.0, shards, update=self.update)

    @property
    def _stays(self) -> bool:
        return self.whole or not self.reshard

    def _instant(
        self, activations: float, gathered: float, gradients: float, sent: float = 0.0, update: float = 0.0
    ) -> Parts:
        parts = {
            STATES: self.states,
            GRADIENTS: gradients,
            GATHERED: gathered,
            ACTIVATIONS: activations,
            MESSAGES: sent,
            UPDATE: update,
        }
        return {name: size for name, size in parts.items() if size > 0}
