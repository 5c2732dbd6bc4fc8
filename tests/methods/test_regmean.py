"""RegMean against least squares on the inputs themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_lr
from mergekit_lr.errors import CheckpointError
from mergekit_lr.pieces import apply
from mergekit_lr.registry import tensor_method

METHOD = tensor_method("regmean")
MODELS = [{"statistics": "x"}] * 2


def drawn(seed: int = 0, tokens: int = 50) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 8, generator=g) for _ in range(2)], [torch.randn(5, 8, generator=g) for _ in range(2)]


@pytest.mark.parametrize("with_base", [False, True])
def test_it_solves_the_regression(with_base: bool) -> None:
    x, w = drawn()
    base = torch.ones(5, 8) if with_base else None
    got = apply(METHOD, w, base, merge={"shrink": 1.0}, models=MODELS, extra=[a.T @ a for a in x])
    inputs = torch.cat(x).double()
    outputs = torch.cat([a.double() @ b.double().T for a, b in zip(x, w, strict=True)])
    want = torch.linalg.lstsq(inputs, outputs).solution.T
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_directions_that_no_input_reaches_keep_the_mean() -> None:
    x, w = drawn()
    for a in x:
        a[:, 5:] = 0
    got = apply(METHOD, w, None, merge={"shrink": 1.0}, models=MODELS, extra=[a.T @ a for a in x])
    assert torch.allclose(got[:, 5:], (w[0] + w[1])[:, 5:] / 2, atol=1e-6)
    inputs = torch.cat(x)[:, :5].double()
    outputs = torch.cat([a.double() @ b.double().T for a, b in zip(x, w, strict=True)])
    assert torch.allclose(got[:, :5].double(), torch.linalg.lstsq(inputs, outputs).solution.T, atol=1e-5)


def test_a_diagonal_is_a_weighted_mean_of_columns() -> None:
    x, w = drawn()
    grams = [a.T @ a for a in x]
    got = apply(METHOD, w, None, merge={"shrink": 0.0}, models=MODELS, extra=grams)
    d = [g.diagonal() for g in grams]
    assert torch.allclose(got, (w[0] * d[0] + w[1] * d[1]) / (d[0] + d[1]), atol=1e-5)
    traced = apply(
        METHOD,
        w,
        None,
        merge={"shrink": 0.0, "normalize_grams": "trace"},
        models=MODELS,
        extra=[grams[0] * 9, grams[1]],
    )
    e = [g.diagonal() / g.trace() for g in grams]
    assert torch.allclose(traced, (w[0] * e[0] + w[1] * e[1]) / (e[0] + e[1]), atol=1e-5)


def test_from_files(tmp_path: Path) -> None:
    """Grams whole beside their matrices, wider than the matrices are; vectors and embeddings by the mean."""
    g = torch.Generator().manual_seed(3)
    shapes = {"embed_tokens.weight": (7, 6), "layers.0.up.weight": (3, 6), "norm.weight": (6,)}
    tensors = [{n: torch.randn(s, generator=g) for n, s in shapes.items()} for _ in range(2)]
    grams = []
    for k in range(2):
        a = torch.randn(20, 6, generator=g)
        grams.append(a.T @ a)
        save_file(tensors[k], tmp_path / f"m{k}.safetensors")
        save_file({"layers.0.up.weight.gram": grams[k]}, tmp_path / f"s{k}.safetensors")
    recipe: dict[str, Any] = {
        "merge_method": "regmean",
        "models": [
            {"model": f"{tmp_path}/m{k}.safetensors", "parameters": {"statistics": f"{tmp_path}/s{k}.safetensors"}}
            for k in range(2)
        ],
    }  # fmt: skip
    merged = load_file(mergekit_lr.merge(recipe, tmp_path / "out").out / "model.safetensors")
    name = "layers.0.up.weight"
    want = apply(METHOD, [t[name] for t in tensors], None, models=MODELS, extra=grams, name=name)
    assert torch.equal(merged[name], want)
    for n in ("embed_tokens.weight", "norm.weight"):
        assert torch.allclose(merged[n], (tensors[0][n] + tensors[1][n]) / 2)
    save_file({"layers.0.up.weight.gram": grams[0][:5, :5].contiguous()}, tmp_path / "s0.safetensors")
    with pytest.raises(CheckpointError, match=r"\[5, 5\] where \[6, 6\]"):
        mergekit_lr.plan(recipe)
    save_file({"layers.0.up.weight.gram": grams[0]}, tmp_path / "s0.safetensors")
    recipe["parameters"] = {"missing": "error"}
    with pytest.raises(CheckpointError, match=r"no entry for 1 tensors: embed_tokens.*mergekit-lr calibrate"):
        mergekit_lr.plan(recipe)
