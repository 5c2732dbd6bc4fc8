"""Truncated singular value decomposition with a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.linalg.blocks import Blocks, Side
from mergekit_lr.linalg.certificate import PROMISE, Certificate
from mergekit_lr.linalg.eigh import fix_signs
from mergekit_lr.linalg.exact import full_svd
from mergekit_lr.linalg.gram import outer_product
from mergekit_lr.linalg.krylov import krylov, krylov_pays
from mergekit_lr.linalg.rank import RankPolicy
from mergekit_lr.linalg.subspace import Request, Subspace, make_request, solve

STEEP = 1e-3
"""Below this share of the largest projected row the fast finish gives way to a QR and a core SVD."""


@dataclass(frozen=True)
class TruncatedSVD:
    """``A ~ u diag(s) vh``: u ``[m, r]``, s ``[r]`` descending, vh ``[r, n]``; orthonormal columns of u, rows of vh."""

    u: Tensor
    s: Tensor
    vh: Tensor
    certificate: Certificate

    @property
    def rank(self) -> int:
        return self.s.numel()

    def dense(self) -> Tensor:
        """The rank-r matrix ``u diag(s) vh``."""
        return (self.u * self.s) @ self.vh

    def balanced(self) -> tuple[Tensor, Tensor]:
        """``(u sqrt(s), sqrt(s) vh)``: the two factors of equal norm, as adapters store them."""
        root = self.s.sqrt()
        return self.u * root, root.unsqueeze(1) * self.vh


def truncated_svd(
    matrix: Tensor | Sequence[Tensor],
    rank: int | RankPolicy,
    *,
    base: Tensor | None = None,
    exact: bool = False,
    tolerance: float = PROMISE,
    seed: int = 0,
    name: str = "",
) -> TruncatedSVD:
    """Best rank-r approximation of A, or of ``[A_1 ... A_k]`` side by side, to a certified factor.

    Promise: ``||A - U S V||_F <= (1 + tolerance) tau_r`` with tau_r the optimum, certified after the solve, or the
    call escalates by itself (block Krylov where r is small, fp32 Gram and eigensolver, fp64 Gram, full fp64
    solve). Where tau_r is below 7e-6 ``||A||_F`` factors in fp32 cannot carry a relative promise; then the
    residual is at most that. Columns are orthonormal to 1e-5. The result does not depend on threads' scheduling,
    on batches or on the order of tensors; signs are fixed by each left (or right, if n < m) vector's largest
    component.

    Args:
        matrix: ``[m, n]`` or a list of such with equal m; fp16, bf16, fp32 or fp64.
        rank: an integer, or a policy from `mergekit_lr.linalg.rank`.
        base: subtracted from each matrix first (the truncation is of task vectors).
        exact: promise an excess of 1e-6, compute in fp64 and return fp64 factors, or raise.
        tolerance: the excess to certify.
        seed, name: key of the test matrices.

    Returns:
        Factors in fp32 (fp64 for fp64 input or ``exact``), singular values in the units of A.

    Raises:
        LinalgError: rank 0 or above min(m, n), empty or integer input, or an unmet ``exact`` promise.
        NonFiniteError: NaN or infinity in the input.
    """
    matrices = [matrix] if isinstance(matrix, Tensor) else matrix
    blocks = Blocks(matrices, base, where=name or "truncated_svd")
    request = make_request(blocks, rank, tolerance=tolerance, exact=exact, seed=seed, name=name)
    if not request.rank.needs_spectrum:
        r = request.choose_rank(None)
        iterated = krylov(request, r) if krylov_pays(request, r) else None
        if iterated is not None:
            return _from_rows(request, iterated.subspace, iterated.projected)
    found = solve(request)
    rows = blocks.away(request.side, found.basis).T.contiguous()
    return _from_rows(request, found, rows)


def _from_rows(request: Request, found: Subspace, rows: Tensor) -> TruncatedSVD:
    """Factors from the basis and the projection on it, ``rows = basis^T M`` (r rows, M with the blocks' scale).

    ``rows`` is overwritten.
    """
    basis, scale = found.basis, request.blocks.scale
    polished = _polish(rows, found.certificate.in_units(scale))
    if polished is None:
        rotation, s, vectors = _core(request.blocks.away(request.side, basis).T)
        basis = (basis.double() @ rotation).to(basis.dtype)
        fix_signs(basis, vectors)
    else:
        s, vectors = polished
        if bool((s.diff() > 0).any()):  # nearly equal values may come out of order
            order = torch.argsort(s, descending=True, stable=True)
            s, vectors, basis = s[order], vectors[order], basis[:, order].contiguous()
    basis, s, vectors = (x.to(request.dtype).contiguous() for x in (basis, s / scale, vectors))
    if request.side is Side.LEFT:
        return TruncatedSVD(basis, s, vectors, found.certificate)
    return TruncatedSVD(vectors.T.contiguous(), s, basis.T.contiguous(), found.certificate)


def _polish(rows: Tensor, certificate: Certificate) -> tuple[Tensor, Tensor] | None:
    """Row norms and orthonormal rows (in place), when the rows are orthogonal enough for Newton-Schulz to finish.

    With ``P = diag(s) Z`` and ``Z Z^T = I + C``, ``Z <- Z - C Z / 2`` leaves 3/4 C^2. Replacing P by ``diag(s) Z`` adds
    ``||P - diag(s) Z||_F^2`` to the squared residual (it lies inside the basis); if that is more than a fiftieth of
    what the promise allows, or values are too far apart for fp32, the answer is None.
    """
    s = torch.linalg.vector_norm(rows, dim=1)
    if not float(s.min()) > STEEP * float(s.max()):
        return None
    z, changed = rows.div_(s.unsqueeze(1)), 0.0
    target = 3e-6 if rows.dtype == torch.float32 else 1e-13
    for _ in range(3):
        c = outer_product(z)
        c.diagonal().sub_(1.0)
        size = float(torch.linalg.vector_norm(c))
        if size > 0.3:
            return None
        if float(c.abs().max()) <= target:
            break
        moved = c @ z
        changed += 0.5 * float(torch.linalg.vector_norm(torch.linalg.vector_norm(moved, dim=1) * s))
        z.add_(moved, alpha=-0.5)
        if size * size < target:
            break
    allowed = (0.02 * certificate.promise) ** 0.5 * certificate.residual
    return None if changed > max(allowed, 0.2 * certificate.floor * certificate.norm) else (s, z)


def _core(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of the r rows by QR and an r x r core in fp64: rotation ``[r, r]``, values, orthonormal rows.

    Householder QR returns orthonormal rows even where values are zero.
    """
    q, r = torch.linalg.qr(rows.double().T)
    left, s, right = full_svd(r.T.contiguous())
    return left, s, right @ q.T
