"""RAM and RAM+ by hand and against float64 with masks."""

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

Array = npt.NDArray[np.float64]


def run(method: str, deltas: Any, **merge: Any) -> Array:
    """Merged task vector of ``deltas`` [models, entries]."""
    tensors = [torch.as_tensor(np.asarray(d, dtype=np.float32)) for d in deltas]
    return apply(get_method(method), tensors, torch.zeros_like(tensors[0]), merge=merge).double().numpy()


def test_ram_by_hand() -> None:
    #          both change   only the first  only the second  neither
    deltas = [[2.0, 1.0, 0.0, 0.0], [4.0, 0.0, -3.0, 1e-6]]
    assert run("ram", deltas).tolist() == [3.0, 1.0, -3.0, 0.0]


def test_what_is_at_epsilon_does_not_count_as_changed() -> None:
    assert run("ram", [[0.25, 0.5], [0.25, 0.25]], epsilon=0.25).tolist() == [0.0, 0.5]


def test_ramplus_by_hand() -> None:
    # first: 1 shared, 2 alone: 1/2 clipped to alpha 0.25; second: 1 shared, 4 alone: 1/4
    deltas = [[2.0, 1.0, 1.0, 0, 0, 0, 0], [4.0, 0, 0, 8.0, 8.0, 8.0, 8.0]]
    got = run("ramplus_tl", deltas, r=0.5, alpha=0.25)
    assert got.tolist() == [3.0, 1.125, 1.125, 9.0, 9.0, 9.0, 9.0]
    assert run("ramplus_tl", deltas, r=0.0).tolist() == run("ram", deltas).tolist()


def test_a_model_without_entries_of_its_own_is_only_averaged() -> None:
    assert run("ramplus_tl", [[2.0, 2.0], [4.0, 4.0]]).tolist() == [3.0, 3.0]


def test_one_model_is_the_model() -> None:
    delta = [[0.5, -1.0, 2.0]]
    assert run("ram", delta).tolist() == delta[0]
    assert run("ramplus_tl", delta).tolist() == delta[0]


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
@given(seed=st.integers(0, 999), models=st.integers(1, 4), share=st.floats(0.05, 0.9))
@settings(max_examples=40, deadline=None)
def test_against_masks_in_float64(method: str, seed: int, models: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    d = rng.integers(-8, 9, (models, 300)) / 4 * (rng.random((models, 300)) < share)
    changed = np.abs(d) > 1e-5
    count = changed.sum(0)
    factor = np.ones((models, 1))
    if method == "ramplus_tl":
        shared, alone = (changed & (count > 1)).sum(1), (changed & (count == 1)).sum(1)
        factor = 1 + 0.1 * np.minimum(0.2, shared / np.maximum(alone, 1e-5))[:, None]
    want = (d * changed * np.where(count == 1, factor, 1)).sum(0) / np.maximum(count, 1)
    assert np.allclose(run(method, d), want, rtol=1e-6, atol=1e-7)
