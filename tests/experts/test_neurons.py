"""Selection of neurons against brute force and dense linear algebra."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergekit_lr.experts import neurons


def problem(size: int, outputs: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(tokens, size, generator=g, dtype=torch.float64)
    phi = phi @ torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5
    target = torch.randn(tokens, outputs, generator=g, dtype=torch.float64)
    return phi, target, phi.T @ phi


def ridge_error(phi: torch.Tensor, target: torch.Tensor, chosen: list[int], damping: float) -> float:
    """min over W of sum ||W phi_S - y||^2 + damping ||W||^2, by a dense solve."""
    p = phi[:, chosen]
    a = p.T @ p + damping * torch.eye(len(chosen), dtype=torch.float64)
    w = torch.linalg.solve(a, p.T @ target)
    return float((p @ w - target).square().sum() + damping * w.square().sum())


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 0.5])
def test_every_step_is_the_best_single_addition(ridge: float) -> None:
    phi, target, gram = problem(9, 3, 40)
    damping = ridge * float(gram.diagonal().mean())
    greedy: list[int] = []
    for _ in range(5):
        free = [p for p in range(9) if p not in greedy]
        greedy.append(min(free, key=lambda p: ridge_error(phi, target, [*greedy, p], damping)))
        found = neurons.pivoted(gram, phi.T @ target, len(greedy), ridge)
        assert found.tolist() == sorted(greedy)


def test_the_right_neurons_are_found_where_few_make_the_target() -> None:
    phi, _, gram = problem(12, 4, 200, seed=3)
    truth = [1, 4, 10]
    target = phi[:, truth] @ torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = min(itertools.combinations(range(12), 3), key=lambda s: ridge_error(phi, target, list(s), 1e-9))
    assert list(best) == truth
    assert neurons.pivoted(gram, phi.T @ target, 3, 1e-8).tolist() == truth


def test_a_repeated_neuron_is_taken_once_and_all_can_be_taken() -> None:
    phi, target, _ = problem(4, 2, 30)
    doubled = torch.cat([phi, phi], dim=1)
    gram, cross = doubled.T @ doubled, doubled.T @ target
    assert neurons.pivoted(gram, cross, 4, 1e-9).tolist() == [0, 1, 2, 3]
    assert neurons.pivoted(gram, cross, 8, 1e-9).tolist() == list(range(8))


def test_nothing_known_takes_the_first() -> None:
    empty = torch.zeros(5, 5, dtype=torch.float64)
    assert neurons.pivoted(empty, torch.zeros(5, 2, dtype=torch.float64), 3).tolist() == [0, 1, 2]


def test_energy_is_the_square_of_the_contribution() -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(20, 3, generator=g, dtype=torch.float64)
    down = torch.randn(5, 3, generator=g, dtype=torch.float64)
    by_hand = [float((h[:, p, None] * down[None, :, p]).square().sum()) for p in range(3)]
    found = neurons.energy(h.square().sum(dim=0), down)
    torch.testing.assert_close(found, torch.tensor(by_hand, dtype=torch.float64))


def test_ties_go_to_the_lower_index() -> None:
    assert neurons.top(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]
