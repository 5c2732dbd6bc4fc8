"""PLeaS through the engine: planted copies, the mean of two networks, and a least-squares problem solved by numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lr import evaluate, merge, plan
from mergekit_lr.arch.spec import spec_for
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.matching.member import apply_all, random_member

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = {"0.weight": (7, 5), "0.bias": (7,), "2.weight": (6, 7), "2.bias": (6,), "4.weight": (3, 6), "4.bias": (3,)}
SPEC = spec_for("auto", SHAPES, None, "net")
X = torch.randn(300, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
Tensors = dict[str, torch.Tensor]


def weights(seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}


def write(path: Path, tensors: Tensors) -> str:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
    return str(path)


def outputs(tensors: Tensors, hidden: bool = False) -> torch.Tensor:
    t = {n: x.double() for n, x in tensors.items()}
    h = (X @ t["0.weight"].T + t["0.bias"]).relu()
    h = (h @ t["2.weight"].T + t["2.bias"]).relu()
    return h if hidden else h @ t["4.weight"].T + t["4.bias"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "data.safetensors", {"inputs": X.float()})


def recipe(a: str, b: str, **parameters: Any) -> dict[str, Any]:
    return {"merge_method": "pleas", "models": [{"model": a}, {"model": b}], "parameters": parameters}


def run(out: Path, a: str, b: str, threads: int = 1, **parameters: Any) -> tuple[Tensors, dict[str, Any]]:
    report = merge(recipe(a, b, **parameters), out, device="cpu", threads=threads).report
    return load_file(out / "model.safetensors"), report


def test_a_permuted_copy_gives_the_first_model_back(tmp_path, data) -> None:
    first = weights(0)
    a = write(tmp_path / "a.safetensors", first)
    b = write(tmp_path / "b.safetensors", apply_all(SPEC, random_member(SPEC, 1), first))
    found, report = run(tmp_path / "out", a, b, data=data)
    assert all(torch.allclose(found[n], t, atol=1e-4) for n, t in first.items())
    assert report["rules"] == {"refitted": 6}
    assert report["details"]["models"][0]["agreement_after"] == pytest.approx(1.0)
    wide, _ = run(tmp_path / "wide", a, b, data=data, budget=1.5, ridge=1e-9)
    assert wide["2.weight"].shape == (9, 10)
    assert torch.allclose(outputs(wide), outputs(first), atol=1e-2)


def test_twice_the_width_is_the_mean_of_both(tmp_path, data) -> None:
    first, second = weights(0), weights(1)
    a, b = write(tmp_path / "a.safetensors", first), write(tmp_path / "b.safetensors", second)
    found, _ = run(tmp_path / "out", a, b, data=data, budget=2, ridge=1e-12)
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        "0.weight": (14, 5), "0.bias": (14,), "2.weight": (12, 14), "2.bias": (12,), "4.weight": (3, 12),
        "4.bias": (3,),
    }  # fmt: skip
    want = (outputs(first) + outputs(second)) / 2
    assert (outputs(found) - want).abs().max() < 1e-3 * want.abs().max()
    planned = plan(recipe(a, b, data=data, budget=2))
    assert any("not known before the merge" in w for w in planned.to_dict()["warnings"])


def test_the_last_layer_is_the_least_squares_of_numpy(tmp_path, data) -> None:
    """B's hidden layers are A's, so nothing moves there; heads differ, and the targets of the head are their mean."""
    first = weights(0)
    second = {**first, "4.weight": weights(1)["4.weight"], "4.bias": weights(1)["4.bias"]}
    a, b = write(tmp_path / "a.safetensors", first), write(tmp_path / "b.safetensors", second)
    ridge = 0.5
    found, _ = run(tmp_path / "out", a, b, data=data, ridge=ridge)
    h = np.concatenate([outputs(first, hidden=True).numpy(), np.ones((300, 1))], 1)
    y = ((outputs(first) + outputs(second)) / 2).numpy()
    halves = [(first[n] + second[n]).double().reshape(3, -1).numpy() / 2 for n in ("4.weight", "4.bias")]
    start = np.concatenate(halves, 1)
    pull = ridge * np.diag(h.T @ h).mean()
    want = np.linalg.solve(h.T @ h + pull * np.eye(7), h.T @ y + pull * start.T).T
    assert np.allclose(found["4.weight"].numpy(), want[:, :6], atol=1e-4)
    assert np.allclose(found["4.bias"].numpy(), want[:, 6], atol=1e-4)


def test_threads_do_not_change_a_bit(tmp_path, data) -> None:
    a, b = write(tmp_path / "a.safetensors", weights(0)), write(tmp_path / "b.safetensors", weights(1))
    for threads in (1, 2):
        run(tmp_path / f"o{threads}", a, b, threads=threads, data=data, budget=1.3)
    files = [(tmp_path / f"o{t}" / "model.safetensors").read_bytes() for t in (1, 2)]
    assert files[0] == files[1]


def test_language_models_grow_as_their_config_says(tmp_path) -> None:
    text = EXAMPLES / "text" / "heldout" / "python.txt"
    models = [str(EXAMPLES / "models" / n) for n in ("python", "c")]
    said = recipe(*models, budget=1.25) | {
        "calibration": {"text": [str(text)], "samples": 8, "sequence_length": 64}, "permutations": "auto",
    }  # fmt: skip
    merge(said, tmp_path / "out", device="cpu")
    before, after = (json.loads((Path(p) / "config.json").read_text()) for p in (models[0], tmp_path / "out"))
    width = before["intermediate_size"]
    assert after == {**before, "intermediate_size": round(1.25 * width)}
    losses = [evaluate(m, [text], max_tokens=600)["mean"] for m in (*models, tmp_path / "out")]
    assert losses[2] < max(losses[:2])


def test_what_cannot_be_refitted_is_an_error(tmp_path, data) -> None:
    a, b = write(tmp_path / "a.safetensors", weights(0)), write(tmp_path / "b.safetensors", weights(1))
    with pytest.raises(RecipeError, match="nothing to run the models on"):
        run(tmp_path / "o1", a, b)
    with pytest.raises(RecipeError, match="cannot differ between tensors"):
        run(tmp_path / "o2", a, b, data=data, budget=[1.0, 1.5])
    with pytest.raises(RecipeError, match="budget"):
        run(tmp_path / "o3", a, b, data=data, budget=2.5)
    narrow = write(tmp_path / "n.safetensors", {"0.weight": torch.ones(7, 4), **{n: t for n, t in weights(0).items() if n != "0.weight"}})  # noqa: E501 # fmt: skip
    with pytest.raises(CheckpointError, match="has shape"):
        run(tmp_path / "o4", a, narrow, data=data)
    other = write(tmp_path / "other.safetensors", {"inputs": torch.randn(9, 4)})
    with pytest.raises(CheckpointError, match=r"cannot be run on \{'inputs': \[9, 4\]\}"):
        run(tmp_path / "o5", a, b, data=other)
    normed = {"0.weight": torch.ones(7, 5), "1.weight": torch.ones(7), "1.bias": torch.ones(7),
              "1.running_mean": torch.ones(7), "1.running_var": torch.ones(7), "2.weight": torch.ones(3, 7),
              }  # fmt: skip
    pair = [write(tmp_path / f"m{i}.safetensors", normed) for i in (0, 1)]
    with pytest.raises(CheckpointError, match="reset_statistics: true"):
        run(tmp_path / "o6", *pair, data=data)
