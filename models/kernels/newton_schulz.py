"""Newton-Schulz: the orthogonal matrix nearest to another, by matrix products alone.

A step takes every singular value s to a s + b s³ + c s⁵ and leaves the singular vectors. The coefficients are those of
Muon (Keller Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024): they rise as steeply
as they can near 0, so that five steps bring nearly every value into [0.7, 1.2], and do not converge to 1.
"""

from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
EPSILON = 1e-7  # beside the norm: a matrix of zeros stays one


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """x [..., M, N] = U S Vᵀ -> about U Vᵀ, of x's shape and dtype, each matrix by itself."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + EPSILON)  # no singular value is above 1
    for _ in range(steps):
        gram = y @ y.mT
        y = A * y + (B * gram + C * (gram @ gram)) @ y
    return y.mT if tall else y
