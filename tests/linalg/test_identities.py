"""The identities that replace SVDs (fp64, relative difference at most 1e-12 against dense LAPACK)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mergekit_lr.linalg import (
    concatenation_svd,
    joint_left_subspace,
    joint_whitened_subspace,
    polar_factor,
    project_combine,
    sum_svd,
    task_components,
    task_gram,
    truncated_svd,
)

Matrix = Callable[..., torch.Tensor]
Far = Callable[[torch.Tensor, torch.Tensor], float]


def dense_union(matrices: list[torch.Tensor], weights: list[float], rank: int) -> torch.Tensor:
    """``U_r S_r (sum f_i V_i)^T`` from the SVD of the concatenation: the definition that the identities replace."""
    u, s, vh = np.linalg.svd(torch.cat(matrices, dim=1).numpy(), full_matrices=False)
    parts = np.split(vh[:rank], len(matrices), axis=1)
    mean = sum(f * p for f, p in zip(weights, parts, strict=True))
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ mean)


@pytest.mark.parametrize("shape", [(12, 20, 3), (30, 20, 2), (40, 10, 3), (17, 5, 1)])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_union_decomposition_is_a_projected_weighted_sum(
    matrix: Matrix, far: Far, shape: tuple[int, int, int], share: float
) -> None:
    d_out, d_in, k = shape
    matrices = [matrix("gauss", d_out, d_in, i) for i in range(k)]
    weights = [0.5, 0.3, 0.2][:k]
    rank = max(1, round(share * min(d_out, k * d_in)))
    want = dense_union(matrices, weights, rank)
    subspace = joint_left_subspace(matrices, rank, exact=True)
    assert subspace.side == ("left" if d_out <= k * d_in else "right")
    assert far(project_combine(subspace, matrices, weights), want) <= 1e-12
    total = sum(f * w for f, w in zip(weights, matrices, strict=True))
    if share == 1.0:
        assert subspace.full
        assert far(total, want) <= 1e-12
    else:
        u = truncated_svd(matrices, rank, exact=True).u
        assert far(u @ (u.T @ total), want) <= 1e-12


def test_right_form_with_explicit_s(matrix: Matrix, far: Far) -> None:
    """``sum_i W_i S_i`` with ``S = V_r V_r^T (f kron I)``."""
    matrices, weights, rank = [matrix("gauss", 30, 8, i) for i in range(3)], [0.2, 0.5, 0.3], 10
    v = np.linalg.svd(torch.cat(matrices, dim=1).numpy(), full_matrices=False)[2][:rank].T
    s = torch.from_numpy(v @ v.T @ np.kron(np.array(weights)[:, None], np.eye(8)))
    explicit = sum(w @ part for w, part in zip(matrices, s.split(8), strict=True))
    subspace = joint_left_subspace(matrices, rank, exact=True)
    assert subspace.side == "right"
    assert far(project_combine(subspace, matrices, weights), explicit) <= 1e-12


def test_whitened_subspace_is_that_of_the_weighted_gram(matrix: Matrix, far: Far) -> None:
    """SVD of ``[W_i C_i^{1/2}]`` against eigh of ``sum_i W_i C_i W_i^T``."""
    matrices = [matrix("gauss", 14, 10, i) for i in range(3)]
    grams = [x.T @ x for x in (matrix("gauss", 40, 10, 10 + i) for i in range(3))]
    vectors = np.linalg.eigh(sum(w @ c @ w.T for w, c in zip(matrices, grams, strict=True)).numpy())[1]
    u = torch.from_numpy(vectors[:, ::-1][:, :5].copy())
    subspace = joint_whitened_subspace(matrices, grams, 5, exact=True)
    assert subspace.basis is not None
    assert far(subspace.basis @ subspace.basis.T, u @ u.T) <= 1e-10


def test_sum_of_low_rank_pairs(matrix: Matrix, far: Far) -> None:
    pairs = [(matrix("gauss", 50, r, r), matrix("gauss", r, 40, r + 9)) for r in (3, 5, 4)]
    scales = [1.0, -2.0, 0.5]
    dense = sum(s * b @ a for s, (b, a) in zip(scales, pairs, strict=True))
    found = sum_svd(pairs, scales)
    np.testing.assert_allclose(found.s, np.linalg.svd(dense.numpy(), compute_uv=False)[:12], rtol=1e-12)
    assert far(found.dense(), dense) <= 1e-13
    for r in (1, 7):
        u, s, vh = np.linalg.svd(dense.numpy(), full_matrices=False)
        best = torch.from_numpy((u[:, :r] * s[:r]) @ vh[:r])
        cut = sum_svd(pairs, scales, r)
        assert far(cut.dense(), best) <= 1e-12
        assert cut.certificate.residual == pytest.approx(float(np.linalg.norm(s[r:])), rel=1e-12)


def test_concatenation_of_low_rank_pairs(matrix: Matrix, far: Far) -> None:
    """KnOTS' stacking of deltas from B and A alone; the core's Gram is ``R_b blkdiag(A_i A_i^T) R_b^T``."""
    pairs = [(matrix("gauss", 30, r, r), matrix("gauss", r, n, r + 9)) for r, n in ((3, 25), (4, 25), (2, 40))]
    dense = torch.cat([b @ a for b, a in pairs], dim=1)
    found = concatenation_svd(pairs)
    assert found.vh.shape == (9, 90)
    np.testing.assert_allclose(found.s, np.linalg.svd(dense.numpy(), compute_uv=False)[:9], rtol=1e-12)
    assert far(found.dense(), dense) <= 1e-13
    r_b = torch.linalg.qr(torch.cat([b for b, _ in pairs], dim=1))[1]
    gram = r_b @ torch.block_diag(*(a @ a.T for _, a in pairs)) @ r_b.T
    np.testing.assert_allclose(found.s**2, np.linalg.eigvalsh(gram.numpy())[::-1], rtol=1e-11)


def test_tsv_whitening_is_the_polar_factor(matrix: Matrix, far: Far) -> None:
    """``U (U^T U)^{-1/2} = P Q^T`` of ``U = P D Q^T``."""
    stacked = torch.cat([torch.linalg.qr(matrix("gauss", 40, 8, i))[0] for i in range(4)], dim=1)
    p, _, qt = np.linalg.svd(stacked.numpy(), full_matrices=False)
    values, vectors = np.linalg.eigh((stacked.T @ stacked).numpy())
    root = torch.from_numpy(vectors / np.sqrt(values) @ vectors.T)
    found = polar_factor(stacked)
    assert far(found, torch.from_numpy(p @ qt)) <= 1e-12
    assert far(found, stacked @ root) <= 1e-11


def test_isotropic_merging_from_the_polar_factor(matrix: Matrix, far: Far) -> None:
    """Iso-C: ``mean(sigma) U V^T = (tr(P^T D) / n) P``."""
    d = matrix("power", 16, 16, 0)
    u, s, vh = np.linalg.svd(d.numpy())
    p = polar_factor(d)
    assert far((p.T @ d).trace() / 16 * p, torch.from_numpy(s.mean() * u @ vh)) <= 1e-12


def test_pca_over_tasks_from_their_gram(matrix: Matrix, far: Far) -> None:
    points = matrix("power", 6, 500, 0)
    found = task_components(task_gram(list(points)), 3)
    u, s, vh = np.linalg.svd(points.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.sigma, s[:3], rtol=1e-9)
    directions = found.coefficients.T @ points
    assert far(directions @ directions.T, torch.eye(3, dtype=torch.float64)) <= 1e-9
    projector = directions.T @ directions
    assert far(projector, torch.from_numpy(vh[:3].T @ vh[:3])) <= 1e-8
    assert far(found.coordinates @ directions, points @ projector) <= 1e-8
    assert u.shape == (6, 6)
