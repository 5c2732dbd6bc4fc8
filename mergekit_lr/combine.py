"""How several tensors become one: weighted sums, and sums over the entries that agree on a sign.

Everything here is plain fp32 arithmetic without masks or `where`: ``relu(s * x)`` is ``|x|`` where the sign
of x is s and zero elsewhere. On a CPU that is several times faster than booleans. Times a sign is an exclusive or of
the sign bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from mergekit_lr import host
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MOST_AMPLIFIED = 16.0


@cache
def scalar(value: float) -> Tensor:
    """An fp32 number as a tensor without axes, to multiply by. A bare float costs five times as much a call."""
    return torch.tensor(value, dtype=torch.float32)


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


def majority(parts: Sequence[Tensor]) -> Tensor:
    """``sum_i x_i`` entry by entry: its sign bit is the sign with the larger total magnitude, + for a zero sum.

    A sum of signed zeros alone may have either sign; there nothing agrees with any. A new tensor.
    """
    if len(parts) == 1:
        return parts[0].clone()
    mass = parts[0] + parts[1]
    for x in parts[2:]:
        mass.add_(x)
    return mass


def agreeing_sum(
    parts: Sequence[Tensor],
    elected: Tensor,
    *,
    shares: Sequence[float] | None,
    divisor_floor: float | None = None,
) -> Tensor:
    """Sum of the entries whose sign is the elected one, divided by the sum of their models' shares.

    ``sum_i [sgn(x_i) = s] x_i / sum_i [sgn(x_i) = s] shares_i``. Zero agrees with no sign.

    Args:
        parts: fp32, one shape; overwritten.
        elected: fp32, same shape; only its sign bits count (`majority`). Overwritten.
        shares: what each model adds to the divisor; None for no division.
        divisor_floor: the divisor is at least this; None means: 1 where it is exactly zero.

    Returns:
        fp32, zero where nothing agrees.
    """
    if not parts:
        raise ValueError("agreeing_sum needs at least one part")
    sign = elected.view(torch.int32).bitwise_and_(_sign_bit())
    for x in parts:
        x.view(torch.int32).bitwise_xor_(sign)  # times the sign
        x.relu_()
    divisor = None if shares is None else _divisor(parts, shares, divisor_floor)
    total = sum_in_place(parts)
    if divisor is not None:
        total.div_(divisor)
    total.view(torch.int32).bitwise_xor_(sign)
    return total


@cache
def _sign_bit() -> Tensor:
    return torch.tensor(-(1 << 31), dtype=torch.int32)


def _divisor(parts: Sequence[Tensor], shares: Sequence[float], floor: float | None) -> Tensor:
    """``sum_i [x_i > 0] shares_i``, made safe to divide by. Parts without negative entries; a new tensor."""
    if host.through_numpy(parts[0]) and _is_multiple(tuple(shares)):
        count = (parts[0].numpy() > 0).view(np.uint8)
        for x in parts[1:]:
            count += (x.numpy() > 0).view(np.uint8)
        divisor = torch.from_numpy(count.astype(np.float32)).mul_(scalar(shares[0]))
    else:
        divisor = parts[0].sign().mul_(scalar(shares[0]))
        for x, share in zip(parts[1:], shares[1:], strict=True):
            divisor.add_(x.sign().mul_(scalar(share)))
    return _positive_divisor(divisor, shares, floor)


@cache
def _is_multiple(shares: tuple[float, ...]) -> bool:
    """Whether adding up any of the shares in fp32 gives the bits of their number times a share.

    So with equal shares of up to three models; of more, the sum's roundings may differ from the product's.
    """
    if len(set(shares)) != 1 or len(shares) > 255:
        return False
    share = np.float32(shares[0])
    added = np.cumsum(np.full(len(shares), share), dtype=np.float32)
    return bool((added == np.arange(1, len(shares) + 1, dtype=np.float32) * share).all())


def _positive_divisor(divisor: Tensor, shares: Sequence[float], floor: float | None) -> Tensor:
    """``divisor`` made safe. With shares above zero it is zero only where the sum it divides is zero too."""
    if floor is not None:
        return divisor.clamp_(min=floor)
    least = min(shares)
    if least > 0:
        return divisor.clamp_(min=max(least / 2, torch.finfo(divisor.dtype).tiny))
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
