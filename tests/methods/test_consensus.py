"""Consensus merging and TALL masks against float64, by brute force, and against what the authors' code gets wrong."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.localize import agreement, elected, summed, wanted
from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

METHOD = get_method("consensus")


def run(deltas: Any, **merge: Any) -> np.ndarray[Any, Any]:
    """Merged task vector of ``deltas`` [models, entries] on a base of zero."""
    models = [torch.tensor(d, dtype=torch.float32) for d in deltas]
    each = [{"lambda": merge.pop("lam", 0.4)}] * len(models)
    return apply(METHOD, models, torch.zeros_like(models[0]), merge=merge, models=each).numpy()


def test_four_entries_by_hand() -> None:
    # tau = (4, 2, -1, 0). |D_a| > .5 |tau - D_a|: 3 > .5, 0 > 1, 2 > 1.5, 1 > .5; |D_b|: 1 > 1.5, 2 > 0, 3 > 1, 1 > .5.
    deltas = np.array([[3.0, 0.0, 2.0, 1.0], [1.0, 2.0, -3.0, -1.0]])
    assert run(deltas, lam=0.5, k=2, scale=1.0).tolist() == [0, 0, -1, 0]
    assert run(deltas, lam=0.5, k=1, scale=1.0).tolist() == [4, 2, -1, 0]
    assert run(deltas, lam=0.5, k=0, scale=0.5).tolist() == [2, 1, -0.5, 0]


@given(st.lists(st.lists(st.integers(-64, 64), min_size=6, max_size=6), min_size=2, max_size=5), st.integers(0, 2))
@settings(deadline=None)
def test_against_float64(rows: list[list[int]], k: int) -> None:
    d = np.array(rows, dtype=np.float64) / 64
    tau = d.sum(0)
    votes = (np.abs(d) > 0.25 * np.abs(tau - d)).sum(0)
    found = run(d, lam=0.25, k=k, scale=0.5)
    assert found.tolist() == (0.5 * tau * (votes >= k)).tolist()


def test_lambda_one_is_the_best_of_all_masks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        deltas = rng.standard_normal((3, 5))
        tau = deltas.sum(0)
        for d in deltas:
            mask = wanted(torch.tensor(d), torch.tensor(tau), 1.0).numpy()
            errors = {m: np.abs(np.array(m) * tau - d).sum() for m in product((0, 1), repeat=5)}
            assert np.abs(mask * tau - d).sum() == pytest.approx(min(errors.values()))


def test_masks_are_nested_in_lambda() -> None:
    d, tau = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    masks = [wanted(d, tau, lam) for lam in (0.2, 0.3, 0.4, 0.5, 0.6, 1.0)]
    for wide, narrow in pairwise(masks):
        assert bool((wide | ~narrow).all())
        assert int(wide.sum()) > int(narrow.sum())


@pytest.mark.parametrize(("tasks", "lam", "density"), [(8, 0.4, 0.482), (20, 0.6, 0.232)])
def test_density_of_independent_gaussian_tasks(tasks: int, lam: float, density: float) -> None:
    """(2 / pi) atan(1 / (lambda sqrt(T - 1)))."""
    law = 2 / math.pi * math.atan(1 / (lam * math.sqrt(tasks - 1)))
    assert law == pytest.approx(density, abs=5e-4)
    deltas = torch.randn(tasks, 200_000, generator=torch.Generator().manual_seed(1))
    found = float(wanted(deltas[0], summed(list(deltas)), lam).float().mean())
    assert found == pytest.approx(law, abs=5 * math.sqrt(0.25 / 200_000))


def test_a_shift_of_base_and_experts_changes_no_mask() -> None:
    """Known defect of a third-party implementation: it mixes task vectors with absolute weights."""
    g = torch.Generator().manual_seed(2)
    base = torch.randint(-64, 64, (1000,), generator=g) / 64
    models = [base + torch.randint(-64, 64, (1000,), generator=g) / 1024 for _ in range(3)]
    one = apply(METHOD, models, base, merge={"k": 1, "scale": 0.5}, models=[{}] * 3)
    other = apply(METHOD, [m + 2.0 for m in models], base + 2.0, merge={"k": 1, "scale": 0.5}, models=[{}] * 3)
    assert torch.equal(one - base, other - base - 2.0)
    assert 0 < int(torch.count_nonzero(one - base)) < 1000


def test_untouched_entries_are_catastrophic_and_the_strict_sign_changes_no_value() -> None:
    deltas = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 2.0])]
    assert agreement(deltas, summed(deltas), [0.4, 0.4]).tolist() == [0, 1, 2]


def test_ties_is_the_disjoint_sum_of_exactly_the_largest() -> None:
    """Known defect of the authors' code: its top-k of 20 % of ten entries keeps three."""
    a = np.array([5.0, -4.0, 3.0, 1, 1, 1, 1, 1, 1, 1])
    b = np.array([-2.0, -3.0, 9.0, 1, 1, 1, 1, 1, 1, 1])
    found = run([a, b], multi_task="ties", k=0, scale=1.0)
    # a keeps 5, -4; b keeps -3, 9: the signs of the sums are +, -, +
    assert found.tolist() == [5, -7, 9, 0, 0, 0, 0, 0, 0, 0]
    assert elected([torch.tensor([1.0, -1.0, 2.0]), torch.tensor([-1.0, -1.0, 1.0])]).tolist() == [1.0, -2.0, 3.0]


def test_counts_are_in_the_report(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    from mergekit_lr import merge

    deltas = [torch.tensor([[0.0, 1.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0, 4.0]])]
    names = []
    for i, d in enumerate([torch.zeros(1, 4), *deltas]):
        save_file({"w": d, "v": d * 0}, tmp_path / f"{i}.safetensors")
        names.append(str(tmp_path / f"{i}.safetensors"))
    recipe = {"merge_method": "consensus", "base_model": names[0], "models": [{"model": n} for n in names[1:]]}
    report = merge(recipe, tmp_path / "out", device="cpu").report
    assert report["counts"] == {"catastrophic": 5, "selfish": 2, "shared": 1}
    assert {t["name"]: t["counts"]["shared"] for t in report["tensors"]} == {"v": 0, "w": 1}


def test_more_votes_than_models_is_refused() -> None:
    from mergekit_lr.errors import RecipeError
    from mergekit_lr.recipe import load_recipe

    recipe = {"merge_method": "consensus", "base_model": "b", "models": [{"model": "x"}, {"model": "y"}]}
    with pytest.raises(RecipeError, match="k is 3, but there are 2 models"):
        load_recipe({**recipe, "parameters": {"k": 3}})
