"""DARE: masks from numpy's own Philox, unbiasedness, and both rules of rescaling."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

LINEAR, TIES = get_method("dare_linear"), get_method("dare_ties")


def run(method: Any, tensors: list[Any], base: Any, each: list[dict[str, float]], **more: Any) -> Any:
    merge = more.pop("merge", {})
    torches = [torch.as_tensor(t) for t in tensors]
    return apply(method, torches, torch.as_tensor(base), merge=merge, models=each, **more).numpy()


def kept(n: int, density: float, model: int, seed: int = 0, name: str = "tensor") -> npt.NDArray[np.bool_]:
    """Which entries survive, from the documented key and numpy's generator."""
    text = "\0".join((str(seed), f"model {model}", name, "mask")).encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-n // 4))
    return words.view(np.uint16)[:n] < round(density * 65536)


def normal(n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def test_linear_against_float64_with_the_documented_masks() -> None:
    n, base = 5000, normal(5000, 9)
    a, b = normal(n, 1), normal(n, 2)
    each = [{"weight": 0.5, "density": 0.25}, {"weight": 0.75, "density": 0.5}]
    da, db = (x.astype(np.float64) - base for x in (a, b))
    want = base + 0.5 * da * kept(n, 0.25, 0) / 0.25 + 0.75 * db * kept(n, 0.5, 1) / 0.5
    assert np.allclose(run(LINEAR, [a, b], base, each), want, rtol=0, atol=2e-6)
    plain = base + 0.5 * da * kept(n, 0.25, 0) + 0.75 * db * kept(n, 0.5, 1)
    assert np.allclose(run(LINEAR, [a, b], base, each, merge={"rescale": False}), plain, rtol=0, atol=2e-6)
    seeded = base + 0.5 * da * kept(n, 0.25, 0, seed=7, name="x") / 0.25
    got = run(LINEAR, [a], base, each[:1], seed=7, name="x")
    assert np.allclose(got, seeded, rtol=0, atol=2e-6)


def test_l1_rule_restores_the_norm_of_each_task_vector() -> None:
    n = 4000
    a = normal(n)
    got = run(LINEAR, [a], np.zeros(n, np.float32), [{"weight": 1, "density": 0.3}], merge={"rescale_by": "l1"})
    mask = kept(n, 0.3, 0)
    ratio = np.abs(a.astype(np.float64)).sum() / np.abs(a * mask).astype(np.float64).sum()
    assert np.allclose(got, a * mask * ratio, rtol=1e-6)
    assert np.isclose(np.abs(got).sum(), np.abs(a).sum(), rtol=1e-5)


def test_expected_value_is_the_task_vector() -> None:
    n, draws, p = 64, 600, 0.3
    a = normal(n)
    each = [{"weight": 1, "density": p}]
    zero = np.zeros(n, np.float32)
    mean = np.mean([run(LINEAR, [a], zero, each, seed=s) for s in range(draws)], axis=0)
    error = np.abs(a) * np.sqrt((1 - p) / p / draws)
    assert np.all(np.abs(mean - a) <= 5 * error + 1e-6)


def test_share_kept() -> None:
    n = 200_000
    got = run(LINEAR, [np.ones(n, np.float32)], np.zeros(n, np.float32), [{"weight": 1, "density": 0.37}])
    share = np.count_nonzero(got) / n
    assert abs(share - 0.37) <= 5 * np.sqrt(0.37 * 0.63 / n)
    assert np.allclose(got[got != 0], 1 / 0.37, rtol=2e-5)


def test_two_models_have_independent_masks() -> None:
    n = 100_000
    ones, zero = np.ones(n, np.float32), np.zeros(n, np.float32)
    merge = {"rescale": False}
    got = run(LINEAR, [ones, ones], zero, [{"weight": 1, "density": 0.5}, {"weight": 2, "density": 0.5}], merge=merge)
    shares = [np.mean(got == v) for v in (0, 1, 2, 3)]
    assert np.allclose(shares, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / n))


def test_ties_against_float64() -> None:
    n = 3000
    base, xs = np.zeros(n, np.float32), [normal(n, i) for i in range(3)]
    weights, densities = np.array([1.0, 0.5, 0.25]), [0.5, 0.75, 0.25]
    each = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    sparse = np.stack([x * kept(n, d, i) / d for i, (x, d) in enumerate(zip(xs, densities, strict=True))]).astype(
        np.float64
    )
    v = weights[:, None] * sparse
    agree = np.sign(v) == np.where(v.sum(0) >= 0, 1, -1)
    assert np.allclose(run(TIES, xs, base, each), (v * agree).sum(0), rtol=1e-6, atol=1e-6)
    divisor = (weights[:, None] * agree).sum(0)
    want = (v * agree).sum(0) / np.where(divisor == 0, 1, divisor)
    assert np.allclose(run(TIES, xs, base, each, merge={"normalize": True}), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [LINEAR, TIES], ids=["linear", "ties"])
@pytest.mark.parametrize("rule", ["density", "l1"])
def test_densities_at_the_ends(method: Any, rule: str) -> None:
    base, a = normal(50, 1), normal(50, 2)
    merge = {"rescale_by": rule}
    assert np.array_equal(run(method, [a], base, [{"weight": 1, "density": 0}], merge=merge), base)
    full = run(method, [a], base, [{"weight": 1, "density": 1}], merge=merge)
    assert np.allclose(full, a, rtol=0, atol=3e-7)
