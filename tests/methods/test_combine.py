"""Sums and sign elections against float64 numpy with masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.combine import agreeing_sum, majority, sum_in_place, summable, weighted_sum

SMALL_GRID = st.integers(-3, 3)


def parts_of(rows: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(r, dtype=torch.float32) / 2 for r in rows]


@given(
    st.lists(st.tuples(SMALL_GRID, SMALL_GRID, SMALL_GRID), min_size=1, max_size=20),
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_agreeing_sum_is_a_masked_mean(columns: list[tuple[int, int, int]], shares: list[float], divide: bool) -> None:
    rows = [list(r) for r in zip(*columns, strict=True)]
    parts = parts_of(rows)
    x = np.array(rows) / 2
    sign = np.where(x.sum(0) >= 0, 1, -1)
    keep = np.sign(x) == sign
    want = (x * keep).sum(0)
    if divide:
        divisor = (np.array(shares)[:, None] * keep).sum(0)
        want = want / np.where(divisor == 0, 1, divisor)
    elected = majority(parts)
    voted = x.any(axis=0)
    assert np.array_equal(np.signbit(elected.numpy())[voted], sign[voted] < 0)
    got = agreeing_sum(parts, elected, shares=shares if divide else None)
    assert np.allclose(got.numpy(), want, rtol=1e-6, atol=0)


def test_a_tie_goes_to_plus() -> None:
    parts = [torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])]
    sign = majority(parts)
    assert not np.signbit(sign.numpy()).any()
    assert agreeing_sum(parts, sign, shares=None).tolist() == [1, 1]


def test_divisor_floor() -> None:
    parts = [torch.tensor([2.0, 0.0])]
    got = agreeing_sum(parts, torch.ones(2), shares=[1e-9], divisor_floor=2.0**-10)
    assert got.tolist() == [2048.0, 0.0]


def test_opposite_shares_that_cancel_divide_by_one() -> None:
    parts = [torch.tensor([3.0]), torch.tensor([5.0])]
    assert agreeing_sum(parts, torch.ones(1), shares=[1.0, -1.0]).tolist() == [8.0]


def test_weighted_sum_rounds_each_product_and_makes_a_new_tensor() -> None:
    x, y = torch.tensor([0.1, 3.0]), torch.tensor([0.7, -3.0])
    got = weighted_sum([x, y], [0.3, 0.9])
    want = np.float32(0.3) * x.numpy() + np.float32(0.9) * y.numpy()
    assert np.array_equal(got.numpy(), want)
    assert x.tolist() == [pytest.approx(0.1), 3.0]
    assert sum_in_place([x, y]) is x


def test_large_coefficients_are_not_summed_from_weights() -> None:
    assert summable([1.0, -15.0]) == [1.0, -15.0]
    assert summable([1e7, 0.6]) is None
    assert str(summable([float("nan"), 1.0])) == "[nan, 1.0]"


@pytest.mark.parametrize("share", [0.4, 0.1, 1 / 3, 1e-3])
@pytest.mark.parametrize("models", [1, 2, 3, 5, 9])
def test_counting_equal_shares_gives_the_bits_of_adding_them(share: float, models: int) -> None:
    generator = torch.Generator().manual_seed(models)
    parts = [torch.randn(4096, generator=generator) for _ in range(models)]
    sign = np.copysign(np.float32(1), majority(parts).numpy())
    agreeing = [np.maximum(x.numpy() * sign, np.float32(0)) for x in parts]
    total, divisor = agreeing[0].copy(), np.sign(agreeing[0]) * np.float32(share)
    for x in agreeing[1:]:
        total += x
        divisor += np.sign(x) * np.float32(share)
    want = total / np.where(divisor == 0, np.float32(1), divisor) * sign
    got = agreeing_sum(parts, majority(parts), shares=[share] * models)
    assert np.array_equal(got.numpy().view(np.int32), want.view(np.int32))


def test_nothing_to_add_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        agreeing_sum([], torch.ones(1), shares=None)
