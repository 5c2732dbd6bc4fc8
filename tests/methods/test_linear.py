"""linear and passthrough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

LINEAR, PASSTHROUGH = get_method("linear"), get_method("passthrough")
WEIGHT = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)


def soup(tensors: list[torch.Tensor], weights: list[float], **merge: bool) -> torch.Tensor:
    return apply(LINEAR, tensors, merge=dict(merge), models=[{"weight": w} for w in weights])


def test_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    assert soup([a, b], [3, 1]).tolist() == [2.0, 1.0]
    assert soup([a, b], [3, 1], normalize=False).tolist() == [8.0, 4.0]


@given(st.lists(WEIGHT, min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_against_float64(weights: list[float], seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((len(weights), 50)).astype(np.float32)
    total = sum(weights)
    if abs(total) < 1e-2:
        return
    w = np.array(weights)
    want = (w[:, None] * x.astype(np.float64)).sum(0) / total
    got = soup([torch.from_numpy(r) for r in x], weights).numpy()
    scale = (np.abs(w)[:, None] * np.abs(x)).sum(0) / abs(total)
    assert np.all(np.abs(got - want) <= 4 * len(weights) * 2.0**-24 * scale)


def test_weights_that_cancel_are_refused_before_any_tensor_is_read() -> None:
    models = tuple(LINEAR.PerModel.model_validate({"weight": w}) for w in (1.0, -1.0))
    normalized = LINEAR.Merge.model_validate({})
    plain = LINEAR.Merge.model_validate({"normalize": False})
    assert "normalize: false" in LINEAR.problems(normalized, models)[0]
    assert LINEAR.problems(plain, models) == []


def test_passthrough_copies_bits_and_scales() -> None:
    x = torch.tensor([1.5, -0.0, 3e38, 1e-45])
    copy = apply(PASSTHROUGH, [x])
    assert torch.equal(copy.view(torch.int32), x.view(torch.int32))
    assert copy.data_ptr() != x.data_ptr()
    half = apply(PASSTHROUGH, [x], models=[{"scale": 0.5}])
    assert half.tolist() == (x * 0.5).tolist()
    zero = apply(PASSTHROUGH, [torch.ones(3)], models=[{"scale": 0}])
    assert zero.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        soup([torch.ones(1)], [bad])
    with pytest.raises(ValueError, match="finite"):
        apply(PASSTHROUGH, [torch.ones(1)], models=[{"scale": bad}])
