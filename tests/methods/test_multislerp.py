"""multislerp against its statement with a tangent step, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("multislerp")
Array = npt.NDArray[np.float64]


def as_stated(x: Array, w: Array, eps: float = 1e-8) -> Array:
    """Project on the tangent space at the mean direction, average there, step along the geodesic."""
    norms = np.linalg.norm(x, axis=1)
    u = x / (norms + eps)[:, None]
    m = w @ u
    m /= np.linalg.norm(m)
    tangent = w @ (u - (u @ m)[:, None] * m)
    r = np.linalg.norm(tangent) + eps
    found: Array = (m * np.cos(r) + tangent * np.sin(r) / r) * (w @ norms)
    return found


def run(x: Any, w: Any, base: Any = None, **merge: Any) -> npt.NDArray[np.float32]:
    reference = None if base is None else torch.as_tensor(base)
    tensors = [torch.as_tensor(r) for r in x]
    return apply(METHOD, tensors, reference, merge=merge, models=[{"weight": float(v)} for v in w]).numpy()


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(
    seed=st.integers(0, 999),
    weights=st.lists(st.floats(0.1, 2), min_size=2, max_size=5),
    normalize=st.booleans(),
    based=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_against_the_statement(seed: int, weights: list[float], normalize: bool, based: bool) -> None:
    x = normal(len(weights), 60, seed=seed)
    base = normal(60, seed=seed + 1) if based else None
    origin = np.zeros(60) if base is None else base.astype(np.float64)
    w = np.array(weights) / (sum(weights) if normalize else 1)
    want = origin + as_stated(x - origin, w)
    got = run(x, weights, base, normalize_weights=normalize)
    assert np.allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


def test_two_unit_vectors_half_way_is_the_middle_of_their_arc() -> None:
    got = run(np.array([[1, 0], [0, 1]], np.float32), [1, 1])
    assert np.allclose(got, [np.sqrt(0.5), np.sqrt(0.5)])


def test_norm_is_the_mean_norm() -> None:
    x = normal(3, 500) * np.array([[1], [2], [4]], np.float32)
    w = np.array([0.5, 0.25, 0.25])
    assert np.isclose(np.linalg.norm(run(x, w)), w @ np.linalg.norm(x, axis=1), rtol=1e-5)


def test_one_model_is_returned() -> None:
    x, base = normal(1, 20), normal(20, seed=1)
    assert np.array_equal(run(x, [0.3]), x[0])
    assert np.allclose(run(x, [0.3], base), x[0], rtol=0, atol=3e-7)


def test_no_direction_left() -> None:
    x = normal(2, 20)
    assert np.allclose(run(np.stack([x[0], -x[0]]), [1, 1]), 0, atol=1e-6)
    assert np.allclose(run(np.stack([x[0], -3 * x[0]]), [1, 1]), -x[0], atol=1e-5)
    assert not run(np.zeros((3, 20), np.float32), [1, 2, 3]).any()


def test_directions_that_nearly_cancel_still_have_a_mean() -> None:
    x = normal(2, 2000).astype(np.float64)
    pair = np.stack([x[0], 1e-4 * x[1] - x[0]]).astype(np.float32)
    want = as_stated(pair.astype(np.float64), np.array([0.5, 0.5]))
    got = run(pair, [1, 1])
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def test_weights_that_cancel_are_refused() -> None:
    each = tuple(METHOD.PerModel.model_validate({"weight": w}) for w in (1, -1))
    assert "normalize_weights" in METHOD.problems(METHOD.Merge.model_validate({}), each)[0]
    assert METHOD.problems(METHOD.Merge.model_validate({"normalize_weights": False}), each) == []
