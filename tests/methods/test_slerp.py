"""slerp and nuslerp against the formula in float64, their ends, and their geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

SLERP, NUSLERP = get_method("slerp"), get_method("nuslerp")
Array = npt.NDArray[np.float64]


def arc(a: Array, b: Array, t: float) -> Array:
    """Along the great circle, in float64."""
    angle = np.arccos(np.clip(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
    found: Array = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return found


def slerp(a: Any, b: Any, t: float) -> npt.NDArray[np.float32]:
    return apply(SLERP, [torch.as_tensor(a), torch.as_tensor(b)], merge={"t": t}).numpy()


def nuslerp(a: Any, b: Any, w: tuple[float, float], base: Any = None, **merge: Any) -> Any:
    reference = None if base is None else torch.as_tensor(base)
    each = [{"weight": x} for x in w]
    return apply(NUSLERP, [torch.as_tensor(a), torch.as_tensor(b)], reference, merge=merge, models=each).numpy()


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_by_hand() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert np.allclose(slerp(a, b, 0.5), [np.sqrt(2), np.sqrt(2)])
    assert np.allclose(slerp(a, b, 1 / 3), [2 * np.cos(np.pi / 6), 2 * np.sin(np.pi / 6)])


@given(seed=st.integers(0, 999), t=st.floats(-0.5, 1.5), spread=st.floats(0.1, 3))
@settings(max_examples=80, deadline=None)
def test_against_float64(seed: int, t: float, spread: float) -> None:
    a = normal(300, seed=seed)
    b = a + np.float32(spread) * normal(300, seed=seed + 1)
    want = arc(a.astype(np.float64), b.astype(np.float64), t)
    assert np.allclose(slerp(a, b, t), want, rtol=0, atol=3e-6)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_ends(seed: int) -> None:
    a, b = normal(50, seed=seed), normal(50, seed=seed + 1)
    assert np.array_equal(slerp(a, b, 0.0), a)
    assert np.array_equal(slerp(a, b, 1.0), b)


@given(seed=st.integers(0, 999), t=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_equal_norms_are_kept_and_the_angle_is_divided(seed: int, t: float) -> None:
    a, b = normal(40, seed=seed), normal(40, seed=seed + 1)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    got = slerp(a, b, t).astype(np.float64)
    assert np.isclose(np.linalg.norm(got), 1, atol=1e-6)
    whole = np.arccos(np.vdot(a, b).astype(np.float64))
    assert np.isclose(np.arccos(np.clip(np.vdot(a, got), -1, 1)), t * whole, atol=2e-3)
    assert np.allclose(got, slerp(b, a, 1 - t), atol=1e-6)


def test_nearly_colinear_takes_the_line() -> None:
    a = normal(100)
    for b in (3 * a, -2 * a, a + np.float32(1e-3) * normal(100, seed=1)):
        assert np.allclose(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=0, atol=1e-6)


def test_a_zero_tensor_counts_as_orthogonal() -> None:
    b = normal(10)
    assert np.allclose(slerp(np.zeros_like(b), b, 0.5), np.sin(np.pi / 4) * b)
    assert not slerp(np.zeros_like(b), np.zeros_like(b), 0.3).any()


@given(seed=st.integers(0, 999), w1=st.floats(0.1, 2), w2=st.floats(0.1, 2), based=st.booleans())
@settings(max_examples=60, deadline=None)
def test_nuslerp_flattened(seed: int, w1: float, w2: float, based: bool) -> None:
    a, b = normal(8, 9, seed=seed), normal(8, 9, seed=seed + 1)
    base = normal(8, 9, seed=seed + 2) if based else None
    origin = np.zeros((8, 9)) if base is None else base.astype(np.float64)
    want = origin + arc(a - origin, b - origin, w2 / (w1 + w2))
    assert np.allclose(nuslerp(a, b, (w1, w2), base), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("based", [False, True])
def test_nuslerp_by_rows_and_by_columns(based: bool) -> None:
    a, b = normal(7, 40), normal(7, 40, seed=1)
    base = normal(7, 40, seed=2) if based else None
    origin = np.zeros((7, 40)) if base is None else base.astype(np.float64)
    x, y = a - origin, b - origin
    rows = origin + np.stack([arc(p, q, 0.25) for p, q in zip(x, y, strict=True)])
    got = nuslerp(a, b, (3, 1), base, nuslerp_flatten=False)
    assert np.allclose(got, rows, rtol=0, atol=1e-5)
    columns = origin + np.stack([arc(p, q, 0.25) for p, q in zip(x.T, y.T, strict=True)]).T
    got = nuslerp(a, b, (3, 1), base, nuslerp_flatten=False, nuslerp_row_wise=True)
    assert np.allclose(got, columns, rtol=0, atol=1e-5)
    flat = nuslerp(a, b, (3, 1), base, nuslerp_row_wise=True)
    assert np.array_equal(flat, nuslerp(a, b, (3, 1), base))


def test_nuslerp_of_more_axes() -> None:
    a, b = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    got = nuslerp(a, b, (1, 1), nuslerp_flatten=False)
    assert np.allclose(got[2, 1], arc(a[2, 1].astype(float), b[2, 1].astype(float), 0.5), atol=1e-5)
    got = nuslerp(a, b, (1, 1), nuslerp_flatten=False, nuslerp_row_wise=True)
    want = arc(a[:, 2, 3].astype(float), b[:, 2, 3].astype(float), 0.5)
    assert np.allclose(got[:, 2, 3], want, atol=1e-5)


@pytest.mark.parametrize("row_wise", [False, True])
def test_a_vector_is_one_vector_either_way(row_wise: bool) -> None:
    a, b = normal(30), normal(30, seed=1)
    got = nuslerp(a, b, (1, 3), nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    assert np.allclose(got, arc(a.astype(float), b.astype(float), 0.75), rtol=0, atol=1e-5)


def test_nuslerp_degenerate() -> None:
    a, b = normal(20), normal(20, seed=1)
    assert np.array_equal(nuslerp(a, b, (1, -1)), nuslerp(a, b, (1, 1)))  # no ratio: half way
    assert np.allclose(nuslerp(a, 2 * a, (1, 1)), 1.5 * a, rtol=1e-6)
    assert np.allclose(nuslerp(a, -a, (3, 1)), 0.5 * a, rtol=1e-6, atol=1e-7)
    half = np.sin(np.pi / 4) * b
    assert np.allclose(nuslerp(np.zeros_like(b), b, (1, 1)), half, rtol=1e-6)
    rows = np.stack([np.zeros_like(a), a])
    got = nuslerp(rows, np.stack([b, b]), (1, 1), nuslerp_flatten=False)
    assert np.allclose(got[0], half, rtol=1e-6)
