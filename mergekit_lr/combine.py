"""How several tensors become one: weighted sums, and sums over the entries that agree on a sign.

Everything here is plain fp32 arithmetic without masks or `where`: ``relu(s * x)`` is ``|x|`` where the sign
of x is s and zero elsewhere, and its sign is the indicator. On a CPU that is several times faster than
booleans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MOST_AMPLIFIED = 16.0


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i x_i`` in input order, each product rounded before it is added. A new tensor."""
    out = tensors[0] * weights[0]
    for x, w in zip(tensors[1:], weights[1:], strict=True):
        out.add_(x * w)
    return out


def summable(coefficients: Sequence[float]) -> list[float] | None:
    """The coefficients, unless they are so large that their sum loses what it is made of.

    ``base + sum_i c_i (W_i - base)`` may be formed as ``(1 - sum_i c_i) base + sum_i c_i W_i``, whose rounding
    grows with ``sum_i |c_i|``. Up to 16 it stays well below the last bit of a 16-bit float. NaN passes.
    """
    return None if sum(abs(c) for c in coefficients) > MOST_AMPLIFIED else list(coefficients)


def sum_in_place(parts: Sequence[Tensor]) -> Tensor:
    """``sum_i x_i`` in input order, in the memory of the first."""
    out = parts[0]
    for x in parts[1:]:
        out.add_(x)
    return out


def majority_sign(parts: Sequence[Tensor]) -> Tensor:
    """The sign with the larger total magnitude, entry by entry: ``sign(sum_i x_i)``, and +1 for a zero sum.

    A sum of signed zeros alone may come out as -1; there nothing agrees with either sign.
    """
    mass = parts[0] + parts[1] if len(parts) > 1 else parts[0].clone()
    for x in parts[2:]:
        mass.add_(x)
    one = torch.ones((), dtype=mass.dtype, device=mass.device)
    return torch.copysign(one, mass, out=mass)


def agreeing_sum(
    parts: Sequence[Tensor],
    sign: Tensor,
    *,
    shares: Sequence[float] | None,
    divisor_floor: float | None = None,
) -> Tensor:
    """Sum of the entries whose sign is ``sign``, divided by the sum of their models' shares.

    ``sum_i [sgn(x_i) = s] x_i / sum_i [sgn(x_i) = s] shares_i``. Zero agrees with no sign.

    Args:
        parts: fp32, one shape; overwritten.
        sign: +-1, same shape; overwritten.
        shares: what each model adds to the divisor; None for no division.
        divisor_floor: the divisor is at least this; None means: 1 where it is exactly zero.

    Returns:
        fp32, zero where nothing agrees.
    """
    total: Tensor | None = None
    divisor: Tensor | None = None
    for i, x in enumerate(parts):
        x.mul_(sign).relu_()
        if shares is None:
            total = x if total is None else total.add_(x)
            continue
        if total is None or divisor is None:
            divisor = x.sign().mul_(shares[i])
            total = x
        else:
            total.add_(x)
            divisor.add_(x.sign_().mul_(shares[i]))
    if total is None:
        raise ValueError("agreeing_sum needs at least one part")
    if divisor is not None and shares is not None:
        total.div_(_positive_divisor(divisor, shares, divisor_floor))
    return total.mul_(sign)


def _positive_divisor(divisor: Tensor, shares: Sequence[float], floor: float | None) -> Tensor:
    """``divisor`` made safe. With shares above zero it is zero only where the sum it divides is zero too."""
    if floor is not None:
        return divisor.clamp_(min=floor)
    least = min(shares)
    if least > 0:
        return divisor.clamp_(min=max(least / 2, torch.finfo(divisor.dtype).tiny))
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
