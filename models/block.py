"""A layer: a sequence mixer, then a feed-forward, each with a norm before it, behind it, or both."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.attnres import DepthAttention
from models.cross_layer import ALONE, Depth, build_with
from models.hyper import HyperConnection
from models.linear import Linear, cast_together
from models.moe import Routing
from models.norm import NormKind, norm_of
from models.sequence import Sequence
from models.width import UNDIVIDED, Width

Factory = Callable[..., nn.Module]
NormPlace = Literal["pre", "post", "both"]
ResidualName = Literal["input", "normed"]


class Block(nn.Module):
    """Any mixer goes with any feed-forward.

    mixer: the part in which a token sees those before it: a class of `models.mixers`; null for none, and no norm for
    it: a layer that is its feed-forward alone, as in Nemotron-H (2504.03624). ffn: the part that then treats each token
    by itself: `models.MoE`, or the dense `models.SwiGLU`, `models.MLP` or `models.ChannelMix`, which take `hidden`,
    their width; null for none, and no norm for it: a layer that is its mixer alone, as Mamba's are (2312.00752).
    beside: a second mixer that reads what the first one reads, and whose output is added to its, as attention beside
    Mamba-2 in Falcon-H1 (2507.22448); null for none. norms: pre normalises what the two read, post what they add to the
    residual stream (OLMo-2, 2501.00656), both does both (Gemma 2, 2408.00118). norm: rms, or layer for LayerNorm with a
    bias. norm_eps: epsilon that these norms add to the mean square. residual: what a part's output is added to: its
    input, or that input normed, as in MiniMax-01 (2501.08313). mixer_residual_scale, ffn_residual_scale: factor of that
    where the mixer, and where the feed-forward, adds to it.

    x [B, T, D] -> [B, T, D], where a mixture of experts sent its tokens, and what the layer hands to later ones that
    couple with it (`models.cross_layer`): None where it was `handed` that of an earlier one. past [S, B, T, D]: the
    sums of blocks of layers before, where layers read the depth by attention (`models.attnres`): x is then the sum of
    this layer's block so far, and means nothing for the first of a block. With several residual streams
    (`models.hyper`) x is [S, B, T, D], and so is what leaves.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: Factory | None,
        ffn: Factory | None,
        slot: str,
        depth: Depth = ALONE,
        beside: Factory | None = None,
        norms: NormPlace = "pre",
        norm: NormKind = "rms",
        norm_eps: float = 1e-5,
        residual: ResidualName = "input",
        mixer_residual_scale: float = 1.0,
        ffn_residual_scale: float = 1.0,
    ):
        super().__init__()
        if norms not in get_args(NormPlace):
            raise ValueError(f"norms={norms}: must be one of {', '.join(get_args(NormPlace))}")
        if residual not in get_args(ResidualName):
            raise ValueError(f"residual={residual}: must be one of {', '.join(get_args(ResidualName))}")
        if residual == "normed" and norms == "post":
            raise ValueError("residual=normed: must be input with norms=post: nothing is normed before a part reads it")
        scales = {"mixer_residual_scale": mixer_residual_scale, "ffn_residual_scale": ffn_residual_scale}
        for key, scale in scales.items():
            if not 0 < scale < math.inf:
                raise ValueError(f"{key}={scale}: must be above 0")
        several = {"attnres_block": depth.attnres_block, "hyper_connections": depth.hyper and depth.hyper.streams}
        other = next((f"{key}={value}" for key, value in several.items() if value is not None), None)
        if other is not None and (residual != "input" or set(scales.values()) != {1.0}):
            key = (
                f"residual={residual}" if residual != "input" else next(f"{k}={s}" for k, s in scales.items() if s != 1)
            )
            raise ValueError(f"{key}: must be its default with {other}, which has no single stream")
        if mixer is None and (ffn is None or beside is not None):
            raise ValueError(f"mixer=null: must be a mixer where {'ffn is null' if ffn is None else 'beside is one'}")
        make = norm_of(norm)

        def normed(place: NormPlace, there: bool) -> nn.Module:
            return make(dim, eps=norm_eps) if there and norms in (place, "both") else nn.Identity()

        self.slot = slot
        self.from_normed, self.scales = residual == "normed", (mixer_residual_scale, ffn_residual_scale)
        self.mixer_norm, self.mixer_post_norm = (normed(place, mixer is not None) for place in ("pre", "post"))
        self.mixer = None if mixer is None else build_with(mixer, dim=dim, depth=depth)
        self.beside = None if beside is None else build_with(beside, dim=dim, depth=depth)
        self.ffn_norm, self.ffn_post_norm = (normed(place, ffn is not None) for place in ("pre", "post"))
        self.ffn = None if ffn is None else build_with(ffn, dim=dim, depth=depth, slot=f"{slot}/ffn")
        self.width: Width = UNDIVIDED
        self.depth, reads = depth, depth.attnres_block is not None
        self.mixer_read = DepthAttention(dim) if reads and mixer is not None else None
        self.ffn_read = DepthAttention(dim) if reads and ffn is not None else None
        here = [mixer is not None, ffn is not None]
        self.mixer_streams, self.ffn_streams = (
            HyperConnection(dim, depth.hyper, 2 * depth.layer + part) if depth.hyper is not None and there else None
            for part, there in enumerate(here)
        )
        self.couplings = getattr(self.mixer, "couplings", ())
        self.hands: str | None = getattr(self.mixer, "hands", None)
        self.linears = [module for module in self.modules() if isinstance(module, Linear)]
        if getattr(self.beside, "couplings", ()) or getattr(self.beside, "hands", None):
            name = type(self.beside).__name__
            raise ValueError(f"beside={name}: must be a mixer that shares nothing with those of other layers")

    def forward(
        self,
        x_BTD: Tensor,
        seq: Sequence,
        handed: Tensor | None = None,
        *,
        past: Tensor | None = None,
        **coupled: Tensor | None,
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        with cast_together(self.linears, x_BTD):
            return self._run(x_BTD, seq, handed, past, coupled)

    def _run(
        self,
        x_BTD: Tensor,
        seq: Sequence,
        handed: Tensor | None,
        past: Tensor | None,
        coupled: dict[str, Tensor | None],
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        begun = past is None or not self.depth.opens  # whether x is a sum of something
        rows, made_BTD, routing = (seq.positions.shape[0], seq.positions.shape[1]), None, None
        if self.mixer is not None:
            read_BTD, leave = _enter(self.mixer_streams, x_BTD)
            normed_BTD = self.mixer_norm(_read(self.mixer_read, past, read_BTD, begun))
            entered_BTD = self.width.enter(normed_BTD, rows)
            if self.hands is None:
                y_BTD = self.mixer(entered_BTD, seq, slot=self.slot, **coupled)
            else:
                hand = self.mixer.handing
                y_BTD, made_BTD = hand(entered_BTD, seq, handed, slot=self.slot, **coupled)  # type: ignore[operator]
            if self.beside is not None:
                y_BTD = y_BTD + self.beside(entered_BTD, seq, slot=f"{self.slot}/beside")
            y_BTD = self.mixer_post_norm(self.width.leave(y_BTD))
            x_BTD, begun = leave(self._stream(x_BTD, normed_BTD, self.scales[0]), y_BTD) if begun else y_BTD, True
        if self.ffn is not None:
            read_BTD, leave = _enter(self.ffn_streams, x_BTD)
            normed_BTD = self.ffn_norm(_read(self.ffn_read, past, read_BTD, begun))
            y_BTD, routing = self.ffn(self.width.enter(normed_BTD, rows), seq)
            y_BTD = self.ffn_post_norm(self.width.leave(y_BTD))
            x_BTD = leave(self._stream(x_BTD, normed_BTD, self.scales[1]), y_BTD) if begun else y_BTD
        return x_BTD, routing, made_BTD

    def _stream(self, x_BTD: Tensor, normed_BTD: Tensor, scale: float) -> Tensor:
        """The residual stream that a part's output is added to."""
        x_BTD = normed_BTD if self.from_normed else x_BTD
        return x_BTD if scale == 1 else x_BTD * scale


def _enter(streams: HyperConnection | None, x_BTD: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The stream that a part of a layer reads, and the sum of the residual stream and what it makes."""
    if streams is None:
        return x_BTD, torch.add
    read_BTD, leave = streams(x_BTD)
    return read_BTD, lambda residual, y_BTD: leave(y_BTD)


def _read(reading: DepthAttention | None, past_SBTD: Tensor | None, x_BTD: Tensor, begun: bool) -> Tensor:
    """The input of a part of a layer: the stream, or a mean over the depth."""
    if reading is None or past_SBTD is None:
        return x_BTD
    read_BTD: Tensor = reading(past_SBTD, x_BTD if begun else None)
    return read_BTD
