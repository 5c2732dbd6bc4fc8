from __future__ import annotations

import pytest
import torch

from mergekit_lr.errors import LinalgError, NonFiniteError
from mergekit_lr.lowrank.gauge import aligned, balanced
from mergekit_lr.lowrank.positions import pack, unpack


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(rows: int = 12, columns: int = 9, rank: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(rows, rank, seed=seed), normal(rank, columns, seed=seed + 100)


def test_the_product_stays_and_the_factors_are_balanced() -> None:
    b, a = pair()
    left, right = balanced(b, a, scale=-3.0)
    torch.testing.assert_close(left @ right, -3.0 * b @ a, atol=1e-12, rtol=0)
    torch.testing.assert_close(left.T @ left, right @ right.T, atol=1e-10, rtol=0)
    peaks = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()


def test_one_model_in_two_gauges_is_one_pair() -> None:
    """The trap: without a gauge the mean of an adapter and itself is another model, and p = 0 is not exact."""
    b, a = pair()
    g = normal(4, 4, seed=7) + 3 * torch.eye(4, dtype=torch.float64)
    other = (b @ g, torch.linalg.solve(g, a))
    torch.testing.assert_close(other[0] @ other[1], b @ a, atol=1e-10, rtol=0)
    naive = (b + other[0]) / 2 @ ((a + other[1]) / 2)
    assert torch.linalg.vector_norm(naive - b @ a) > 0.1 * torch.linalg.vector_norm(b @ a)
    one, two = balanced(b, a), balanced(*other)
    torch.testing.assert_close(one[0], two[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(one[1], two[1], atol=1e-9, rtol=0)
    stacked_b = pack(torch.stack([one[0], two[0]]), 0)
    stacked_a = pack(torch.stack([one[1].T, two[1].T]), 0)
    torch.testing.assert_close(unpack(stacked_b, 0) @ unpack(stacked_a, 1).T, b @ a, atol=1e-9, rtol=0)


def test_padding_adds_nothing_and_never_cuts() -> None:
    b, a = pair(rank=2)
    left, right = balanced(b, a, rank=5)
    assert left.shape == (12, 5) and right.shape == (5, 9)
    assert not left[:, 2:].any() and not right[2:].any()
    torch.testing.assert_close(left @ right, b @ a, atol=1e-12, rtol=0)
    with pytest.raises(LinalgError, match="cannot pad"):
        balanced(b, a, rank=1)


def test_a_rank_above_the_matrix_and_a_zero_pair() -> None:
    b, a = normal(3, 6), normal(6, 2, seed=1)
    left, right = balanced(b, a)
    assert left.shape == (3, 6)
    torch.testing.assert_close(left @ right, b @ a, atol=1e-12, rtol=0)
    left, right = balanced(torch.zeros(3, 2), torch.zeros(2, 4))
    assert not left.any() and not right.any()
    with pytest.raises(NonFiniteError):
        balanced(torch.full((3, 2), torch.nan), torch.zeros(2, 4))


def spread(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    both = torch.stack([torch.cat([b, a.T]) for b, a in pairs])
    return float((both - both.mean(0)).square().sum())


def test_alignment_keeps_products_and_brings_tasks_together() -> None:
    """Nearly equal singular values: the svd gauge rotates at random between tasks that are alike."""
    u, v = torch.linalg.qr(normal(12, 4))[0], torch.linalg.qr(normal(9, 4, seed=1))[0]
    tasks = [
        balanced(u + 0.02 * normal(12, 4, seed=10 + i), (v + 0.02 * normal(9, 4, seed=20 + i)).T) for i in range(4)
    ]
    after = aligned(tasks)
    for (b, a), (c, d) in zip(tasks, after, strict=True):
        torch.testing.assert_close(c @ d, b @ a, atol=1e-12, rtol=0)
        torch.testing.assert_close(c.T @ c, d @ d.T, atol=1e-10, rtol=0)
    assert spread(after) < 0.1 * spread(tasks)
    assert spread(aligned(tasks, sweeps=1)) >= spread(after) - 1e-12


def test_alignment_of_padded_and_zero_pairs_loses_nothing() -> None:
    """A polar factor vanishes on directions without overlap; here it must stay orthogonal, or a task would shrink."""
    tasks = [balanced(*pair(rank=4)), balanced(*pair(rank=1, seed=5), rank=4), balanced(*pair(rank=2, seed=9), rank=4)]
    tasks.append((torch.zeros(12, 4).double(), torch.zeros(4, 9).double()))
    disjoint = (torch.zeros(12, 4).double(), torch.zeros(4, 9).double())
    disjoint[0][0, 0] = disjoint[1][0, 0] = 1.0
    for group in (tasks, [disjoint, tasks[3]], tasks[:1]):
        for (b, a), (c, d) in zip(group, aligned(group), strict=True):
            torch.testing.assert_close(c @ d, b @ a, atol=1e-11, rtol=0)
