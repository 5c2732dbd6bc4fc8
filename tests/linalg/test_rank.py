"""Rank policies against hand-computed values and published constants."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg import RankPolicy, energy, fixed, gavish_donoho, participation, ratio
from mergekit_lr.linalg.rank import marchenko_pastur_median, threshold_coefficient

SIGMA = np.array([4.0, 2.0, 2.0, 1.0, 0.0])  # squares 16, 4, 4, 1: 25


@pytest.mark.parametrize(
    ("policy", "want"),
    [
        (fixed(3), 3),
        (ratio(0.5), 2),
        (ratio(0.01), 1),
        (ratio(1.0), 5),
        (energy(0.64), 1),
        (energy(0.65), 2),
        (energy(0.96), 3),
        (energy(0.97), 4),
        (energy(1.0), 4),
        (participation(), math.ceil(625 / (256 + 16 + 16 + 1))),
    ],
)
def test_by_hand(policy: RankPolicy, want: int) -> None:
    assert policy(SIGMA, 5, 8) == want


def test_participation_counts_equal_values() -> None:
    assert participation()(np.full(6, 3.0), 6, 9) == 6
    assert participation()(np.zeros(4), 4, 9) == 1


def test_published_constants_of_gavish_and_donoho() -> None:
    """Table of omega(beta) and lambda*(1) = 4 / sqrt 3 (arXiv 1305.5870)."""
    assert threshold_coefficient(1.0) == pytest.approx(4 / math.sqrt(3))
    for beta, omega in ((0.05, 1.5194), (0.1, 1.6089), (0.5, 2.1711), (1.0, 2.8582)):
        assert threshold_coefficient(beta) / math.sqrt(marchenko_pastur_median(beta)) == pytest.approx(omega, abs=2e-4)


def test_gavish_donoho_finds_the_planted_rank() -> None:
    rng = np.random.default_rng(0)
    m, n, noise = 120, 200, 0.01
    u, v = np.linalg.qr(rng.standard_normal((m, 7)))[0], np.linalg.qr(rng.standard_normal((n, 7)))[0]
    sigma = np.linalg.svd((u * np.arange(8, 1, -1)) @ v.T + noise * rng.standard_normal((m, n)), compute_uv=False)
    assert gavish_donoho()(sigma, m, n) == 7
    assert gavish_donoho(noise)(sigma, m, n) == 7


def test_marchenko_pastur_median_against_a_sample() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 1200))
    assert np.median(np.linalg.eigvalsh(x @ x.T / 1200)) == pytest.approx(marchenko_pastur_median(0.5), rel=5e-3)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_bad_shares(share: float) -> None:
    for make in (ratio, energy):
        with pytest.raises(LinalgError):
            make(share)


def test_a_spectral_rule_needs_a_spectrum() -> None:
    with pytest.raises(LinalgError, match="singular values"):
        energy(0.9)(None, 4, 4)
    with pytest.raises(LinalgError, match="rank 6"):
        fixed(6)(None, 5, 9)
