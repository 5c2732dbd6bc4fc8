"""Orthonormal bases of tall matrices from GEMMs: CholeskyQR2, with what to do when it breaks down."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.linalg.checks import check_matrix


def orthonormalize(x: Tensor, against: Tensor | None = None, *, where: str = "basis") -> Tensor:
    """Orthonormal columns spanning those of ``x`` ``[m, b]`` (m >= b), orthogonal to ``against`` ``[m, l]``.

    CholeskyQR2 on scaled columns: ``x D = Q R`` with ``R^T R = (x D)^T (x D)``, twice, the projection ``x - P P^T x``
    applied before each round. Grams and Cholesky factors are fp64 whatever the dtype of ``x``, so one round stands
    condition numbers up to 1e7; on breakdown the Gram is shifted by ``11 (m b + b (b + 1)) u tr`` and a third
    round added (Fukaya et al. 2020), and a numerically dependent block ends in Householder QR, which always
    returns an orthonormal basis. ``||Q^T Q - I||`` is at the rounding of the result's dtype: at most 1e-6 in fp32,
    1e-14 in fp64 (Yamamoto et al. 2015).

    Returns:
        ``[m, b]`` in the dtype of ``x``.
    """
    check_matrix(x, where)
    y = x.double()
    p = None if against is None else against.double()
    for _ in range(2):
        y = _scaled(_project(y, p))
        q = _cholesky_round(y)
        if q is None:
            return _robust(y, p).to(x.dtype)
        y = q
    return y.to(x.dtype)


def _project(y: Tensor, p: Tensor | None) -> Tensor:
    return y if p is None else y - p @ (p.T @ y)


def _scaled(y: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(y, dim=0)
    return y / torch.where(norms > 0, norms, torch.ones_like(norms))


def _cholesky_round(y: Tensor, shift: float = 0.0) -> Tensor | None:
    """``y R^-1``; None where the Gram is not safely positive definite."""
    g = y.T @ y
    if shift:
        g.diagonal().add_(shift)
    r, info = torch.linalg.cholesky_ex(g, upper=True)
    pivots = r.diagonal()
    if int(info) != 0 or not bool(torch.isfinite(pivots).all()):
        return None
    if not shift and float(pivots.min()) < 1e-7 * float(pivots.max()):
        return None  # condition beyond what two rounds repair
    solved: Tensor = torch.linalg.solve_triangular(r, y, upper=True, left=False)
    return solved


def _robust(y: Tensor, p: Tensor | None) -> Tensor:
    m, b = y.shape
    shifted = _cholesky_round(y, shift=11.0 * (m * b + b * (b + 1)) * 2.0**-53 * b)
    if shifted is not None:
        second = _cholesky_round(_project(shifted, p))
        third = None if second is None else _cholesky_round(_project(second, p))
        if third is not None:
            return third
    # Dependent columns: the QR of [p, y] completes the basis with whatever is orthogonal to both.
    q: Tensor = torch.linalg.qr(y if p is None else torch.cat((p, y), dim=1))[0]
    return q if p is None else q[:, p.shape[1] :]
