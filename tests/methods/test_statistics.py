"""Blocked sums against exact rational arithmetic (math.fsum), and their independence of cuts and threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.method import GRID, Call, Pass, Piece, Slicing
from mergekit_lr.pieces import fold_all, spans
from mergekit_lr.statistics import (
    BLOCK,
    CountNonzero,
    Gram,
    SquareSum,
    Sum,
    column_products,
    exact_sum,
    row_products,
    row_sums,
)

EPS = 2.0**-24


def over(wanted: Pass, tensors: list[torch.Tensor], most: int, slicing: Slicing = Slicing.ELEMENTWISE):  # type: ignore[type-arg,no-untyped-def]
    """The pass over tensors cut into pieces."""
    call = Call("t", tuple(tensors[0].shape), None, (), False)
    cuts = spans(call.shape, slicing, most)
    flat = [t.reshape(-1) for t in tensors]
    looks = ((call, Piece([f[s.start : s.stop].reshape(s.shape) for f in flat], None, s.start)) for s in cuts)
    return fold_all(wanted, looks)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_dot(a: torch.Tensor, b: torch.Tensor) -> float:
    # Products of two fp32 numbers are exact in fp64.
    return math.fsum((a.double() * b.double()).reshape(-1).tolist())


@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, GRID, 3 * GRID + 4097])
def test_gram_is_the_exact_one_to_fp32_rounding(n: int) -> None:
    tensors = [noise(n, seed=i) for i in range(3)]
    gram = over(Gram(), tensors, GRID)
    for i, a in enumerate(tensors):
        for j, b in enumerate(tensors):
            scale = math.sqrt(exact_dot(a, a) * exact_dot(b, b))
            assert abs(gram[i, j] - exact_dot(a, b)) <= 16 * EPS * scale
    assert np.array_equal(gram, gram.T)


@pytest.mark.parametrize("shape", [(4 * GRID + 17,), (3, 70_001), (257, 4099)])
def test_cuts_and_threads_do_not_change_a_bit(shape: tuple[int, ...]) -> None:
    tensors = [noise(*shape, seed=i) for i in range(2)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [
                (over(Gram(), tensors, most), over(Sum(), tensors, most), over(SquareSum(), tensors, most))
                for most in (GRID, 2 * GRID, 1 << 30)
            ]
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("offset", [0, 1, 3, 7, 16])
def test_memory_alignment_does_not_change_a_bit(offset: int) -> None:
    store = noise(2 * GRID + 64)
    x = torch.empty(2 * GRID + 64)
    x[offset : offset + GRID] = store[:GRID]
    one = over(Gram(), [store[:GRID], store[:GRID] * 0.5], GRID)
    other = over(Gram(), [x[offset : offset + GRID], store[:GRID] * 0.5], GRID)
    assert np.array_equal(one, other)


def test_row_cuts_do_not_change_a_bit() -> None:
    x = noise(50, 5000)
    found = [over(Sum(by_row=True), [x, x.abs()], most, Slicing.ROWWISE) for most in (1, 12_000, 1 << 30)]
    assert all(np.array_equal(f, found[0]) for f in found)
    assert abs(found[0][0] - math.fsum(x.double().reshape(-1).tolist())) < 1e-3


def test_sum_and_squares_are_exact_to_fp32_rounding() -> None:
    x = noise(3 * GRID + 5)
    y = x.abs()
    total, absolute = over(Sum(), [x, y], GRID)
    assert abs(absolute - math.fsum(y.double().tolist())) <= 16 * EPS * absolute
    assert abs(total - math.fsum(x.double().tolist())) <= 16 * EPS * absolute
    squares = over(SquareSum(), [x], GRID)[0]
    assert abs(squares - exact_dot(x, x)) <= 16 * EPS * squares


@pytest.mark.parametrize("scale", [1e25, 1e-22])
def test_squares_beyond_the_range_of_fp32(scale: float) -> None:
    x = noise(10_000) * scale
    assert math.isclose(over(Gram(), [x], GRID)[0, 0], exact_dot(x, x), rel_tol=1e-6)
    assert math.isclose(over(SquareSum(), [x], GRID)[0], exact_dot(x, x), rel_tol=1e-6)


def test_one_block_beyond_fp32_does_not_change_the_others_by_where_the_cuts_are() -> None:
    x = noise(4 * GRID + 9)
    x[5:9] = 1e25
    x[3 * GRID : 3 * GRID + BLOCK] = 1e-20
    found = [over(Gram(), [x, x.flip(0)], most) for most in (GRID, 3 * GRID, 1 << 30)]
    assert all(np.array_equal(f, found[0]) for f in found)
    rows = x[: 4 * GRID].reshape(64, -1)
    whole = row_products([rows])
    assert all(np.array_equal(whole[..., r], row_products([rows[r : r + 1]])[..., 0]) for r in range(64))


def test_nonfinite_sums_are_nan_not_errors() -> None:
    x = torch.zeros(2 * GRID)
    x[0], x[-1] = math.inf, -math.inf
    assert math.isnan(over(Sum(), [x], GRID)[0])
    assert exact_sum([1e16, 1.0, -1e16]) == 1.0
    assert math.isnan(exact_sum([math.inf, -math.inf]))


@given(rows=st.integers(1, 6), columns=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_row_and_column_products(rows: int, columns: int, seed: int) -> None:
    a, b = noise(rows, columns, seed=seed), noise(rows, columns, seed=seed + 100)
    x, y = a.double().numpy(), b.double().numpy()
    by_row, by_column = row_products([a, b]), column_products([a, b])
    assert np.allclose(by_row[0, 1], (x * y).sum(1), rtol=1e-5, atol=1e-6)
    assert np.allclose(by_row[1, 1], (y * y).sum(1), rtol=1e-6)
    assert np.allclose(by_column[0, 1], (x * y).sum(0), rtol=1e-12, atol=1e-14)
    assert np.array_equal(by_row[0, 1], by_row[1, 0])
    assert np.allclose(row_sums([a])[0], x.sum(1), rtol=1e-5, atol=1e-5)


def test_long_rows_are_summed_in_blocks() -> None:
    a, b = noise(2, 3 * BLOCK + 5), noise(2, 3 * BLOCK + 5, seed=1)
    exact = [exact_dot(a[i], b[i]) for i in range(2)]
    assert np.allclose(row_products([a, b])[0, 1], exact, rtol=0, atol=1e-3)


def test_nothing_to_sum() -> None:
    empty = torch.zeros(0)
    assert np.array_equal(over(Gram(), [empty, empty], GRID), np.zeros((2, 2)))
    assert np.array_equal(over(Sum(), [empty], GRID), np.zeros(1))
    assert np.array_equal(over(SquareSum(), [empty], GRID), np.zeros(1))


def test_count_nonzero() -> None:
    x = noise(2 * GRID + 3)
    x[::3] = 0
    assert over(CountNonzero(), [x, torch.zeros_like(x)], GRID) == [int((x.numpy() != 0).sum()), 0]
