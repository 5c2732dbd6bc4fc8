"""Karcher mean: first-order optimality, symmetry, two points by slerp, and the iteration in full dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("karcher")
Array = npt.NDArray[np.float64]


def logarithm(m: Array, u: Array) -> Array:
    """Tangent vector at m that points to u, as long as the angle."""
    cos = np.clip(u @ m, -1, 1)
    angle = np.arccos(cos)
    return u - cos * m if angle < 1e-9 else (angle / np.sin(angle)) * (u - cos * m)


def iteration(x: Array, steps: int, tol: float) -> Array:
    """The published iteration on the vectors themselves."""
    norms = np.linalg.norm(x, axis=1)
    u = x / norms[:, None]
    m = u.mean(0) / np.linalg.norm(u.mean(0))
    for _ in range(steps):
        step = np.mean([logarithm(m, p) for p in u], axis=0)
        size = np.linalg.norm(step)
        if size < tol:
            break
        m = np.cos(size) * m + np.sin(size) * step / size
        m /= np.linalg.norm(m)
    found: Array = m * norms.mean()
    return found


def run(x: Any, **merge: Any) -> npt.NDArray[np.float32]:
    return apply(METHOD, [torch.as_tensor(r) for r in x], merge=merge).numpy()


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(seed=st.integers(0, 999), n=st.integers(2, 5), steps=st.integers(0, 12), near=st.booleans())
@settings(max_examples=60, deadline=None)
def test_against_the_iteration_in_full_dimension(seed: int, n: int, steps: int, near: bool) -> None:
    x = normal(n, 80, seed=seed)
    if near:
        x = normal(80, seed=seed) + np.float32(0.1) * x
    want = iteration(x.astype(np.float64), steps, 1e-5)
    assert np.allclose(run(x, max_iter=steps), want, rtol=0, atol=2e-5)


@given(seed=st.integers(0, 999), n=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_the_mean_pulls_equally_to_all_sides(seed: int, n: int) -> None:
    x = normal(n, 60, seed=seed)
    got = run(x, max_iter=100, tol=1e-9).astype(np.float64)
    m = got / np.linalg.norm(got)
    u = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    pull = np.sum([logarithm(m, p) for p in u], axis=0)
    assert np.linalg.norm(pull) < 1e-5
    assert np.isclose(np.linalg.norm(got), np.linalg.norm(x, axis=1).mean(), rtol=1e-5)


def test_two_models_meet_in_the_middle_of_their_arc() -> None:
    a, b = normal(40), normal(40, seed=1)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    half = apply(get_method("slerp"), [torch.as_tensor(a), torch.as_tensor(b)], merge={"t": 0.5}).numpy()
    assert np.allclose(run([a, b]), half, atol=1e-6)


def test_rotating_the_inputs_rotates_the_mean() -> None:
    x = normal(3, 12).astype(np.float64)
    q, _ = np.linalg.qr(normal(12, 12, seed=1).astype(np.float64))
    one = run(x.astype(np.float32)) @ q
    other = run((x @ q).astype(np.float32))
    assert np.allclose(one, other, atol=1e-5)


def test_degenerate() -> None:
    x = normal(1, 30)[0]
    zero = np.zeros_like(x)
    assert not run([zero, zero, zero]).any()
    # A zero tensor has no direction, but its norm counts.
    assert np.allclose(run([x, zero]), x / 2, rtol=1e-6)
    # Directions that cancel: the first model's, and nothing pulls away from it.
    assert np.allclose(run([x, -x]), x, rtol=1e-6)
    assert np.allclose(run([x, -x, x, -x]), x, rtol=1e-6)
    assert np.allclose(run([x, -3 * x]), 2 * x, rtol=1e-6)
    assert np.array_equal(run([x]), x)
