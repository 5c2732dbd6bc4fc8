"""DELLA: probabilities by rank by hand, their frequencies, unbiasedness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method
from mergekit_lr.sparsify import keep_levels, magnitude_order

LINEAR, DELLA = get_method("della_linear"), get_method("della")


def run(method: Any, tensor: Any, each: dict[str, float], **merge: Any) -> Any:
    x = torch.as_tensor(tensor)
    return apply(method, [x], torch.zeros_like(x), merge=merge, models=[{"weight": 1, **each}]).numpy()


def test_probabilities_by_hand() -> None:
    half = keep_levels(0.5, 0.25, 5, "half") / 65536
    assert np.allclose(half, [0.25, 0.375, 0.5, 0.625, 0.75])
    # The paper: p_min = p - epsilon / 2, then epsilon / n more drop for each rank below the largest.
    full = keep_levels(0.5, 0.2, 5, "full") / 65536
    assert np.allclose(1 - full, [0.4 + 0.04 * r for r in (4, 3, 2, 1, 0)], atol=1e-5)
    assert keep_levels(0.3, 0.2, 1, "half").tolist() == keep_levels(0.3, 0.2, 1, "full").tolist()
    assert keep_levels(0.3, 0.2, 1, "half")[0] == round(0.3 * 65536)


def test_order_against_sorting() -> None:
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    want = np.argsort(np.abs(x.numpy()), axis=-1, kind="stable")
    assert np.array_equal(magnitude_order(x).numpy(), want)


@pytest.mark.parametrize("rule", ["half", "full"])
def test_entries_are_kept_as_often_as_their_rank_says(rule: str) -> None:
    rows, magnitudes = 40_000, np.array([0.5, 4.0, 1.0, 3.0, 2.0], np.float32)
    signs = np.random.default_rng(0).choice([-1, 1], (rows, 5)).astype(np.float32)
    each = {"density": 0.5, "epsilon": 0.2}
    got = run(LINEAR, signs * magnitudes, each, rescale=False, epsilon_rule=rule)
    p = {"half": [0.3, 0.7, 0.4, 0.6, 0.5], "full": [0.44, 0.6, 0.48, 0.56, 0.52]}[rule]
    share = np.count_nonzero(got, axis=0) / rows
    assert np.all(np.abs(share - p) <= 5 * np.sqrt(0.25 / rows))
    assert np.array_equal(got[got != 0], (signs * magnitudes)[got != 0])


def test_expected_value_is_the_task_vector() -> None:
    row = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    x = np.tile(row, (20_000, 1))
    got = run(LINEAR, x, {"density": 0.4, "epsilon": 0.1})
    p = keep_levels(0.4, 0.1, 16, "half")[np.argsort(np.argsort(np.abs(row)))] / 65536
    error = np.abs(row) * np.sqrt((1 - p) / p / len(x))
    assert np.all(np.abs(got.mean(0, dtype=np.float64) - row) <= 5 * error + 1e-6)
    values = got[:, 3][got[:, 3] != 0]
    assert np.allclose(values, row[3] / p[3], rtol=1e-6)


def test_l1_rule_restores_the_norm() -> None:
    x = np.random.default_rng(2).standard_normal((50, 70)).astype(np.float32)
    got = run(LINEAR, x, {"density": 0.5}, rescale_by="l1")
    assert np.isclose(np.abs(got).sum(), np.abs(x).sum(), rtol=1e-5)
    plain = run(LINEAR, x, {"density": 0.5}, rescale=False)
    ratio = got[plain != 0] / plain[plain != 0]
    assert np.allclose(ratio, ratio[0], rtol=1e-6)


def test_della_elects_and_averages() -> None:
    rng = np.random.default_rng(3)
    xs = [torch.from_numpy(rng.standard_normal((40, 30)).astype(np.float32)) for _ in range(3)]
    base = torch.zeros(40, 30)
    each = [{"weight": w, "density": 0.6, "epsilon": 0.2} for w in (1.0, 0.5, 0.25)]
    # What each model leaves alone, by the linear method with that model only and its own mask.
    left = []
    for i, (x, own) in enumerate(zip(xs, each, strict=True)):
        alone = {**own, "weight": 1.0}
        left.append(apply(LINEAR, [x], base, models=[alone], keys=[f"model {i}"]).double().numpy())
    w = np.array([1.0, 0.5, 0.25])[:, None, None]
    v = w * np.stack(left)
    agree = np.sign(v) == np.where(v.sum(0) >= 0, 1, -1)
    divisor = (w * agree).sum(0)
    want = (v * agree).sum(0) / np.where(divisor == 0, 1, divisor)
    assert np.allclose(apply(DELLA, xs, base, models=each).numpy(), want, rtol=1e-6, atol=1e-6)


def test_ends_and_short_rows() -> None:
    x = np.random.default_rng(4).standard_normal((300, 1)).astype(np.float32)
    assert np.array_equal(run(DELLA, x, {"density": 1.0}), x)
    assert not run(DELLA, x, {"density": 0.0}).any()
    share = np.count_nonzero(run(LINEAR, x, {"density": 0.5}, rescale=False)) / 300
    assert 0.35 < share < 0.65
    assert run(LINEAR, np.float32(2.0), {"density": 0.5}).shape == ()


def test_a_spread_beyond_zero_and_one_is_refused_in_words() -> None:
    def problems(density: float, epsilon: float, **merge: Any) -> list[str]:
        own = DELLA.PerModel.model_validate({"weight": 1, "density": density, "epsilon": epsilon})
        return DELLA.problems(DELLA.Merge.model_validate(merge), (own,))

    assert "epsilon" in problems(0.1, 0.15)[0]
    assert "epsilon" in problems(0.9, 0.15)[0]
    assert problems(0.5, 0.15) == problems(1.0, 0.15) == problems(0.0, 0.15) == []
    assert problems(0.9, 0.15, epsilon_rule="full") == []
