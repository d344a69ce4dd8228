"""Newton-Schulz: the orthogonal matrix nearest to another, by matrix products alone.

A step takes every singular value s to a s + b s³ + c s⁵ and leaves the singular vectors. The coefficients are those of
Muon (Keller Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024): they rise as steeply
as they can near 0, so that five steps bring nearly every value into [0.7, 1.2], and do not converge to 1. `FIVE` (You
Jiacheng's, in LaCT's code, 2505.23884) come nearer to it, with coefficients of their own for every step.
"""

from collections.abc import Iterable

from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
FIVE = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
EPSILON = 1e-7  # beside the norm: a matrix of zeros stays one


def newton_schulz(x: Tensor, steps: int = 5, each: Iterable[tuple[float, float, float]] | None = None) -> Tensor:
    """x [..., M, N] = U S Vᵀ -> about U Vᵀ, of x's shape and dtype, each matrix by itself.

    each: the coefficients of every step, in place of `steps` times Muon's.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + EPSILON)  # no singular value is above 1
    for a, b, c in ((A, B, C),) * steps if each is None else each:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y
