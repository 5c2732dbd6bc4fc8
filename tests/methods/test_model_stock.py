"""Model stock: closed form, geometry, whole tensors and rows."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("model_stock")
Array = npt.NDArray[np.float64]


def reference(x: Array, base: Array, floor: float) -> Array:
    """Equations of the paper with mergekit's floor, on flat vectors."""
    d, n = x - base, len(x)
    cosines = [
        np.clip(np.vdot(p, q) / max(np.linalg.norm(p) * np.linalg.norm(q), floor, 1e-300), -1, 1)
        for p, q in combinations(d, 2)
    ]
    c = np.mean(cosines)
    q = 1 + (n - 1) * c
    t = n * c / q if abs(q) >= 1e-6 else 0.0
    found: Array = t * x.mean(0) + (1 - t) * base
    return found


def run(x: Any, base: Any, **merge: Any) -> npt.NDArray[np.float32]:
    tensors = [torch.as_tensor(r) for r in x]
    return apply(METHOD, tensors, torch.as_tensor(base), merge=merge).numpy()


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(
    seed=st.integers(0, 999),
    n=st.integers(2, 5),
    shared=st.floats(0, 3),
    floor=st.sampled_from([0.0, 1e-6, 0.5]),
    scale=st.sampled_from([1.0, 1e-3]),
)
@settings(max_examples=80, deadline=None)
def test_against_float64(seed: int, n: int, shared: float, floor: float, scale: float) -> None:
    base = normal(70, seed=seed)
    x = base + np.float32(scale) * (normal(n, 70, seed=seed + 1) + np.float32(shared) * normal(70, seed=seed + 2))
    want = reference(x.astype(np.float64), base.astype(np.float64), floor)
    assert np.allclose(run(x, base, norm_floor=floor), want, rtol=0, atol=1e-5)


def test_by_hand() -> None:
    base = np.zeros(2, np.float32)
    a, b = np.array([1, 0], np.float32), np.array([0.5, np.sqrt(0.75)], np.float32)
    # cos = 1/2, so t = 2 (1/2) / (1 + 1/2) = 2/3
    assert np.allclose(run([a, b], base), (a + b) / 3)


def test_between_base_and_average() -> None:
    base, d = normal(50), normal(50, seed=1)
    same = run([base + d] * 3, base)
    assert np.allclose(same, base + d, atol=1e-6)
    e = np.eye(4, dtype=np.float32)
    assert np.allclose(run([e[0], e[1], e[2]], e[3] * 0), 0, atol=1e-7)  # orthogonal task vectors: the base


def test_the_papers_geometry() -> None:
    """Equal lengths and angles, fine-tunes w = mu + noise with noise orthogonal to mu: the merge is t times mean

    and lies on the line base-average where ``(average - merge)`` is orthogonal to the task of the hidden centre:
    for orthogonal noise of equal length, ``cos = |mu|^2 / (|mu|^2 + |noise|^2)``, and the merge is the base plus
    the foot of the perpendicular from the centre on the average's direction.
    """
    mu, r = np.zeros(8), 0.75
    mu[0] = 1.0
    x = np.stack([mu + r * np.eye(8)[k] for k in (1, 2, 3)])
    average = x.mean(0)
    foot = average * (mu @ average) / (average @ average)
    assert np.allclose(run(x.astype(np.float32), np.zeros(8, np.float32)), foot, atol=1e-6)


def test_filter_wise_is_the_same_by_rows() -> None:
    base = normal(6, 40)
    x = base + normal(3, 6, 40, seed=1) + 2 * normal(6, 40, seed=2)
    want = np.stack([reference(x[:, r].astype(float), base[r].astype(float), 1e-6) for r in range(6)])
    assert np.allclose(run(x, base, filter_wise=True), want, rtol=0, atol=1e-5)
    one = run(x[:, 0], base[0], filter_wise=True)
    assert np.allclose(one, run(x[:, 0], base[0]), atol=1e-6)


def test_degenerate() -> None:
    base = normal(20)
    assert np.allclose(run([base, base], base, norm_floor=0), base)
    # Two opposite task vectors: cos = -1, 1 + cos = 0, so the base.
    d = normal(20, seed=1)
    assert np.allclose(run([base + d, base - d], base), base, atol=1e-6)
    # mergekit's floor pulls tiny task vectors to the base, the paper's rule does not.
    tiny = np.float32(1e-5) * d
    zero = np.zeros_like(base)
    pulled, paper = run([tiny, tiny], zero), run([tiny, tiny], zero, norm_floor=0)
    assert np.allclose(paper, tiny, rtol=1e-5)
    assert np.linalg.norm(pulled) < 0.1 * np.linalg.norm(tiny)
