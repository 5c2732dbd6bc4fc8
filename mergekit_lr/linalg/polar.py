"""The polar factor: the orthonormal matrix nearest to a given one."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg.checks import check_matrix, largest_entry, power_of_two_scale
from mergekit_lr.linalg.exact import full_svd

ORTHONORMAL = {torch.float32: 5e-6, torch.float64: 1e-12}
CLEANUPS = 5
FULL_RATE_FP64 = ((8, 0), (9, 0), (10, 0))
"""CUDA capabilities (A100, H100/H200, B200) whose fp64 tensor cores match or nearly match their fp32 rate."""


def polar_factor(
    matrix: Tensor,
    *,
    bound: float | None = None,
    condition: float = 1e5,
    iterate: bool | None = None,
    where: str = "polar_factor",
) -> Tensor:
    """``P = U V^T = A (A^T A)^{-1/2}``, ``[m, n]``, from ``A = U S V^T``; fp32, or fp64 for fp64 input.

    Solves Procrustes (``argmin ||A - P||_F`` over orthonormal P) and is what TSV-M's whitening and Iso-C need. A
    rank-deficient A has the partial isometry over ``sigma > max(m, n) u sigma_1`` (the unique one that vanishes on
    A's null space); zero has zero.

    Args:
        matrix: fp16 to fp64.
        bound: a known upper bound on sigma_1, such as sqrt(T) for T stacked orthonormal bases (``||A||_F``
        otherwise). condition: largest sigma_1 / sigma_n that the iteration is built for (its cost grows with the
        logarithm). iterate: Polar Express (GEMMs only: 10 steps for cond 1e5, then Newton-Schulz) or the SVD. By
        default iterates
            on CUDA, where GEMMs win; on the CPU the SVD is faster. Both are within 5e-6 (relative, fp32 results) of
            the fp64 factor for cond up to 1e4; fp32-only GPUs within 3e-5. An iteration that does not reach
            orthonormality is redone by the SVD, so the answer never depends on ``condition``.

    Raises:
        LinalgError: not a real matrix, or ``bound`` or ``condition`` makes no sense.
        NonFiniteError: NaN or infinity.
    """
    check_matrix(matrix, where)
    largest = largest_entry([matrix], where)
    if (bound is not None and not bound > 0.0) or not condition > 1.0:
        raise LinalgError(f"bound {bound} and condition {condition} must exceed 0 and 1", where=where)
    a = matrix if matrix.dtype == torch.float64 else matrix.float()
    if largest == 0.0:
        return torch.zeros_like(a)
    if iterate is None:
        iterate = a.device.type == "cuda"
    if iterate:
        scale = power_of_two_scale(largest)
        found = _polar_express(a * scale, None if bound is None else bound * scale, condition)
        if found is not None:
            return found
    u, s, vh = full_svd(a, where=where)
    keep = int((s > max(a.shape) * torch.finfo(a.dtype).eps * s[0]).sum())
    return u[:, :keep] @ vh[:keep]


def _polar_express(a: Tensor, bound: float | None, condition: float) -> Tensor | None:
    """Quintic steps ``X <- X (a I + b G + c G^2)``, ``G = X^T X``, on the short side; None if not orthonormal
    after all.

    In fp64 wherever that costs what fp32 costs: rounding of G, multiplied by coefficients up to 25, turns singular
    vectors by 1e-6 a step, which no later step can undo (fp32 ends 1e-5 from the polar factor, fp64 1e-7).
    """
    wide = a.shape[0] < a.shape[1]
    x = (a.T if wide else a).to(_working_dtype(a))
    sigma = float(torch.linalg.vector_norm(x)) if bound is None else bound
    x = x / (sigma * (1.0 + 1e-5))
    # with ||A||_F for sigma_1 the smallest singular value may lie sqrt(n) lower
    lower = 1.0 / condition / (math.sqrt(min(a.shape)) if bound is None else 1.0)
    for p, q, r in polar_express_coefficients(lower):
        g = x.T @ x
        step = torch.addmm(q * g, g, g, alpha=r)
        step.diagonal().add_(p)
        x = x @ step
    for _ in range(CLEANUPS):
        gap = x.T @ x
        gap.diagonal().sub_(1.0)
        worst = float(gap.abs().max())
        if worst <= ORTHONORMAL[a.dtype]:
            x = x.to(a.dtype)
            return x.T.contiguous() if wide else x
        if not worst < 0.5:  # also catches NaN
            return None
        x = torch.addmm(x, x, gap, alpha=-0.5)
    return None


def _working_dtype(a: Tensor) -> torch.dtype:
    if a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) not in FULL_RATE_FP64:
        return a.dtype
    return torch.float64


@cache
def polar_express_coefficients(lower: float) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of ``p(x) = a x + b x^3 + c x^5``, one triple per step, for singular values in
    [lower, 1].

    Step t minimises ``max |1 - p_t|`` over the interval that the steps before left, and the next interval is
    ``[1 - E_t, 1 + E_t]``: the optimal composition (Amsel, Persson, Musco, Gower 2025, "The Polar Express", arXiv
    2505.16932). The last interval is within 1e-3 of 1, where Newton-Schulz steps finish. Computed by Remez
    exchange in fp64.
    """
    low, high, steps = lower, 1.0, []
    for _ in range(40):
        a, b, c, error = _minimax_quintic(low / high)
        steps.append((a / high, b / high**3, c / high**5))
        low, high = 1.0 - error, 1.0 + error
        if error < 1e-3:  # the clean-up squares it
            break
    return tuple(steps)


def _minimax_quintic(low: float) -> tuple[float, float, float, float]:
    """a, b, c and E of the odd quintic nearest to 1 on [low, 1]; E equioscillates at low, two inner points and 1."""
    inner = [low + (1.0 - low) * t for t in (0.25, 0.75)]
    a = b = c = error = 0.0
    for _ in range(200):
        points = np.array([low, *inner, 1.0])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], axis=1)
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        root = math.sqrt(max(9.0 * b * b - 20.0 * a * c, 0.0))
        moved = sorted(math.sqrt(v) for v in ((-3.0 * b - root) / (10.0 * c), (-3.0 * b + root) / (10.0 * c)) if v > 0)
        if len(moved) != 2 or max(abs(x - y) for x, y in zip(moved, inner, strict=True)) < 1e-15:
            break
        inner = moved
    return a, b, c, abs(error)
