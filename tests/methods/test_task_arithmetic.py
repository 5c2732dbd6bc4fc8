"""Task arithmetic: by hand, and its algebra."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("task_arithmetic")
DYADIC = st.integers(-8, 8).map(lambda k: k / 4)  # exact in fp32, and so are the sums below


def merged(tensors: list[torch.Tensor], base: torch.Tensor, weights: list[float], **merge: Any) -> torch.Tensor:
    if "lam" in merge:
        merge["lambda"] = merge.pop("lam")
    return apply(METHOD, tensors, base, merge=merge, models=[{"weight": w} for w in weights])


def grid(seed: int, n: int = 30) -> torch.Tensor:
    return torch.randint(-512, 512, (n,), generator=torch.Generator().manual_seed(seed)) / 256


def test_by_hand() -> None:
    base, a, b = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0])
    assert merged([a, b], base, [0.5, 0.25]).tolist() == [1.5, 1.5]
    assert merged([a, b], base, [0.5, 0.25], lam=2.0).tolist() == [2.0, 2.0]
    assert merged([a, b], base, [0.5, 0.5], normalize=True).tolist() == [1.5, 2.5]
    assert merged([a], base, [-1.0]).tolist() == [0.0, 2.0]  # forgetting


@given(st.integers(0, 99), DYADIC, DYADIC, DYADIC)
@settings(max_examples=60, deadline=None)
def test_linear_in_lambda_and_in_the_weights(seed: int, u: float, v: float, lam: float) -> None:
    base, a, b = grid(seed), grid(seed + 1), grid(seed + 2)
    one = merged([a, b], base, [u, v])
    assert torch.equal(merged([a, b], base, [u, v], lam=lam) - base, lam * (one - base))
    assert torch.equal(one - base, u * (a - base) + v * (b - base))
    assert torch.equal(merged([b, a], base, [v, u]), one)


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_one_task_with_weight_one_is_that_model(seed: int) -> None:
    base, a = grid(seed), grid(seed + 1)
    assert torch.equal(merged([a], base, [1.0]), a)
    assert torch.equal(merged([a, a, a], base, [0.5, 0.25, 0.25]), a)


def test_weights_that_cancel_are_not_divided_by() -> None:
    base, a, b = torch.zeros(1), torch.tensor([3.0]), torch.tensor([1.0])
    assert merged([a, b], base, [1.0, -1.0], normalize=True).tolist() == [2.0]


def test_options_taken_over_for_old_recipes_change_nothing() -> None:
    base, a = grid(0), grid(1)
    plain = merged([a], base, [0.5])
    same = apply(
        METHOD, [a], base,
        merge={"int8_mask": True, "rescale": True}, models=[{"weight": 0.5, "density": 0.3}],
    )  # fmt: skip
    assert torch.equal(plain, same)
