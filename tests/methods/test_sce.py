"""SCE against float64 with masks, by both rules of weighing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.methods.sce import variance
from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("sce")
Array = npt.NDArray[np.float64]


def reference(d: Array, topk: float, floor: float) -> Array:
    """Merged task vector of ``d`` [models, entries]."""
    n = len(d)
    if topk < 1:
        v = d.var(axis=0)
        keep = int(np.count_nonzero(v) * topk)
        mask = np.zeros(d.shape[1])
        mask[np.argsort(-v, kind="stable")[:keep]] = 1
        d = d * mask
    sign = np.where(d.sum(0) >= 0, 1, -1)
    agree = np.sign(d) == sign
    energy = (d**2).mean(1)
    w = energy / energy.sum() if energy.sum() >= floor and energy.sum() > 0 else np.full(n, 1 / n)
    top = (w[:, None] * d * agree).sum(0)
    bottom = np.maximum((w[:, None] * agree).sum(0), floor)
    found: Array = np.where(top == 0, 0, top / np.where(bottom == 0, 1, bottom))
    return found


def run(d: Any, **merge: Any) -> npt.NDArray[np.float32]:
    tensors = [torch.as_tensor(r) for r in d]
    return apply(METHOD, tensors, torch.zeros_like(tensors[0]), merge=merge).numpy()


def grid(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).integers(-16, 17, shape) / 8).astype(np.float32)


@given(
    seed=st.integers(0, 999),
    n=st.sampled_from([1, 2, 4]),  # powers of two: variances on the grid are exact, so ties are the same ties
    topk=st.floats(0, 1),
    floor=st.sampled_from([0.0, 1e-6, 0.25]),
)
@settings(max_examples=120, deadline=None)
def test_against_float64(seed: int, n: int, topk: float, floor: float) -> None:
    d = grid(seed, n, 60)
    want = reference(d.astype(np.float64), topk, floor)
    assert np.allclose(run(d, select_topk=topk, mass_floor=floor), want, rtol=1e-6, atol=1e-6)


def test_by_hand() -> None:
    d = np.array([[3.0, 1.0, -1.0, 0.0], [1.0, 1.0, 2.0, 0.0]], np.float32)
    # energies 11 and 6: shares 11/17 and 6/17; at the third entry the first model is erased.
    want = [(33 + 6) / 17, 1.0, 2.0, 0.0]
    assert np.allclose(run(d), want)
    # the two varying entries are 1 and 3; the larger variance is the third's (2.25 against 1)
    assert np.allclose(run(d, select_topk=0.5), [0, 0, 2, 0])


def test_small_task_vectors_weigh_alike_in_mergekit_and_by_energy_in_the_paper() -> None:
    d = np.stack([np.full(10, 1e-4), np.full(10, 3e-4)]).astype(np.float32)
    assert np.allclose(run(d), 2e-4, rtol=1e-5)
    assert np.allclose(run(d, mass_floor=0), (1 * 1 + 9 * 3) / 10 * 1e-4, rtol=1e-5)


def test_variance_is_zero_exactly_where_models_agree() -> None:
    x = torch.full((5,), 0.1)
    assert not variance([x, x.clone(), x.clone()]).any()
    d = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    got = variance(list(d)).double()
    assert torch.allclose(got, d.double().var(dim=0, unbiased=False), rtol=1e-5)


def test_one_model_has_no_variance() -> None:
    d = grid(0, 1, 30)
    assert not run(d, select_topk=0.5).any()
    assert np.allclose(run(d), d[0])
    assert not run(d, select_topk=0.0).any()
    assert not run(grid(1, 3, 30), select_topk=0.0).any()


def test_a_large_tensor() -> None:
    d = grid(2, 2, 400_000) + np.float32(0.5) * grid(3, 2, 400_000)
    want = reference(d.astype(np.float64), 0.1, 1e-6)
    assert np.allclose(run(d, select_topk=0.1), want, rtol=1e-6, atol=1e-6)
