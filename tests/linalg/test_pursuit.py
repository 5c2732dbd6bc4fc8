"""Orthogonal matching pursuit against its definition, one target at a time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_lr.linalg.pursuit import orthogonal_matching_pursuit


def by_definition(x: Tensor, atoms: Tensor, k: int) -> tuple[list[int], Tensor]:
    """The textbook loop: take the largest inner product, solve least squares on all taken, again."""
    taken: list[int] = []
    residual, solution = x, x.new_zeros(0)
    for _ in range(k):
        scores = (atoms @ residual).abs()
        scores[taken] = -1
        taken.append(int(scores.argmax()))
        solution = torch.linalg.lstsq(atoms[taken].T, x[:, None]).solution[:, 0]
        residual = x - atoms[taken].T @ solution
    return taken, solution


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_supports_and_coefficients(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    atoms = torch.randn((60, 24), generator=g, dtype=torch.float64)
    atoms[7] *= 3  # atoms are not normalised
    targets = torch.randn((9, 24), generator=g, dtype=torch.float64)
    indices, coefficients = orthogonal_matching_pursuit(targets, atoms, k)
    for x, found, weights in zip(targets, indices, coefficients, strict=True):
        expected, solution = by_definition(x, atoms, k)
        assert found.tolist() == expected
        torch.testing.assert_close(weights, solution, rtol=1e-9, atol=1e-10)


def test_a_sparse_combination_is_found_and_no_more_is_taken() -> None:
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn((200, 100), generator=g), dim=1)
    target = 2 * atoms[5] - 0.5 * atoms[17] + atoms[99]
    indices, coefficients = orthogonal_matching_pursuit(target[None], atoms, 12)
    assert sorted(indices[0, :3].tolist()) == [5, 17, 99]
    weights = torch.zeros(200, dtype=torch.float64)
    weights[indices[0]] += coefficients[0]
    torch.testing.assert_close(weights[[5, 17, 99]], torch.tensor([2.0, -0.5, 1.0]).double(), rtol=1e-5, atol=1e-6)
    assert float(coefficients[0, 3:].abs().max()) < 1e-5


def test_dependent_atoms_and_more_atoms_than_dimensions() -> None:
    atoms = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    targets = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    indices, coefficients = orthogonal_matching_pursuit(targets, atoms, 4)
    again = torch.stack([coefficients[i] @ atoms[indices[i]].double() for i in range(2)])
    torch.testing.assert_close(again, targets.double(), rtol=1e-12, atol=1e-12)
    assert bool(torch.isfinite(coefficients).all())
    with pytest.raises(ValueError, match="5 of 4 atoms"):
        orthogonal_matching_pursuit(targets, atoms, 5)


def test_a_target_alone_is_as_among_others() -> None:
    g = torch.Generator().manual_seed(3)
    atoms, targets = torch.randn((40, 16), generator=g), torch.randn((6, 16), generator=g)
    indices, _ = orthogonal_matching_pursuit(targets, atoms, 4)
    for i in range(6):
        assert orthogonal_matching_pursuit(targets[i : i + 1], atoms, 4)[0].tolist() == [indices[i].tolist()]
