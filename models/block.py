"""A layer: a sequence mixer, then a feed-forward, each on a normalised residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from models.cross_layer import ALONE, Depth, build_with
from models.moe import Routing
from models.norm import RMSNorm
from models.sequence import Sequence
from models.width import UNDIVIDED, Width

Factory = Callable[..., nn.Module]


class Block(nn.Module):
    """Any mixer goes with any feed-forward.

    mixer: the part in which a token sees those before it: a class of `models.mixers`. ffn: the part that then treats
    each token by itself: `models.MoE`, or the dense `models.SwiGLU` or `models.ChannelMix`, which take `hidden`, their
    width; null for none, and no norm before it: a layer that is its mixer alone, as Mamba's are (2312.00752). norm_eps:
    epsilon that the norms before the two add to the mean square.

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
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.slot = slot
        self.mixer_norm = RMSNorm(dim, eps=norm_eps)
        self.mixer = build_with(mixer, dim=dim, depth=depth)
        self.ffn_norm = None if ffn is None else RMSNorm(dim, eps=norm_eps)
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
        x_BTD = x_BTD + self.width.leave(y_BTD)
        if self.ffn is None or self.ffn_norm is None:
            return x_BTD, None, made_BTD
        y_BTD, routing = self.ffn(self.width.enter(self.ffn_norm(x_BTD), rows), seq)
        return x_BTD + self.width.leave(y_BTD), routing, made_BTD
