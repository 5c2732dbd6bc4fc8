"""Breadcrumbs against ranks from a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

LINEAR, TIES = get_method("breadcrumbs"), get_method("breadcrumbs_ties")


def masked(d: npt.NDArray[Any], density: float, gamma: float) -> npt.NDArray[Any]:
    """By ranks: drop the top gamma, keep the next density."""
    n = d.size
    if density >= 1:
        return d.copy()
    keep = int(density * n)
    top = min(int(gamma * n), n - keep)
    order = np.argsort(-np.abs(d), kind="stable")
    out = np.zeros_like(d)
    out[order[top : top + keep]] = d[order[top : top + keep]]
    return out


def run(method: Any, xs: list[Any], each: list[dict[str, float]], **merge: Any) -> Any:
    tensors = [torch.as_tensor(x) for x in xs]
    return apply(method, tensors, torch.zeros_like(tensors[0]), merge=merge, models=each).numpy()


def test_by_hand() -> None:
    x = np.array([10.0, -9, 1, 2, -3, 4, 5, 6, 7, 8], np.float32)
    got = run(LINEAR, [x], [{"weight": 1, "density": 0.5, "gamma": 0.2}])
    assert got.tolist() == [0, 0, 0, 0, 0, 4, 5, 6, 7, 8]
    got = run(LINEAR, [x], [{"weight": 2, "density": 0.7, "gamma": 0.5}])  # only 30 % is left for outliers
    assert got.tolist() == [0, 0, 2, 4, -6, 8, 10, 12, 14, 0]
    assert run(LINEAR, [x], [{"weight": 1, "density": 1, "gamma": 0.5}]).tolist() == x.tolist()
    assert not run(LINEAR, [x], [{"weight": 1, "density": 0.05, "gamma": 0.1}]).any()


@given(seed=st.integers(0, 999), n=st.integers(1, 90), density=st.floats(0, 1), gamma=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_any_vector(seed: int, n: int, density: float, gamma: float) -> None:
    x = (np.random.default_rng(seed).integers(-8, 9, n) / 4).astype(np.float32)
    got = run(LINEAR, [x], [{"weight": 1, "density": density, "gamma": gamma}])
    assert np.array_equal(got, masked(x, density, gamma))


def test_a_large_tensor() -> None:
    x = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
    got = run(LINEAR, [x], [{"weight": 1, "density": 0.9, "gamma": 0.01}])
    assert np.array_equal(got, masked(x, 0.9, 0.01))
    got = run(LINEAR, [x], [{"weight": 1, "density": 0.9, "gamma": 0.01}], threshold_scope="model")
    assert np.array_equal(got, masked(x, 0.9, 0.01))


def test_several_models_summed_or_elected() -> None:
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal(500).astype(np.float32) for _ in range(3)]
    each = [{"weight": w, "density": d, "gamma": 0.05} for w, d in ((1.0, 0.5), (0.5, 0.8), (0.25, 0.3))]
    w = np.array([e["weight"] for e in each])[:, None]
    v = w * np.stack([masked(x.astype(np.float64), e["density"], 0.05) for x, e in zip(xs, each, strict=True)])
    assert np.allclose(run(LINEAR, xs, each), v.sum(0), rtol=1e-6, atol=1e-6)
    assert np.allclose(run(LINEAR, xs, each, normalize=True), v.sum(0) / w.sum(), rtol=1e-6, atol=1e-6)
    agree = np.sign(v) == np.where(v.sum(0) >= 0, 1, -1)
    assert np.allclose(run(TIES, xs, each), (v * agree).sum(0), rtol=1e-6, atol=1e-6)


def test_rescale_restores_the_l1_norm() -> None:
    x = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    got = run(LINEAR, [x], [{"weight": 1, "density": 0.5, "gamma": 0.1}], rescale=True)
    assert np.isclose(np.abs(got).sum(), np.abs(x).sum(), rtol=1e-5)
