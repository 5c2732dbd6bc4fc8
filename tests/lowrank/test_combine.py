from __future__ import annotations

import pytest
import torch

from mergekit_lr.lowrank.combine import compressed, concatenated, cross_terms, distance, knots

RANKS, SCALES = (2, 3, 1), (0.5, -2.0, 1.5)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PAIRS = [(normal(11, r, seed=r), normal(r, 8, seed=10 + r)) for r in RANKS]
DENSE = sum(s * b.double() @ a.double() for (b, a), s in zip(PAIRS, SCALES, strict=True))


def test_concatenation_is_the_exact_sum() -> None:
    b, a = concatenated(PAIRS, SCALES)
    assert b.shape == (11, 6) and a.shape == (6, 8)
    torch.testing.assert_close(b @ a, DENSE, atol=1e-13, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 50])
def test_compression_is_the_truncated_svd_of_the_dense_sum(rank: int) -> None:
    (b, a), error = compressed(PAIRS, SCALES, rank)
    u, s, vh = torch.linalg.svd(DENSE, full_matrices=False)
    kept = min(rank, 6)
    torch.testing.assert_close(b @ a, (u[:, :kept] * s[:kept]) @ vh[:kept], atol=1e-12, rtol=0)
    assert error == pytest.approx(float(s[kept:].norm() / s.norm()), abs=1e-9)
    assert b.shape[1] == kept


def test_knots_with_a_sum_is_the_sum() -> None:
    b, a = knots(PAIRS, SCALES, lambda parts: sum(parts[1:], parts[0]))
    torch.testing.assert_close(b @ a, DENSE, atol=1e-5, rtol=0)


def test_knots_acts_on_the_parts_of_the_dense_concatenation() -> None:
    """A rule that is not linear, against a full SVD of the dense deltas side by side."""

    def rule(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts).abs().max(0).values  # blind to the signs that an SVD leaves free in U and V^T

    b, a = knots(PAIRS, SCALES, rule)
    side_by_side = torch.cat([s * p[0].double() @ p[1].double() for p, s in zip(PAIRS, SCALES, strict=True)], 1)
    u, s, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    parts = list((s[:6, None] * vh[:6]).float().split(8, dim=1))
    signs = (b * u[:, :6]).sum(0).sign()
    torch.testing.assert_close(b @ a, (u[:, :6] * signs) @ rule(parts).double(), atol=1e-5, rtol=0)


def test_the_cross_term_form_is_far_from_the_sum() -> None:
    pairs = [(normal(30, 4, seed=i), normal(4, 20, seed=50 + i)) for i in range(2)]
    b, a = cross_terms(pairs, (0.5, -0.5))
    dense = sum(s * p @ q for (p, q), s in zip(pairs, (0.5, -0.5), strict=True))
    assert (b @ a - dense).norm() > 0.8 * dense.norm()
    by_hand = (0.5**0.5 * (pairs[0][0] + pairs[1][0])) @ (0.5**0.5 * (pairs[0][1] - pairs[1][1]))
    torch.testing.assert_close(b @ a, by_hand.double(), atol=1e-5, rtol=1e-5)


def test_distance_without_a_dense_matrix() -> None:
    one, other = PAIRS[0], (normal(11, 5, seed=30), normal(5, 8, seed=31))
    error, norm = distance(one, other)
    dense = one[0].double() @ one[1].double()
    assert norm == pytest.approx(float(dense.norm()))
    assert error == pytest.approx(float((dense - other[0].double() @ other[1].double()).norm()))
    assert distance(one, one)[0] < 1e-6 * norm
