"""Truncation that minimises the error on activations instead of the error of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg.blocks import Side
from mergekit_lr.linalg.certificate import PROMISE
from mergekit_lr.linalg.checks import check_matrix, largest_entry
from mergekit_lr.linalg.joint import JointSubspace, joint_left_subspace
from mergekit_lr.linalg.rank import RankPolicy
from mergekit_lr.linalg.truncated import TruncatedSVD, truncated_svd

NEGATIVE = 1e-5
"""Eigenvalues of an activation Gram down to -1e-5 lambda_1 are rounding; below, it is not a Gram."""


def gram_root(gram: Tensor, *, where: str = "gram_root") -> tuple[Tensor, Tensor]:
    """``L`` and ``L^+`` with ``L L^T = C`` for a positive semidefinite C ``[n, n]``: fp64 ``[n, p]`` and ``[p,
    n]``, p its rank.

    ``L = W diag(sqrt(lambda))`` over ``lambda > n u lambda_1``; unlike a Cholesky factor it needs no shift when
    calibration saw fewer tokens than there are inputs.

    Raises:
        LinalgError: not square, not symmetric to 1e-4, an eigenvalue below `NEGATIVE`, or zero throughout.
        NonFiniteError: NaN or infinity.
    """
    check_matrix(gram, where)
    scale = largest_entry([gram], where)
    if gram.shape[0] != gram.shape[1]:
        raise LinalgError(f"an activation Gram is square, got {tuple(gram.shape)}", where=where)
    c = gram.double()
    if float((c - c.T).abs().max()) > 1e-4 * scale:
        raise LinalgError("the activation Gram is not symmetric", where=where)
    values, vectors = torch.linalg.eigh(0.5 * (c + c.T))
    top = float(values[-1])
    if top <= 0.0 or float(values[0]) < NEGATIVE * -top:
        raise LinalgError(
            "the activation Gram is zero or not positive semidefinite",
            where=where,
            why=f"its eigenvalues span [{float(values[0]):.2e}, {top:.2e}]",
            fix="collect it again: X^T X cannot have negative eigenvalues",
        )
    kept = values > gram.shape[0] * torch.finfo(torch.float64).eps * top
    root = values[kept].sqrt()
    return vectors[:, kept] * root, (vectors[:, kept] / root).T.contiguous()


def whitened_svd(
    weight: Tensor,
    gram: Tensor,
    rank: int | RankPolicy,
    *,
    exact: bool = False,
    tolerance: float = PROMISE,
    seed: int = 0,
    name: str = "",
) -> tuple[Tensor, Tensor, TruncatedSVD]:
    """Rank-r factors ``(B [m, r], A [r, n])`` of W that minimise ``||(W - B A) X^T||_F``, given ``C = X^T X``
    ``[n, n]``.

    ``||(W - W_r) X^T||_F = ||(W - W_r) L||_F`` for ``L L^T = C``, so the answer comes from ``W L ~ U_r S_r V_r``
    (SVD-LLM, arXiv 2403.07378, with an eigen root instead of Cholesky): ``B = U_r``, ``A = U_r^T W``. Then ``B A L
    = U_r U_r^T W L`` with no inverse of L, so directions that calibration never saw are projected, not divided by
    zero.

    Returns:
        B and A in fp32 (fp64 for fp64 input or ``exact``), and the certified truncation of W L, whose residual is the
        activation error itself.
    """
    where = name or "whitened_svd"
    check_matrix(weight, where)
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise LinalgError(
            f"the activation Gram is {tuple(gram.shape)}", where=where, why=f"the weight has {weight.shape[1]} inputs"
        )
    root, _ = gram_root(gram, where=where)
    truncated = truncated_svd(_times_root(weight, root), rank, exact=exact, tolerance=tolerance, seed=seed, name=where)
    return truncated.u, truncated.u.T @ weight.to(truncated.u.dtype), truncated


def joint_whitened_subspace(
    matrices: Sequence[Tensor],
    grams: Sequence[Tensor],
    rank: int | RankPolicy,
    *,
    exact: bool = False,
    tolerance: float = PROMISE,
    seed: int = 0,
    name: str = "",
) -> JointSubspace:
    """`joint_left_subspace` of ``[W_1 L_1 ... W_k L_k]``: the eigenvectors of ``sum_i W_i C_i W_i^T``, ``C_i = L_i
    L_i^T``.

    The result is for products on the left (``U_r U_r^T``); if d_out exceeds the joint width it is still given as
    U_r, so that it applies to the unwhitened matrices.
    """
    where = name or "joint_whitened_subspace"
    if len(grams) != len(matrices):
        raise LinalgError(f"{len(grams)} activation Grams for {len(matrices)} matrices", where=where)
    for i, (w, c) in enumerate(zip(matrices, grams, strict=True)):
        check_matrix(w, f"{where}[{i}]")
        if c.shape != (w.shape[1], w.shape[1]):
            raise LinalgError(f"Gram {i} is {tuple(c.shape)} for {w.shape[1]} inputs", where=where)
    whitened = [_times_root(w, gram_root(c, where=where)[0]) for w, c in zip(matrices, grams, strict=True)]
    widths = tuple(w.shape[1] for w in matrices)
    if whitened[0].shape[0] <= sum(w.shape[1] for w in whitened):
        joint = joint_left_subspace(whitened, rank, exact=exact, tolerance=tolerance, seed=seed, name=where)
        return replace(joint, widths=widths)
    # The right vectors of the whitened matrices say nothing about the unwhitened ones: U_r itself is needed.
    found = truncated_svd(whitened, rank, exact=exact, tolerance=tolerance, seed=seed, name=where)
    return JointSubspace(Side.LEFT, found.rank, found.u, widths, found.certificate)


def _times_root(weight: Tensor, root: Tensor) -> Tensor:
    """W L in fp64, returned in the dtype that a truncation of W would use."""
    product = weight.double() @ root
    return product if weight.dtype == torch.float64 else product.float()
