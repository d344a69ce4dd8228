"""A layer: a sequence mixer, then a feed-forward, each with a norm before it, behind it, or both."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor, nn

from models.cross_layer import ALONE, Depth, build_with
from models.moe import Routing
from models.norm import RMSNorm
from models.sequence import Sequence
from models.width import UNDIVIDED, Width

Factory = Callable[..., nn.Module]
NormPlace = Literal["pre", "post", "both"]


class Block(nn.Module):
    """Any mixer goes with any feed-forward.

    mixer: the part in which a token sees those before it: a class of `models.mixers`. ffn: the part that then treats
    each token by itself: `models.MoE`, or the dense `models.SwiGLU`, `models.MLP` or `models.ChannelMix`, which take
    `hidden`, their width; null for none, and no norm for it: a layer that is its mixer alone, as Mamba's are
    (2312.00752). norms: pre normalises what the two read, post what they add to the residual stream (OLMo-2,
    2501.00656), both does both (Gemma 2, 2408.00118). norm_eps: epsilon that these norms add to the mean square.

    x [B, T, D] -> [B, T, D], where a mixture of experts sent its tokens, and what the layer hands to later ones that
    couple with it (`models.cross_layer`): None where it was `handed` that of an earlier one.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: Factory,
        ffn: Factory | None,
        slot: str,
        depth: Depth = ALONE,
        norms: NormPlace = "pre",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if norms not in get_args(NormPlace):
            raise ValueError(f"norms={norms}: must be one of {', '.join(get_args(NormPlace))}")

        def norm(place: NormPlace, there: bool = True) -> nn.Module:
            return RMSNorm(dim, eps=norm_eps) if there and norms in (place, "both") else nn.Identity()

        self.slot = slot
        self.mixer_norm, self.mixer_post_norm = norm("pre"), norm("post")
        self.mixer = build_with(mixer, dim=dim, depth=depth)
        self.ffn_norm, self.ffn_post_norm = norm("pre", ffn is not None), norm("post", ffn is not None)
        self.ffn = None if ffn is None else build_with(ffn, dim=dim, depth=depth, slot=f"{slot}/ffn")
        self.width: Width = UNDIVIDED
        self.couplings = getattr(self.mixer, "couplings", ())
        self.hands: str | None = getattr(self.mixer, "hands", None)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, handed: Tensor | None = None, **coupled: Tensor | None
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        rows = (seq.positions.shape[0], seq.positions.shape[1])
        normed_BTD, made_BTD = self.width.enter(self.mixer_norm(x_BTD), rows), None
        if self.hands is None:
            y_BTD = self.mixer(normed_BTD, seq, slot=self.slot, **coupled)
        else:
            hand = self.mixer.handing
            y_BTD, made_BTD = hand(normed_BTD, seq, handed, slot=self.slot, **coupled)  # type: ignore[operator]
        x_BTD = x_BTD + self.mixer_post_norm(self.width.leave(y_BTD))
        if self.ffn is None:
            return x_BTD, None, made_BTD
        y_BTD, routing = self.ffn(self.width.enter(self.ffn_norm(x_BTD), rows), seq)
        return x_BTD + self.ffn_post_norm(self.width.leave(y_BTD)), routing, made_BTD
