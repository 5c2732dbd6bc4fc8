"""NearSwap by hand, and what t promises."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("nearswap")


def nearswap(base: list[float], other: list[float], t: float) -> list[float]:
    out = apply(METHOD, [torch.tensor(base), torch.tensor(other)], merge={"t": t})
    return [float(x) for x in out]


def test_by_hand() -> None:
    # |difference| 0.25 <= t: taken over; 1: a quarter of the way; 2 downwards: an eighth; equal: as it is
    assert nearswap([1.0, 1.0, 1.0, 3.0], [1.25, 2.0, -1.0, 3.0], 0.25) == [1.25, 1.25, 0.75, 3.0]


def test_ends() -> None:
    base, other = [1.0, -2.0, 0.0], [1.5, 8.0, -0.125]
    assert nearswap(base, other, 0.0) == base
    assert nearswap(base, other, 10.0) == other


@given(seed=st.integers(0, 999), t=st.floats(2.0**-12, 4, width=32))
@settings(max_examples=50, deadline=None)
def test_never_further_from_the_base_than_t(seed: int, t: float) -> None:
    rng = np.random.default_rng(seed)
    base, other = (rng.standard_normal(200).astype(np.float32) for _ in range(2))
    out = apply(METHOD, [torch.from_numpy(base), torch.from_numpy(other)], merge={"t": t}).numpy().astype(np.float64)
    apart = other.astype(np.float64) - base
    near = np.abs(apart) <= t
    assert np.allclose(out[near], other[near], rtol=0, atol=1e-6)
    assert np.allclose(out[~near] - base[~near], np.sign(apart[~near]) * t, rtol=0, atol=2e-6)
