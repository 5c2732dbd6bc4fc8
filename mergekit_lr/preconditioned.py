"""Weighted means whose weights vary by element: the kernel of curvature-weighted merging.

    out = sum_i g_i m_i P_i x_i / sum_i g_i m'_i P_i,      P_i = v_i^power + eps_i

v_i >= 0 is a model's curvature (Adam's second moments, or a Fisher diagonal), m_i a mask and m' either the same mask
or ones. Curvatures of 1e-18 and less are ordinary, so nothing here multiplies two small numbers: the saliency is
``sqrt(v) |d|``, which orders as ``v d^2`` does, and above power 0.5 the P are divided by the largest of them first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.method import Facts

NEEDS_SCALE = 0.5
"""Up to this power P is at least 3e-23 wherever v is not zero, and its products with weights stay normal in fp32."""


def saliency(delta: Tensor, curvature: Tensor) -> Tensor:
    """``sqrt(v) |d|``, the root of Fast Fisher Grafting's score ``v d^2``: fp32, a new tensor, never negative."""
    return curvature.sqrt().mul_(delta).abs_()


def precondition(curvature: Tensor, power: float, epsilon: float) -> Tensor:
    """``v^power + eps``; 1 for power 0, also where v is zero. A new tensor."""
    if power == 0.5:
        p = curvature.sqrt()
    elif power == 1.0:
        p = curvature.clone()
    elif power == 0.0:
        p = torch.ones_like(curvature)
    else:
        p = curvature.pow(power)
    return p.add_(epsilon) if epsilon else p


def preconditioned_mean(
    tensors: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    *,
    power: float,
    shares: Sequence[float],
    scales: Sequence[float] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    all_in_divisor: bool = False,
    epsilons: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of the formula above, and its divisor, zero where nothing counts: fp32, new tensors.

    Args:
        tensors: n deltas or weights, fp32, one shape; not changed.
        curvatures: n tensors of that shape, >= 0, finite; not changed.
        shares: g_i >= 0, of any magnitude: only their ratios matter.
        scales: factors on the tensors alone (not in the divisor).
        masks: 0/1 fp32 of that shape, None for ones.
        all_in_divisor: m' = 1 (the paper), instead of m' = m (the authors' code).
    """
    n = len(tensors)
    eps = epsilons or [0.0] * n
    held = list(masks) if masks is not None else [None] * n
    parts = [precondition(v, power, e) for v, e in zip(curvatures, eps, strict=True)]
    whole: list[Tensor] | None = None
    if all_in_divisor and any(m is not None for m in held):
        whole = parts
        parts = [p.clone() if m is None else p * m for p, m in zip(parts, held, strict=True)]
    else:
        parts = [p if m is None else p.mul_(m) for p, m in zip(parts, held, strict=True)]
    largest = None
    if power > NEEDS_SCALE:
        largest = _largest(whole or parts)
    top = max(shares)
    total: Tensor | None = None
    divisor: Tensor | None = None
    for i, x in enumerate(tensors):
        p = _scaled(parts[i], largest, shares[i] / top if top else 0.0)
        d = p if whole is None else _scaled(whole[i], largest, shares[i] / top if top else 0.0)
        divisor = d.clone() if divisor is None else divisor.add_(d)
        p = p.mul_(x) if whole is None else p * x
        if scales is not None and scales[i] != 1:
            p.mul_(scales[i])
        total = p if total is None else total.add_(p)
    assert total is not None and divisor is not None
    return total.div_(divisor.clamp(min=torch.finfo(torch.float32).tiny)), divisor


def _largest(parts: Sequence[Tensor]) -> Tensor:
    """The largest of the parts, element by element, and 1 where all are zero."""
    top = parts[0].clone()
    for p in parts[1:]:
        torch.maximum(top, p, out=top)
    return top.add_((top == 0).to(top.dtype))


def _scaled(p: Tensor, largest: Tensor | None, share: float) -> Tensor:
    """``share * p / largest``, in the memory of ``p``."""
    if largest is not None:
        p.div_(largest)
    return p if share == 1 else p.mul_(share)


def bias_correction(facts: Facts | Mapping[str, str]) -> float:
    """``1 / (1 - beta2^step)`` of an uncorrected second moment whose file says its step and beta2, else 1.

    Adam's average starts at zero; after t steps it has seen only ``1 - beta2^t`` of its weight, 0.21 after 234
    steps at 0.999. A step of 0 or a beta2 outside [0, 1) counts as unknown.
    """
    known = dict(facts)
    if known.get("bias_corrected", "false").lower() == "true":
        return 1.0
    try:
        step, beta2 = float(known["step"]), float(known["beta2"])
    except (KeyError, ValueError):
        return 1.0
    if not (step >= 1 and 0 <= beta2 < 1):
        return 1.0
    return float(1 / (1 - beta2**step))
