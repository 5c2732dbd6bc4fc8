"""Files read beside the models: found, checked, counted as inputs, cut as the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mergekit_lr
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

from .conftest import SHAPES, draw, read_all


def moments(seed: int, scale: float = 1e-9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=generator) ** 4 * scale for n, s in SHAPES.items()}


@pytest.fixture
def world(tmp_path: Path, make: Any) -> dict[str, Any]:
    """A base, two models and their moments, and a recipe over them."""
    found: dict[str, Any] = {"base": draw(0), "a": draw(1), "b": draw(2), "va": moments(3), "vb": moments(4)}
    for name in ("base", "a", "b"):
        make(name, found[name])
    for name in ("va", "vb"):
        save_file(found[name], tmp_path / f"{name}.safetensors", {"step": "100", "beta2": "0.99"})
    found["recipe"] = {
        "merge_method": "ota",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / m), "parameters": {"curvature": str(tmp_path / f"v{m}.safetensors")}}
            for m in ("a", "b")
        ],
        "parameters": {"density": 0.4, "density_scope": "tensor"},
        "out_dtype": "float32",
    }
    return found


def expected(world: dict[str, Any], name: str, **more: Any) -> Tensor:
    each = [{"curvature": "x", "density": 0.4, **more}] * 2
    extra = [world["va"][name].float(), world["vb"][name].float()]
    tensors = [world["a"][name], world["b"][name]]
    shared = {"density_scope": "tensor"}
    return apply(get_method("ota"), tensors, world["base"][name], merge=shared, models=each, extra=extra, name=name)


def test_a_merge_reads_them_beside_the_weights(world: dict[str, Any], tmp_path: Path) -> None:
    result = mergekit_lr.merge(world["recipe"], tmp_path / "out", threads=1)
    merged = read_all(result.out)
    for name in SHAPES:
        assert torch.equal(merged[name], expected(world, name))
    assert [i["model"] for i in result.report["inputs"]][3:] == [
        f"curvature: {tmp_path}/v{m}.safetensors" for m in ("a", "b")
    ]
    assert mergekit_lr.plan(world["recipe"]).bytes_in > 2 * sum(v.numel() * 4 for v in world["va"].values())


def test_row_and_column_sums_are_the_matrix_they_stand_for(world: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = {}, {}
    for name, v in world["va"].items():
        if v.ndim == 2:
            parts[f"{name}.exp_avg_sq.row"], parts[f"{name}.exp_avg_sq.col"] = v.sum(1), v.sum(0)
            whole[name] = torch.outer(v.double().sum(1), v.double().sum(0)).div(v.double().sum()).float()
        else:
            parts[f"{name}.exp_avg_sq"] = whole[name] = v
    save_file(parts, tmp_path / "va.safetensors", {"step": "100", "beta2": "0.99"})
    world["va"] = whole
    merged = read_all(mergekit_lr.merge(world["recipe"], tmp_path / "out", threads=1).out)
    for name in SHAPES:
        same = torch.isclose(merged[name], expected(world, name), rtol=1e-4, atol=1e-7)
        assert float(same.float().mean()) > 0.999  # an entry at the threshold may fall either way


@pytest.mark.parametrize("rule", ["error", "mean", "base"])
def test_missing_entries_follow_the_named_rule(world: dict[str, Any], tmp_path: Path, rule: str) -> None:
    for name in ("va", "vb"):
        save_file({n: v for n, v in world[name].items() if "norm" not in n}, tmp_path / f"{name}.safetensors")
    recipe = world["recipe"] | {"parameters": world["recipe"]["parameters"] | {"missing": rule}}
    if rule == "error":
        with pytest.raises(CheckpointError, match=r"no entry for 3 tensors: .*layernorm.*mergekit-lr curvature"):
            mergekit_lr.plan(recipe)
        return
    result = mergekit_lr.merge(recipe, tmp_path / "out")
    merged = read_all(result.out)["model.norm.weight"].float()
    base, a, b = (world[m]["model.norm.weight"].float() for m in ("base", "a", "b"))
    want = base if rule == "base" else base + ((a - base) + (b - base)) / 2
    assert torch.allclose(merged, want, atol=1e-7)
    assert any(f"missing: {rule}" in r for r in result.report["rules"])


def test_one_model_without_an_entry_that_others_have_is_an_error(world: dict[str, Any], tmp_path: Path) -> None:
    del world["vb"]["model.norm.weight"]
    save_file(world["vb"], tmp_path / "vb.safetensors")
    recipe = world["recipe"] | {"parameters": {"missing": "mean"}}
    with pytest.raises(CheckpointError, match=r"vb\.safetensors: no entry for 1 tensors: model\.norm\.weight"):
        mergekit_lr.plan(recipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-12])
def test_impossible_curvature_is_refused(world: dict[str, Any], tmp_path: Path, value: float) -> None:
    world["vb"]["lm_head.weight"][3, 4] = value
    save_file(world["vb"], tmp_path / "vb.safetensors")
    with pytest.raises(CheckpointError, match=r"curvature .*vb\.safetensors: the entry of 'lm_head\.weight'"):
        mergekit_lr.merge(world["recipe"] | {"nonfinite": "allow"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_shapes_are_explained(world: dict[str, Any], tmp_path: Path) -> None:
    world["vb"]["lm_head.weight"] = torch.ones(90, 64)
    save_file(world["vb"], tmp_path / "vb.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \[90, 64\] where \[96, 64\].*vocabulary"):
        mergekit_lr.plan(world["recipe"])


def test_files_that_are_no_curvature(world: dict[str, Any], tmp_path: Path) -> None:
    def planned(path: str) -> None:
        recipe = world["recipe"] | {"models": [dict(m) for m in world["recipe"]["models"]]}
        recipe["models"][1]["parameters"] = {"curvature": path}
        mergekit_lr.plan(recipe)

    with pytest.raises(CheckpointError, match="no such curvature file"):
        planned(str(tmp_path / "none.safetensors"))
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"never loaded in a merge.*mergekit-lr curvature"):
        planned(str(tmp_path / "optimizer.pt"))
    save_file({"layers.0.q_proj.lora_A.weight": torch.ones(2, 3)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="of a LoRA"):
        planned(str(tmp_path / "lora.safetensors"))
    with pytest.raises(RecipeError, match="curvature"):
        mergekit_lr.plan(world["recipe"] | {"models": [{"model": str(tmp_path / "a")}]})


def test_a_changed_file_is_a_changed_input(world: dict[str, Any], tmp_path: Path) -> None:
    with mergekit_lr.engine.plan.planned(world["recipe"]) as plan:
        before = plan.fingerprint()
        assert [c for c in plan.inputs.values() if c.changed()] == []
        save_file(moments(9), tmp_path / "vb.safetensors")
        assert sum(bool(c.changed()) for c in plan.inputs.values()) == 1
    with mergekit_lr.engine.plan.planned(world["recipe"]) as plan:
        assert plan.fingerprint() != before


def test_unlike_runs_are_remarked_upon(world: dict[str, Any], tmp_path: Path) -> None:
    save_file(world["vb"], tmp_path / "vb.safetensors", {"step": "340", "beta2": "0.99"})
    plan = mergekit_lr.plan(world["recipe"])
    assert any("training steps" in w and "ratio 3.4" in w for w in plan.warnings)


def test_a_mask_without_a_base_is_refused(world: dict[str, Any]) -> None:
    recipe = {k: v for k, v in world["recipe"].items() if k != "base_model"}
    with pytest.raises(CheckpointError, match="density works on task vectors; name a base_model"):
        mergekit_lr.plan(recipe)


def test_a_tied_head_has_its_embeddings_moments(world: dict[str, Any], tmp_path: Path, make: Any) -> None:
    models = []
    for m in ("a", "b"):
        folder = make(f"tied_{m}", world[m], {"model_type": "llama", "tie_word_embeddings": True})
        file = tmp_path / f"tied_v{m}.safetensors"
        save_file({n: v for n, v in world[f"v{m}"].items() if n != "lm_head.weight"}, file)
        models.append({"model": str(folder), "parameters": {"curvature": str(file)}})
    graph = mergekit_lr.plan(world["recipe"] | {"models": models}).graph
    [head] = [line for line in graph.lines() if line.startswith("lm_head")]
    assert "tied_va.safetensors:model.embed_tokens.weight" in head


def test_model_wide_density_and_raw_state_dicts(world: dict[str, Any], tmp_path: Path) -> None:
    """The whole model's threshold is that of one full sort over all entries."""
    for m in ("base", "a", "b"):
        save_file(world[m], tmp_path / f"{m}.safetensors")
    recipe = world["recipe"] | {
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [
            {"model": f"{tmp_path}/{m}.safetensors", "parameters": {"curvature": f"{tmp_path}/v{m}.safetensors"}}
            for m in ("a", "b")
        ],
        "parameters": {"density": 0.25},
    }  # fmt: skip
    merged = read_all(mergekit_lr.merge(recipe, tmp_path / "out", threads=2).out)
    delta = {m: {n: world[m][n].float() - world["base"][n].float() for n in SHAPES} for m in ("a", "b")}
    kept = {}
    for m in ("a", "b"):
        scores = {n: (world[f"v{m}"][n].sqrt() * delta[m][n]).abs() for n in SHAPES}
        everything = torch.cat([scores[n].reshape(-1) for n in SHAPES])
        cut = everything.sort(descending=True).values[int(0.25 * everything.numel()) - 1]
        kept[m] = {n: scores[n] >= cut for n in SHAPES}
    for n in SHAPES:
        p = {m: world[f"v{m}"][n].double().sqrt() * kept[m][n] for m in ("a", "b")}
        top = sum(p[m] * delta[m][n].double() for m in ("a", "b"))
        bottom = sum(p.values())
        want = world["base"][n].double() + torch.where(bottom > 0, top / bottom, 0.0)
        assert torch.allclose(merged[n].double(), want, rtol=1e-5, atol=1e-7)
