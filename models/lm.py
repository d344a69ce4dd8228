"""The language model: embedding, a pattern of blocks, and a head over the vocabulary."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attnres import SUM, DepthAttention
from models.axes import declare, normal, positive
from models.block import Factory
from models.cross_layer import Coupled, Depth
from models.hyper import Hyper, HyperMixing
from models.kernels.cross_entropy import softcapped
from models.linear import Linear
from models.moe import Routed, Routing, balance, mixtures
from models.mtp import Ahead, MTPModule
from models.norm import NormKind, norm_of
from models.pattern import dense_front, unroll
from models.sequence import Sequence, counting
from models.width import UNDIVIDED, Width

MOST_AHEAD = 64  # modules of multi-token prediction; published models have one to eight heads


class Output(NamedTuple):
    logits: Tensor  # [B, T, vocabulary]; empty where targets were given
    balance: Tensor  # scalar: the experts' balance loss summed over counted tokens; 0 without experts
    load: dict[str, Tensor]  # by layer, how many choices each expert got [E]
    z: Tensor  # scalar: the routers' z-loss summed over counted tokens; 0 without experts
    dropped: dict[str, Tensor]  # by layer whose experts have a capacity, how many choices found no place
    cross_entropy: Tensor | None = None  # scalar: nats summed over the targets, where they were given
    # Where targets were given and no gradient is taken:
    correct: Tensor | None = None  # scalar int64: targets that are the likeliest token
    nats: Tensor | None = None  # [B, T], each target's, 0 where there is none
    right: Tensor | None = None  # [B, T] bool, whether it is the likeliest token
    # Where tokens ahead were given: [M], each MTP module's nats summed over its targets; without targets its logits
    # [M, B, T, vocabulary].
    ahead: Tensor | None = None
    # Of indices, scalar, summed over counted tokens; their layers have differentiated it.
    index_loss: Tensor | None = None


class PartOutput(NamedTuple):
    """The results of some of the layers."""

    passed: Tensor  # [S + H, B, T, D]: S residual streams, and H tensors that later layers take; empty after the last
    output: Output  # of these layers alone; without the last of the model its cross-entropy is 0


class LM(nn.Module):
    """A decoder-only language model: an embedding, layers of several kinds in a pattern, a norm, and a head.

    vocabulary: rows of the embedding and of the head, at least the tokens of the tokenizer (256 bytes and the document
    mark). dim: width of the residual stream, which every mixer and feed-forward reads and writes. layers: number of
    layers, of all kinds together. pattern: the kinds of the layers by name, from the first on, repeated down to the
    last. blocks: the kinds of layer that `pattern` may name, each a mixer and a feed-forward. first_k_dense: number of
    layers, from the first, that have `dense` in place of their block's feed-forward, as in DeepSeekMoE (2401.06066).
    dense: that feed-forward. tied: true has the head multiply by the embedding instead of weights of its own.
    tied_scale: factor of a tied head's input; null for dim^-½ (T5, 1910.10683), which suits an embedding whose entries
    have variance 1, as they start here. Released models have 1. embedding_scale: factor of the embedding's output;
    Gemma has dim^½ (2403.08295). logit_softcap: c that makes logits c·tanh(logit / c), as in Gemma 2 (2408.00118); null
    for none. norm: the last norm, rms, or layer for LayerNorm with a bias. norm_eps: epsilon that it adds to the mean
    square. mtp_layers: number of modules that learn to predict the tokens after the next one (multi-token prediction,
    2412.19437, section 2.2); 0 for none. Training alone runs them. mtp_block: the kind of their layer, of `blocks`;
    null for that of the last layer. attnres_block: number of layers of a block of attention residuals, whose parts
    read a learnt mean of the embedding and of the sums of the blocks before (AttnRes, 2603.15031); null for the plain
    sum of all layers. hyper_connections: number of parallel residual streams, of which each part of a layer reads a
    weighted sum and which it mixes (hyper-connections, 2409.19606); null for one. hyper_mixing: weights of these:
    manifold for mixing matrices that are doubly stochastic (mHC, 2512.24880), dynamic for unbounded ones that depend on
    the token, static for learnt constants.

    tokens [B, T] int64 -> Output, activations and logits in the dtype of the attribute `compute`, fp32 unless set; with
    `last`, the logits of each row's last so many tokens only. With targets [B, T] int64, -100 for none, the Output has
    their cross-entropy in place of the logits, of which no more are held at a time than those of `loss_chunk` tokens.
    That happens in here because a sharded head is whole only in here. ahead: has the MTP modules run too.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        layers: int,
        pattern: list[str],
        blocks: Mapping[str, Factory],
        first_k_dense: int = 0,
        dense: Factory | None = None,
        tied: bool = False,
        tied_scale: float | None = None,
        embedding_scale: float = 1.0,
        logit_softcap: float | None = None,
        norm: NormKind = "rms",
        norm_eps: float = 1e-5,
        mtp_layers: int = 0,
        mtp_block: str | None = None,
        attnres_block: int | None = None,
        hyper_connections: int | None = None,
        hyper_mixing: HyperMixing = "manifold",
    ):
        super().__init__()
        positive(vocabulary=vocabulary, dim=dim)
        if not 0 <= mtp_layers <= MOST_AHEAD:
            raise ValueError(f"mtp_layers={mtp_layers}: must be 0 for none, or up to {MOST_AHEAD}")
        if attnres_block is not None and attnres_block < 1:
            raise ValueError(f"attnres_block={attnres_block}: must be at least 1, or null for none")
        if attnres_block is not None and hyper_connections is not None:
            raise ValueError(f"hyper_connections={hyper_connections}: must be null with attnres_block={attnres_block}")
        if mtp_block is not None and mtp_block not in blocks:
            raise ValueError(f"mtp_block={mtp_block}: must be one of {', '.join(blocks)}, or null for the last layer's")
        if norm_eps <= 0:
            raise ValueError(f"norm_eps={norm_eps}: must be above 0")
        if tied_scale is not None and (tied_scale <= 0 or not tied):
            raise ValueError(f"tied_scale={tied_scale}: must be null without a tied head, else above 0")
        if not 0 < embedding_scale < math.inf:
            raise ValueError(f"embedding_scale={embedding_scale}: must be above 0")
        if logit_softcap is not None and not 0 < logit_softcap < math.inf:
            raise ValueError(f"logit_softcap={logit_softcap}: must be above 0, or null for none")
        self.dim, self.embedding_scale, self.logit_softcap = dim, embedding_scale, logit_softcap
        self.tied_scale = dim**-0.5 if tied_scale is None else tied_scale
        self.kinds = unroll(pattern, layers, list(blocks))
        front = dense_front(first_k_dense, dense, layers)
        self.vocabulary = vocabulary
        self.width: Width = UNDIVIDED
        self.division: Any = None  # of the parameters over ranks, where there is one (`parallel.tensor`)
        self.compute = torch.float32
        self.loss_chunk: int | None = 2048
        self.embedding = declare(vocabulary, dim, axes=("vocab", "embed"), init=normal(1.0), inputs=0)
        self.hyper = Hyper.of(hyper_connections, hyper_mixing)
        self.depths = [Depth(i, layers, attnres_block, self.hyper) for i in range(layers)]
        self.layers = nn.ModuleDict(
            {
                str(i): blocks[n](dim=dim, slot=f"layers.{i}", depth=self.depths[i], **front.get(i, {}))
                for i, n in enumerate(self.kinds)
            }
        )
        self.coupled = Coupled(self.layers)
        self.hands = {name: getattr(layer, "hands", None) for name, layer in self.layers.items()}
        self.norm = norm_of(norm)(dim, eps=norm_eps)
        self.depth_read = None if attnres_block is None else DepthAttention(dim)  # of what the norm reads
        self.mtp_layers, self.mtp = mtp_layers, nn.ModuleDict()  # the number of a whole model, and those that are here
        for k in range(mtp_layers):
            kind = mtp_block or self.kinds[-1]
            block = blocks[kind](dim=dim, slot=f"mtp.{k}", depth=Depth(layers - 1, layers))
            if getattr(block, "hands", None) is not None:
                raise ValueError(f"mtp_block={kind}: must be a kind of layer that takes nothing from earlier layers")
            self.mtp[str(k)] = MTPModule(dim=dim, block=block, norm=norm, norm_eps=norm_eps)
        self.head = None if tied else Linear(dim, vocabulary, axes=("vocab", "embed"))
        # Layers with experts, and those of MTP modules: the routers' losses are means over all that run.
        self.routed = sum(name.startswith("layers.") for name in mixtures(self))
        self.routed_ahead = len(mixtures(self)) - self.routed

    def forward(
        self,
        tokens_BT: Tensor,
        seq: Sequence,
        targets_BT: Tensor | None = None,
        *,
        last: int | None = None,
        ahead: Ahead | None = None,
        objective: Callable[..., Any] | None = None,
    ) -> Any:
        if objective is not None:  # of `models.distillation`: in here, where sharded weights are whole
            return objective(self, tokens_BT, seq, targets_BT)
        x_BTD, _, routings = self.run(range(len(self.kinds)), self.embed(tokens_BT), {}, seq)
        counts = balance(routings, seq, layers=self._averaged(ahead))
        output = self.finish(x_BTD, counts, seq, targets_BT, ahead, last)
        return output._replace(index_loss=seq.index_losses.take())

    def part(
        self,
        layers: range,
        tokens_BT: Tensor,
        seq: Sequence,
        targets_BT: Tensor | None = None,
        passed: Tensor | None = None,
        ahead: Ahead | None = None,
    ) -> PartOutput:
        """`forward` with targets, of these layers alone. The first of them embed the tokens, the last score the
        targets; others take what the layers before them passed on, [S + H, B, T, D]. All else may be missing.

        The parts' routers' losses and cross-entropies add up to those of `forward`.
        """
        if passed is None:
            x_BTD, handed = self.embed(tokens_BT), dict[str, Tensor]()
        else:
            names = self.crossing(layers.start)
            x_BTD, values = passed[: len(passed) - len(names)], passed[len(passed) - len(names) :]
            x_BTD, handed = x_BTD if self.hyper else x_BTD.squeeze(0), dict(zip(names, values.unbind(), strict=True))
        x_BTD, handed, routings = self.run(layers, x_BTD, handed, seq)
        counts = balance(routings, seq, layers=self._averaged(ahead) or self.routed)
        if layers.stop == len(self.kinds):
            assert targets_BT is not None
            output = self.finish(x_BTD, counts, seq, targets_BT, ahead)
            return PartOutput(x_BTD.new_empty(0), output._replace(index_loss=seq.index_losses.take()))
        streams = x_BTD.unbind() if self.hyper else (x_BTD,)
        leaving = torch.stack([*streams, *(handed[name] for name in self.crossing(layers.stop))])
        output = Output(x_BTD.new_empty(0), *counts, torch.zeros((), device=x_BTD.device))
        return PartOutput(leaving, output._replace(index_loss=seq.index_losses.take()))

    def _averaged(self, ahead: Ahead | None) -> int | None:
        """The layers with experts over which routers' losses are means where MTP modules run; None where none do."""
        return None if ahead is None else self.routed + self.routed_ahead

    def finish(
        self,
        x_BTD: Tensor,
        counts: Routed,
        seq: Sequence,
        targets_BT: Tensor | None,
        ahead: Ahead | None,
        last: int | None = None,
    ) -> Output:
        """The output, from the residual stream that leaves the last layer and from what routers did."""
        x_BTD = self.norm(x_BTD)
        whole_BTD, found = self.width.enter(x_BTD, (seq.positions.shape[0], seq.positions.shape[1])), None
        if ahead is not None:
            found, counts = self._look_ahead(x_BTD, counts, seq, ahead, scored=targets_BT is not None)
        if targets_BT is None:
            logits_BTV = self.unembed(whole_BTD if last is None else whole_BTD[:, -last:])
            return Output(logits_BTV, *counts, ahead=found)
        return Output(x_BTD.new_empty(0), *counts, *self.score(whole_BTD, targets_BT))._replace(ahead=found)

    def _look_ahead(
        self, x_BTD: Tensor, counts: Routed, seq: Sequence, ahead: Ahead, *, scored: bool
    ) -> tuple[Tensor, Routed]:
        """`Output.ahead` of the normalised residual stream, nats where `scored`; and counts with those of the modules'
        routers."""
        rows, found = (seq.positions.shape[0], seq.positions.shape[1]), []
        for (name, module), tokens_BT, targets_BT in zip(self.mtp.items(), *ahead, strict=True):
            missing_BT = tokens_BT < 0
            there = counting(seq, seq.counted & ~missing_BT)
            x_BTD, routing = module(x_BTD, there, self.embed(tokens_BT.clamp_min(0), missing_BT))
            if routing is not None:
                own = balance({f"mtp.{name}": routing}, there, layers=self._averaged(ahead))
                counts = Routed(
                    counts.balance + own.balance,
                    counts.load | own.load,
                    counts.z + own.z,
                    counts.dropped | own.dropped,
                )
            whole_BTD = self.width.enter(x_BTD, rows)
            found.append(self.score(whole_BTD, targets_BT)[0] if scored else self.unembed(whole_BTD))
        return torch.stack(found), counts

    def crossing(self, layer: int) -> list[str]:
        """The names of what layers before this one hand to it or to a later one, sums of blocks of theirs among it."""
        before, after = ({self.hands[str(i)] for i in r} for r in (range(layer), range(layer, len(self.kinds))))
        sums = [_sum(i) for i in range(self._sums(layer))]
        return [*sorted(name for name in before & after if name is not None), *sums]

    def passing(self, layer: int) -> int:
        """Counts the tensors [B, T, D] that layers before this one pass on to it."""
        return (1 if self.hyper is None else self.hyper.streams) + len(self.crossing(layer))

    def _sums(self, layer: int) -> int:
        """The sums of blocks that there are before a layer."""
        return self.depths[layer - 1].sums if layer else 0

    def embed(self, tokens_BT: Tensor, missing_BT: Tensor | None = None) -> Tensor:
        x_BTD = self.width.embed(tokens_BT, self.embedding, self.vocabulary)
        x_BTD = x_BTD if missing_BT is None else x_BTD.masked_fill(missing_BT.unsqueeze(-1), 0.0)
        x_BTD = self.width.leave(x_BTD.to(self.compute))
        return x_BTD if self.embedding_scale == 1 else x_BTD * self.embedding_scale

    def run(
        self, layers: range, x_BTD: Tensor, handed: dict[str, Tensor], seq: Sequence
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Routing]]:
        """The residual stream after these layers, what they hand on, and where their routers sent tokens. Between
        layers there are several streams, [S, B, T, D], where the model has them."""
        routings: dict[str, Routing] = {}
        if self.hyper is not None and layers.start == 0:
            x_BTD = x_BTD.expand(self.hyper.streams, *x_BTD.shape)
        rows, past = self.coupled(), _stacked(handed, self._sums(layers.start))
        for name in map(str, layers):
            if (depth := self.depths[int(name)]).opens:
                handed[_sum(depth.sums - 1)] = x_BTD
                past = _stacked(handed, depth.sums)
            if past is not None:
                rows[name] = {**rows.get(name, {}), "past": past}
            hands = self.hands[name]
            handed_over = None if hands is None else handed.get(hands)
            x_BTD, routing, made = self.layers[name](x_BTD, seq, handed_over, **rows.get(name, {}))
            if made is not None and hands is not None:
                handed[hands] = made
            if routing is not None:
                routings[f"layers.{name}"] = routing
        if self.depth_read is not None and layers.stop == len(self.kinds):
            x_BTD = self.depth_read(past, x_BTD)
        if self.hyper is not None and layers.stop == len(self.kinds):
            x_BTD = x_BTD.mean(0)
        return x_BTD, handed, routings

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of the normalised residual stream."""
        if self.head is not None:
            logits_BTV = self.head(x_BTD)
        else:
            logits_BTV = F.linear(x_BTD * self.tied_scale, self.embedding.to(x_BTD.dtype))
        return self.width.join(softcapped(logits_BTV, self.logit_softcap), self.vocabulary)

    def score(self, x_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, ...]:
        """The same logits' cross-entropy in nats, summed over the targets; without gradients, all of `Scored`."""
        x_BTD, weight_VD = self.before_head(x_BTD)
        how: dict[str, Any] = {"chunk": self.loss_chunk, "softcap": self.logit_softcap}
        if torch.is_grad_enabled():
            return (self.width.cross_entropy(x_BTD, weight_VD, targets_BT, self.vocabulary, **how),)
        return self.width.score(x_BTD, weight_VD, targets_BT, self.vocabulary, **how)

    def before_head(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the weight [V, D] of the head's product, from the normalised residual stream."""
        if self.head is None:
            return x_BTD * self.tied_scale, self.embedding
        return x_BTD, self.head.weight


def _sum(block: int) -> str:
    """The name under which the sum of a block of layers is handed on; 0 is the embedding."""
    return f"{SUM}{block}"


def _stacked(handed: dict[str, Tensor], count: int) -> Tensor | None:
    """The first sums of blocks that layers have handed on, [S, B, T, D]; None of none."""
    return torch.stack([handed[_sum(i)] for i in range(count)]) if count else None
