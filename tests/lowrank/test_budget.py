from __future__ import annotations

from itertools import product

import pytest

from mergekit_lr.errors import UsageError
from mergekit_lr.lowrank.budget import Spectrum, by_bytes, by_error, needed

SPECTRA = {
    "a": Spectrum((8.0, 3.0, 1.0), 40.0, 10),
    "b": Spectrum((9.0, 0.5), 20.0, 30),
    "c": Spectrum((), 5.0, 7),
}


def every_choice():
    names = list(SPECTRA)
    for ps in product(*(range(len(SPECTRA[n].tail) + 1) for n in names)):
        chosen = dict(zip(names, ps, strict=True))
        cost = sum(SPECTRA[n].step * p for n, p in chosen.items())
        yield chosen, cost, sum(sum(SPECTRA[n].tail[p:]) for n, p in chosen.items())


@pytest.mark.parametrize("budget", [0, 9, 10, 25, 30, 40, 59, 60, 1000])
def test_bytes_are_kept_to_and_well_spent(budget: int) -> None:
    chosen = by_bytes(SPECTRA, budget)
    cost = sum(SPECTRA[n].step * p for n, p in chosen.items())
    assert cost <= budget
    left = sum(sum(SPECTRA[n].tail[p:]) for n, p in chosen.items())
    best = min(e for _, c, e in every_choice() if c <= budget)
    assert left - best <= 9.0  # greedy: at most the one direction that did not fit
    if budget in (0, 10, 60, 1000):
        assert left == best


def test_a_budget_below_what_is_always_stored_says_by_how_much() -> None:
    with pytest.raises(UsageError, match="12 bytes more"):
        by_bytes(SPECTRA, -12)


@pytest.mark.parametrize("error", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_an_error_target_is_met(error: float) -> None:
    chosen = by_error(SPECTRA, error)
    left = sum(sum(SPECTRA[n].tail[p:]) for n, p in chosen.items())
    assert left <= error**2 * 65 + 1e-12
    assert (left == 0) == (error < 0.08)


def test_what_ninety_nine_per_cent_takes() -> None:
    assert needed([Spectrum((50.0, 0.9, 0.05), 100.0, 1)]) == 1
    assert needed([Spectrum((50.0, 1.1, 0.05), 100.0, 1)]) == 2
    assert needed([Spectrum((0.5,), 100.0, 1)]) == 0
    assert needed([Spectrum((50.0, 1.1), 100.0, 1), Spectrum((0.0, 0.0), 900.0, 1)]) == 1
    assert needed([]) == 0
