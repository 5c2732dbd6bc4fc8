"""Matched neurons: planted permutations, brute force, ties, and the same bytes on any number of threads."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import LinalgError, UsageError
from mergekit_lr.linalg.assignment import assign, cross_gram
from mergekit_lr.matching.neurons import GatedMLP, correlation, match_neurons


def block(seed: int, f: int = 24, d: int = 10, *, gated: bool = True) -> GatedMLP:
    g = torch.Generator().manual_seed(seed)
    up, gate, down = (torch.randn(s, generator=g) for s in ((f, d), (f, d), (d, f)))
    return GatedMLP(up, down, gate if gated else None)


def run(mlp: GatedMLP, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = x @ mlp.up.double().T
    hidden = torch.nn.functional.silu(x @ mlp.gate.double().T) * hidden if mlp.gate is not None else hidden.relu()
    return hidden, hidden @ mlp.down.double().T


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("cost", ["weights", "activations", "both"])
def test_a_planted_permutation_is_found_and_changes_no_output(gated: bool, cost: str) -> None:
    mlp = block(0, gated=gated)
    planted = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    other = mlp.permuted(planted)
    x = torch.randn(50, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (hidden, y), (hidden_other, y_other) = run(mlp, x), run(other, x)
    assert (y - y_other).abs().max() < 1e-12
    found = match_neurons(mlp, other, (hidden, hidden_other), cost=cost)
    assert torch.equal(planted[found], torch.arange(24))
    assert torch.equal(other.permuted(found).up, mlp.up)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_an_assignment_is_the_best_of_all(seed: int, n: int) -> None:
    gain = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = max(sum(gain[i, p[i]].item() for i in range(n)) for p in permutations(range(n)))
    found = assign(gain)
    assert gain[torch.arange(n), found].sum().item() == pytest.approx(best, abs=1e-12)


def test_dead_and_duplicate_neurons_stay_where_they_are() -> None:
    mlp = block(3)
    for dead in (2, 7, 11):
        for t in (mlp.up, mlp.gate, mlp.down.T):
            t[dead] = 0
    for t in (mlp.up, mlp.gate, mlp.down.T):
        t[20] = t[5]
    assert torch.equal(match_neurons(mlp, mlp), torch.arange(24))
    swapped = torch.arange(24)
    swapped[[0, 1]] = swapped[[1, 0]]
    assert torch.equal(match_neurons(mlp, mlp.permuted(swapped)), swapped)


def test_ties_keep_the_old_permutation() -> None:
    keep = torch.tensor([2, 0, 1, 3])
    assert torch.equal(assign(torch.zeros(4, 4), keep), keep)
    gain = torch.zeros(4, 4)
    gain[3, 0], gain[1, 3] = 5.0, 5.0  # rows 1 and 3 trade places; rows 0 and 2 gain nothing by moving
    assert torch.equal(assign(gain, keep), torch.tensor([2, 3, 1, 0]))


def test_threads_do_not_change_a_bit() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2500, 300, generator=g), torch.randn(2500, 300, generator=g)
    assert torch.equal(cross_gram([(x, y)], threads=1), cross_gram([(x, y)], threads=3))
    exact = x.double().numpy() @ y.double().numpy().T
    assert abs(cross_gram([(x, y)]).numpy() - exact).max() < 1e-10


def test_half_precision_is_widened_first() -> None:
    x = torch.full((1, 4096), 1.0 + 2**-7, dtype=torch.bfloat16)
    assert cross_gram([(x, x)]).item() == 4096 * (1 + 2**-7) ** 2


def test_correlation_of_a_constant_column_is_zero() -> None:
    x = torch.tensor([[1.0, 0.1], [2.0, 0.1], [4.0, 0.1]])
    y = torch.tensor([[-2.0, 1.0], [-4.0, 0.0], [-8.0, 1.0]])
    got = correlation(x, y)
    assert got[0, 0].item() == pytest.approx(-1.0)
    assert got[1].tolist() == [0.0, 0.0]


def test_what_cannot_be_matched_is_an_error() -> None:
    with pytest.raises(LinalgError, match="different shapes"):
        match_neurons(block(0), block(0, f=25))
    broken = block(0)
    broken.up[3, 3] = float("nan")
    with pytest.raises(LinalgError, match="not finite"):
        match_neurons(broken, block(1))
    with pytest.raises(UsageError, match="needs activations"):
        match_neurons(block(0), block(1), cost="both")
    with pytest.raises(LinalgError, match="square"):
        assign(torch.zeros(2, 3))
