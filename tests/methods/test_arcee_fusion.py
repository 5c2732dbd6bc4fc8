"""Arcee Fusion against float64 with a sort, and the exactness of its quartiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergekit_lr.methods.arcee_fusion import importance
from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("arcee_fusion")
Array = npt.NDArray[np.float64]


def divergence(base: Array, other: Array) -> Array:
    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(-1, keepdims=True))
        probabilities: Array = e / e.sum(-1, keepdims=True)
        return probabilities

    p, q = softmax(other) + 1e-8, softmax(base) + 1e-8
    total: Array = (p * np.log(p / q)).sum(-1, keepdims=True)
    return total


def fused(base: npt.NDArray[np.float32], other: npt.NDArray[np.float32], most: int | None = None) -> Array:
    return apply(METHOD, [torch.from_numpy(base), torch.from_numpy(other)], most=most).double().numpy()


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, (base + 0.2 * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(7,), (12, 9), (3, 4, 5), (40, 257), (2, 9_000)], ids=str)
def test_against_a_sort(shape: tuple[int, ...]) -> None:
    base, other = pair(shape)
    b, o = base.astype(np.float64), other.astype(np.float64)
    score = (np.abs(o - b) * divergence(b, o)).astype(np.float32)
    ordered = np.sort(score, axis=None)
    q1, median, q3 = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    # Above a median plus 1.5 interquartile ranges there are few; all are at least 0.
    threshold = median + np.float32(1.5) * (q3 - q1)
    sure = np.abs(score - threshold) > 1e-5 * threshold
    got = fused(base, other)
    want = np.where(score >= threshold, o, b)
    assert np.array_equal(got[sure], want[sure])
    assert sure.sum() >= sure.size - 2
    assert 0 < (got == o).mean() < 0.5


def test_quartiles_are_exact_beyond_a_million_entries() -> None:
    base, other = pair((1_100, 1_000))
    got = fused(base, other, most=200_000)
    score = importance(torch.from_numpy(base), torch.from_numpy(other)).numpy()
    ordered = np.sort(score, axis=None)
    q1, median, q3 = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    taken = score >= median + np.float32(1.5) * (q3 - q1)
    assert np.array_equal(got, np.where(taken, other, base).astype(np.float64))


def test_rows_that_agree_have_no_importance() -> None:
    base, other = pair((6, 50))
    other[1:] = base[1:]
    score = importance(torch.from_numpy(base), torch.from_numpy(other))
    assert float(score[1:].abs().max()) == 0.0
    assert float(score[0].min()) > 0.0


def test_where_nothing_stands_out_the_other_is_taken_whole() -> None:
    base, other = pair((8, 1))
    assert np.array_equal(fused(base, other), other.astype(np.float64))
