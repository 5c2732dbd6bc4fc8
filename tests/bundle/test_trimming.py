"""TALL masks on a TIES vector that is trimmed over whole task vectors, against numpy on concatenated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lr import merge, open_bundle, plan
from mergekit_lr.errors import RecipeError

SHAPES = {"a.weight": (150, 500), "b.weight": (40, 5), "norm.weight": (70,)}


def draw(count: int) -> list[dict[str, Tensor]]:
    """A base and models around it: multiples of 1/256, so that many magnitudes are equal and sums are exact."""
    g = torch.Generator().manual_seed(7)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    spread = {"a.weight": 0.05, "b.weight": 0.4, "norm.weight": 0.01}  # so that tensors keep different shares
    models = [{n: w + spread[n] * torch.randn(w.shape, generator=g) for n, w in base.items()} for _ in range(count)]
    return [{n: w.mul(256).round() / 256 for n, w in m.items()} for m in (base, *models)]


def recipe(folder: Path, models: list[dict[str, Tensor]], **parameters: Any) -> dict[str, Any]:
    paths = [folder / f"m{i}.safetensors" for i in range(len(models))]
    for path, tensors in zip(paths, models, strict=True):
        save_file(tensors, path)
    entries = [{"model": str(p), "name": f"t{i}"} for i, p in enumerate(paths[1:])]
    wide = {"multi_task": "ties", "threshold_scope": "model", "lambda": 0.5, **parameters}
    return {"merge_method": "tall_masks", "base_model": str(paths[0]), "models": entries, "parameters": wide}


def trimmed(x: npt.NDArray[np.float64], density: float) -> npt.NDArray[np.float64]:
    """The largest ``max(1, int(density N))``, of equal ones the first."""
    kept = np.zeros_like(x)
    order = np.argsort(-np.abs(x), kind="stable")[: max(1, int(density * x.size))]
    kept[order] = x[order]
    return kept


def by_hand(models: list[dict[str, Tensor]], density: float, lam: float) -> list[dict[str, npt.NDArray[np.float64]]]:
    """Every task's recovered weights. A task may lack tensors; what it has is concatenated in the base's order."""
    base = {n: w.double().numpy().ravel() for n, w in models[0].items()}
    deltas = [{n: m[n].double().numpy().ravel() - w for n, w in base.items() if n in m} for m in models[1:]]
    kept = []
    for d in deltas:
        whole = trimmed(np.concatenate(list(d.values())), density)
        cuts = np.cumsum([x.size for x in d.values()])[:-1]
        kept.append(dict(zip(d, np.split(whole, cuts), strict=True)))
    out: list[dict[str, npt.NDArray[np.float64]]] = [{} for _ in deltas]
    for n, w in base.items():
        parts = np.array([k[n] for k in kept if n in k])
        sign = np.where(parts.sum(axis=0) >= 0, 1, -1)
        tau = np.where(np.sign(parts) == sign, parts, 0).sum(axis=0)
        for mine, d in zip(out, deltas, strict=True):
            if n in d:
                mine[n] = w + (np.abs(d[n]) > lam * np.abs(tau - d[n])) * tau
    return out


@pytest.mark.parametrize("density", [0.3, 0.001, 0.0, 1.0])
def test_trimming_is_that_of_concatenated_task_vectors(tmp_path: Path, density: float) -> None:
    models = draw(3)
    merge(recipe(tmp_path, models, density=density), tmp_path / "bundle", device="cpu", threads=2)
    merge(recipe(tmp_path, models, density=density), tmp_path / "one", device="cpu", threads=1, max_memory="12MiB")
    want = by_hand(models, density, 0.5) if density else [{n: w.numpy() for n, w in models[0].items()}] * 3
    with open_bundle(tmp_path / "bundle") as bundle, open_bundle(tmp_path / "one") as one:
        assert bundle.manifest.digests == one.manifest.digests
        for task, expected in zip(bundle.tasks, want, strict=True):
            for n, w in bundle.state_dict(task).items():
                assert (w.double().numpy().ravel() == expected[n].ravel()).all(), n
    if density == 0.3:
        merge(recipe(tmp_path, models, threshold_scope="tensor", density=density), tmp_path / "tensor", device="cpu")
        with open_bundle(tmp_path / "tensor") as bundle:
            assert not np.array_equal(bundle.state_dict("t0")["b.weight"].numpy().ravel(), want[0]["b.weight"])


def test_a_task_without_a_tensor_and_a_tensor_that_is_not_trimmed(tmp_path: Path) -> None:
    models = draw(3)
    del models[2]["b.weight"]
    models[3]["norm.weight"] = torch.ones(3)  # another shape: its own
    merge(recipe(tmp_path, models, density=0.25), tmp_path / "bundle", device="cpu")
    same = [*models[:3], {n: w for n, w in models[3].items() if n != "norm.weight"}]
    want = by_hand(same, 0.25, 0.5)
    with open_bundle(tmp_path / "bundle") as bundle:
        for task, expected in zip(bundle.tasks, want, strict=True):
            for n, w in bundle.state_dict(task).items():
                if n in expected:
                    assert (w.double().numpy().ravel() == expected[n]).all(), n
        assert torch.equal(bundle.state_dict("t2")["norm.weight"], torch.ones(3))
    # a tensor of density 1 keeps all and takes no part in the others' budget
    by_name = [{"filter": "norm", "value": 1.0}, {"value": 0.25}]
    merge(recipe(tmp_path, draw(2), density=by_name), tmp_path / "named", device="cpu")
    rest = [{n: w for n, w in m.items() if n != "norm.weight"} for m in draw(2)]
    with open_bundle(tmp_path / "named") as bundle:
        state = bundle.state_dict("t1")
        assert all((state[n].double().numpy().ravel() == w).all() for n, w in by_hand(rest, 0.25, 0.5)[1].items())
        norm = by_hand([{"norm.weight": m["norm.weight"]} for m in draw(2)], 1.0, 0.5)[1]["norm.weight"]
        assert (state["norm.weight"].double().numpy() == norm).all()


def test_planning_says_what_is_not_known_yet(tmp_path: Path) -> None:
    models = draw(2)
    found = plan(recipe(tmp_path, models), device="cpu")
    assert any("thresholds are found" in w for w in found.warnings)
    with pytest.raises(RecipeError, match=r"threshold_scope.*multi_task: ties"):
        plan(recipe(tmp_path, models, multi_task="task_arithmetic"), device="cpu")
