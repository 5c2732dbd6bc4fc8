"""Scores, groupings, allocation and routers against values worked out by hand and against the features themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from mergekit_lr.experts import grouping
from mergekit_lr.experts.allocation import allocate, windows
from mergekit_lr.experts.partition import Group, Partition, joined, partition
from mergekit_lr.experts.router import router_rows
from mergekit_lr.experts.score import best, ranked, score, super_experts

F64 = torch.float64


def sums() -> dict[str, torch.Tensor]:
    """Three experts: 2 tokens with (g, |y|) = (.5, 4), (.25, 2); one with (1, 1); none."""
    return {
        "routing_count": torch.tensor([2, 1, 0]),
        "gate_sum": torch.tensor([0.75, 1.0, 0.0], dtype=F64),
        "output_norm_sum": torch.tensor([6.0, 1.0, 0.0], dtype=F64),
        "output_square_sum": torch.tensor([20.0, 1.0, 0.0], dtype=F64),
        "gated_norm_sum": torch.tensor([2.5, 1.0, 0.0], dtype=F64),
        "gated_square_sum": torch.tensor([4.25, 1.0, 0.0], dtype=F64),
    }


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("frequency", [2, 1, 0]),
        ("gate_sum", [0.75, 1, 0]),
        ("ean", [6, 1, 0]),
        ("man", [3, 1, 0]),
        ("msan", [10, 1, 0]),
        ("reap", [1.25, 1, 0]),
        ("gated_norm", [2.5, 1, 0]),
        ("gated_square", [4.25, 1, 0]),
    ],
)
def test_scores_by_hand(name: str, want: list[float]) -> None:
    assert score(name, sums()).tolist() == want


def test_ranking_breaks_ties_by_index_and_honours_the_guard() -> None:
    s = torch.tensor([1.0, 3.0, 3.0, 0.0])
    assert ranked(s) == [1, 2, 0, 3]
    assert best(s, 2) == [1, 2]
    assert best(s, 2, torch.tensor([False, False, False, True])) == [1, 3]


def test_super_experts_stand_out_of_the_whole_model() -> None:
    peaks = torch.ones(4, 100)
    peaks[1, 7], peaks[2, 3], peaks[3, 9] = 500.0, 30.0, 80.0
    found = super_experts(peaks).nonzero().tolist()
    assert found == [[1, 7], [3, 9]]  # 30 is below a tenth of 500


def features(seed: int, experts: int = 7, tokens: int = 5, width: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(experts, tokens, width))


@given(seed=st.integers(0, 200), count=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_kmeans_on_the_gram_is_kmeans_on_the_outputs(seed: int, count: int) -> None:
    y = features(seed).reshape(7, -1)
    gram = torch.from_numpy(y @ y.T)
    labels = grouping.kmeans_labels(gram, count, seed, restarts=30)
    assert len(set(labels)) == count
    means = np.stack([y[np.array(labels) == k].mean(0) for k in sorted(set(labels))])
    inertia = sum(((y[e] - means[sorted(set(labels)).index(k)]) ** 2).sum() for e, k in enumerate(labels))
    assert grouping.kmeans_cost(gram, labels) == pytest.approx(inertia, abs=1e-9)
    direct = KMeans(count, n_init=30, random_state=seed).fit(y)
    assert inertia == pytest.approx(direct.inertia_, rel=0.05, abs=1e-9)


def test_spherical_kmeans_is_kmeans_on_normalised_tokens() -> None:
    y = features(3)
    unit = y / np.linalg.norm(y, axis=2, keepdims=True)
    cosine = np.einsum("ilk,jlk->ij", unit, unit) / y.shape[1]
    x = grouping.embedding(torch.from_numpy(cosine))
    apart = ((x[:, None] - x[None]) ** 2).sum(-1)
    assert np.allclose(apart, 2 * (1 - cosine), atol=1e-12)


def test_equal_experts_still_give_as_many_groups_as_asked() -> None:
    y = np.repeat(features(0, experts=2).reshape(2, -1), 3, axis=0)
    labels = grouping.kmeans_labels(torch.from_numpy(y @ y.T), 4, 0)
    assert len(set(labels)) == 4
    two = grouping.kmeans_labels(torch.from_numpy(y @ y.T), 2, 0)
    assert two[0] == two[1] == two[2] != two[3]


@pytest.mark.parametrize("linkage", grouping.LINKAGES)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_hierarchies_are_cut_at_the_count(linkage: str, count: int) -> None:
    y = torch.from_numpy(np.repeat(features(1, experts=3).reshape(3, -1), 2, axis=0))
    labels = grouping.hierarchical_labels(grouping.gram_distances(y @ y.T), count, linkage)
    assert len(set(labels)) == count
    if count == 3:
        assert labels == [0, 0, 1, 1, 2, 2]


def test_average_linkage_by_hand() -> None:
    at = torch.tensor([0.0, 1.0, 5.0, 6.5, 20.0], dtype=F64)[:, None]
    labels = grouping.hierarchical_labels(torch.cdist(at, at), 2, "average")
    assert labels == [0, 0, 0, 0, 1]
    assert grouping.hierarchical_labels(torch.cdist(at, at), 3, "average") == [0, 0, 1, 1, 2]


def test_dominant_experts_gather_those_with_their_logits() -> None:
    logits = torch.tensor([[1.0, 0, 0.9, 0.1], [0, 1, 0.1, -2.0]], dtype=F64)  # tokens x experts
    found = grouping.dominant(torch.tensor([5.0, 4.0, 1.0, 2.0]), logits.T @ logits, 2)
    # expert 2 points along expert 0; expert 3 against expert 1, so it is less unlike expert 0
    assert found.groups == (Group((0, 2, 3), 0), Group((1,), 1))


def test_ream_by_hand() -> None:
    gates = torch.tensor([[2.0, 0, 2.0, 0], [0, 3.0, 0, 1.0]], dtype=F64)  # tokens x experts
    similarity = grouping.ream_similarity(torch.eye(4, dtype=F64), gates.T @ gates)
    # columns 0 and 2 coincide, 1 and 3 too, all others are sqrt(2) apart, the largest distance
    assert similarity[0, 2] == pytest.approx((0.5 + 1) / 2)
    assert similarity[0, 1] == pytest.approx((0.5 + 0) / 2)
    found = grouping.greedy_groups(torch.tensor([9.0, 1.0, 2.0, 5.0]), similarity, 2, 2)
    assert found.groups == (Group((0, 2), 0), Group((1, 3), 3))
    big = grouping.greedy_groups(torch.tensor([9.0, 1.0, 2.0, 5.0]), similarity, 2, 16)
    assert big.groups == (Group((0, 1, 2), 0), Group((3,), 3))  # the first centre takes all there is
    small = grouping.greedy_groups(torch.tensor([9.0, 1.0, 2.0, 5.0]), similarity, 1, 2)
    assert small.groups == (Group((0, 1, 2, 3), 0),)  # no room left: nearest centre


def test_random_groups_are_even_and_follow_the_seed() -> None:
    labels = grouping.random_labels(10, 4, 1)
    assert sorted(labels.count(k) for k in range(4)) == [2, 2, 3, 3]
    assert labels == grouping.random_labels(10, 4, 1) != grouping.random_labels(10, 4, 2)


def test_partitions_are_ordered_by_centre_and_joined_in_place() -> None:
    own = partition([Group((1, 2), 2), Group((0,), 0)], 4)
    assert own == Partition((Group((0,), 0), Group((1, 2), 2)), (3,))
    assert own.new_index(4) == [0, 1, 1, -1]
    both = joined([((0, 1, 2, 3), own), ((4, 5, 6, 7), own)])
    assert [g.centre for g in both.groups] == [0, 2, 4, 6]
    assert both.groups[3].members == (5, 6)
    assert both.dropped == (3, 7)
    with pytest.raises(ValueError, match="partition"):
        partition([Group((0, 1), 0), Group((1,), 1)], 2)


def test_marginal_costs_decide_where_to_merge() -> None:
    # The first layer costs more in all, but its next merges are cheaper: total cost would choose the second.
    costs = [[0.0, 10.0, 9.0, 8.5, 0.0], [0.0, 9.0, 5.0, 1.0, 0.0]]
    assert allocate(costs, 7, 1) == [4, 3]  # a price of 1 against 8.5
    assert allocate(costs, 6, 1) == [4, 2]
    assert allocate(costs, 5, 1) == [4, 1]
    assert allocate(costs, 4, 1) == [3, 1]
    assert allocate(costs, 4, 2) == [2, 2]
    with pytest.raises(ValueError, match="cannot be divided"):
        allocate(costs, 1, 1)
    assert [list(w) for w in windows(5, 2)] == [[0, 1], [2, 3, 4]]
    assert [list(w) for w in windows(1, 2)] == [[0]]


def test_router_rows() -> None:
    own = partition([Group((0, 1, 2), 1), Group((4,), 4)], 5)
    frequency = [3.0, 1.0, 0.0, 9.0, 2.0]
    assert router_rows("mean", own, frequency, 5) == (((0, 0.75), (1, 0.25)), ((4, 1.0),))
    assert router_rows("select", own, frequency, 5) == (((1, 1.0),), ((4, 1.0),))
    assert len(router_rows("tied", own, frequency, 5)) == 5
    never = router_rows("mean", own, [0.0] * 5, 5)
    assert never[0] == ((0, 1 / 3), (1, 1 / 3), (2, 1 / 3))
