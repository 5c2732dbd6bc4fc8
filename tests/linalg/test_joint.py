"""Joint subspaces, projections and weighted sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mergekit_lr.errors import LinalgError, NonFiniteError
from mergekit_lr.linalg import joint_left_subspace, joint_left_subspaces, project_combine, weighted_sum

Matrix = Callable[..., torch.Tensor]
Far = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.mark.parametrize("shape", [(16, 40), (60, 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_base", [False, True])
def test_against_float64(matrix: Matrix, far: Far, shape: tuple[int, int], dtype: torch.dtype, with_base: bool) -> None:
    base = matrix("gauss", *shape, 99, dtype) if with_base else None
    matrices = [matrix("gauss", *shape, i, dtype) for i in range(3)]
    weights, rank = [0.6, 0.5, -0.1], 9
    zero = torch.zeros(shape, dtype=torch.float64) if base is None else base.double()
    deltas = [m.double() - zero for m in matrices]
    u = np.linalg.svd(torch.cat(deltas, dim=1).numpy(), full_matrices=False)[0][:, :rank]
    total = sum(f * d for f, d in zip(weights, deltas, strict=True))
    want = zero + 0.7 * torch.from_numpy(u @ u.T) @ total
    subspace = joint_left_subspace(matrices, rank, base=base)
    got = project_combine(subspace, matrices, weights, base=base, scale=0.7, out_dtype=torch.float32)
    assert far(got, want) <= 2e-5
    rounded = project_combine(subspace, matrices, weights, base=base, scale=0.7)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, got.to(dtype))


def test_an_explicit_basis(matrix: Matrix, far: Far) -> None:
    u = torch.linalg.qr(matrix("gauss", 20, 4, 1))[0]
    matrices = [matrix("gauss", 20, 3000, i) for i in range(2)]  # wider than one slice of columns
    assert far(project_combine(u, matrices, [1.0, 2.0]), u @ u.T @ (matrices[0] + 2 * matrices[1])) <= 1e-14


def test_full_rank_makes_no_decomposition(matrix: Matrix) -> None:
    matrices = [matrix("gauss", 8, 20, i, torch.float32) for i in range(2)]
    subspace = joint_left_subspace(matrices, 8)
    assert subspace.full and subspace.basis is None and subspace.certificate is None
    want = 0.25 * matrices[0].double() + 0.75 * matrices[1].double()
    torch.testing.assert_close(project_combine(subspace, matrices, [0.25, 0.75]).double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(weighted_sum(matrices, [0.25, 0.75]).double(), want, rtol=0, atol=1e-6)


def test_one_expert_and_identical_experts(matrix: Matrix) -> None:
    w = matrix("low rank", 12, 30, 0, torch.bfloat16).float().to(torch.bfloat16)
    subspace = joint_left_subspace([w, w, w], 4)
    merged = project_combine(subspace, [w, w, w], [0.2, 0.3, 0.5], out_dtype=torch.float32)
    alone = project_combine(joint_left_subspace([w], 4), [w], [1.0], out_dtype=torch.float32)
    torch.testing.assert_close(merged, alone, rtol=1e-4, atol=1e-5)


def test_batched_is_the_same_as_alone_to_the_bit(matrix: Matrix) -> None:
    groups = [[matrix("power", 10, 15, 7 * g + i, torch.bfloat16) for i in range(2)] for g in range(4)]
    groups.append([matrix("power", 25, 6, 5, torch.float32)])
    names = [f"layer.{i}" for i in range(5)]
    together = joint_left_subspaces(groups, 3, names=names)
    shuffled = joint_left_subspaces(groups[::-1], 3, names=names[::-1])[::-1]
    for group, name, a, b in zip(groups, names, together, shuffled, strict=True):
        alone = joint_left_subspace(group, 3, name=name)
        assert alone.basis is not None and a.basis is not None and b.basis is not None
        assert torch.equal(a.basis, alone.basis) and torch.equal(a.basis, b.basis)
        assert a.certificate == alone.certificate


def test_what_does_not_fit(matrix: Matrix) -> None:
    matrices = [matrix("gauss", 30, 8, i) for i in range(2)]
    right = joint_left_subspace(matrices, 3)
    with pytest.raises(LinalgError, match="2 matrices"):
        project_combine(right, matrices, [1.0])
    with pytest.raises(LinalgError, match="widths"):
        project_combine(right, matrices[:1], [1.0])
    with pytest.raises(LinalgError, match="the matrices need 30 rows"):
        project_combine(torch.ones(4, 2), matrices, [1.0, 1.0])
    with pytest.raises(LinalgError, match="equal shapes"):
        project_combine(torch.ones(30, 2), [matrices[0], matrices[1][:, :5]], [1.0, 1.0])
    with pytest.raises(LinalgError, match="real matrix"):
        project_combine(torch.ones(30), matrices, [1.0, 1.0])
    with pytest.raises(LinalgError, match="cannot round"):
        project_combine(right, matrices, [1.0, 1.0], out_dtype=torch.int8)
    with pytest.raises(NonFiniteError, match="weight"):
        weighted_sum(matrices, [1.0, float("nan")])
    with pytest.raises(LinalgError, match="base"):
        weighted_sum(matrices, [1.0, 1.0], base=torch.ones(2, 2))
    with pytest.raises(LinalgError, match="1 names"):
        joint_left_subspaces([matrices, matrices], 1, names=["a"])


def test_krylov_serves_wide_unions(matrix: Matrix) -> None:
    """A union of two 2048-row matrices with a decaying spectrum is found without any Gram."""
    scale = torch.arange(1, 2101).float() ** -1.5
    parts = [matrix("gauss", 2048, 2100, i, torch.float32)[:, :400] * scale[:400] for i in range(2)]
    wide = [torch.cat((p, torch.zeros(2048, 800)), dim=1) for p in parts]
    subspace = joint_left_subspace(wide, 6)
    assert subspace.certificate is not None and subspace.certificate.route.startswith("krylov")
    dense = torch.cat(parts, dim=1).double()
    assert subspace.basis is not None
    u = subspace.basis.double()
    residual = float(torch.linalg.vector_norm(dense - u @ (u.T @ dense)))
    optimum = float(torch.linalg.eigvalsh(dense.T @ dense).flip(0)[6:].clamp(min=0).sum().sqrt())
    assert residual <= (1 + 1e-3) * optimum
