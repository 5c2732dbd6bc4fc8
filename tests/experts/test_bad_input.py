"""What cannot be reduced, and how it is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lr import plan
from mergekit_lr.errors import CheckpointError, MergekitLrError, RecipeError, ResourceError

from .conftest import EXAMPLES, TEXTS
from .test_outputs import Recipes, run

Mixture = Callable[[str], Path]


def refused(recipe: dict[str, Any], match: str, kind: type[MergekitLrError] = CheckpointError) -> None:
    with pytest.raises(kind, match=match):
        plan(recipe, device="cpu")


def with_model(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {**recipe, "models": [{"model": str(folder)}]}


def test_a_dense_model(recipe_of: Recipes) -> None:
    refused(with_model(recipe_of("mixtral", "reap", 4), EXAMPLES / "models" / "base"), "is a dense model")


@pytest.mark.parametrize("count", [8, 9])
def test_a_count_that_is_not_fewer(recipe_of: Recipes, count: int) -> None:
    refused(recipe_of("mixtral", "reap", count), f"num_experts {count} is not fewer than now .*have 8 experts")


def test_fewer_than_top_k_unless_it_is_said(recipe_of: Recipes, tmp_path: Path) -> None:
    refused(recipe_of("mixtral", "reap", 1), "sends each token to 2.*experts_per_token: 1")
    refused(recipe_of("mixtral", "reap", 2, experts_per_token=3), "3 is more than num_experts 2")
    report = run(recipe_of("mixtral", "reap", 1, experts_per_token=1), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 1
    assert any("num_experts_per_tok is now 1, it was 2" in w for w in report["warnings"])


def test_groups_of_experts_that_cannot_be_filled(recipe_of: Recipes) -> None:
    refused(recipe_of("deepseek_v3", "sub_moe", 7), "7 experts do not fill 2 groups.*num_experts 6 or 8")


def test_no_calibration_and_unknown_values(recipe_of: Recipes) -> None:
    recipe = recipe_of("mixtral", "sub_moe", 4)
    refused({k: v for k, v in recipe.items() if k != "calibration"}, "calibration: is missing", RecipeError)
    refused(recipe_of("mixtral", "sub_moe", 4, rank=0), "rank 0 is neither", RecipeError)
    refused(recipe_of("mixtral", "sub_moe", 4, rank=1.5), "rank 1.5 is neither", RecipeError)
    refused(recipe_of("mixtral", "sub_moe", 4, neighbouring_layers=2), "needs router: tied", RecipeError)
    refused(recipe_of("mixtral", "expert_merge", 4, grouping="none", router="tied"), "tied needs groups", RecipeError)
    refused(recipe_of("mixtral", "expert_merge", 4, grouping="kmeans", guard=True), "guard works with", RecipeError)
    two = {**recipe, "models": [*recipe["models"], {"model": str(EXAMPLES / "models" / "base")}]}
    refused(two, "takes|one model|models", RecipeError)
    varied = {**recipe, "parameters": {"num_experts": [{"filter": "layers.0", "value": 4}, {"value": 5}]}}
    refused(varied, "parameters differ between layers", RecipeError)


def test_a_family_whose_experts_cannot_be_fitted(recipe_of: Recipes) -> None:
    refused(recipe_of("llama4_text", "mergemoe", 4), "Llama-4 the router's gate multiplies an expert's input")
    refused(recipe_of("llama4_text", "sub_moe", 4, rank=4, whiten=True), "fitted or whitened")


def test_too_little_text_says_how_much_is_needed(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of("mixtral", "mergemoe", 4)
    recipe["calibration"] |= {"text": [str(TEXTS[0])], "samples": 3, "sequence_length": 32}
    with pytest.raises(CheckpointError, match=r"96 tokens .*320 in all.*calibration.samples"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    recipe["calibration"] = {"text": [str(short)], "samples": 8, "sequence_length": 64}
    with pytest.raises(CheckpointError, match=r"token"):
        run(recipe, tmp_path / "other")


def test_statistics_that_do_not_serve(recipe_of: Recipes, statistics: Mixture, tmp_path: Path) -> None:
    recipe = recipe_of("mixtral", "sub_moe", 4)
    recipe["calibration"] = {"statistics": str(statistics("phimoe"))}
    with pytest.raises(CheckpointError, match="statistics are of another model"):
        run(recipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match="least-squares merge needs calibration text"):
        run(recipe_of("mixtral", "mergemoe", 4), tmp_path / "fit")


def test_config_and_tensors_that_disagree(recipe_of: Recipes, mixture: Mixture, tmp_path: Path) -> None:
    shutil.copytree(mixture("mixtral"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_local_experts": 6}))
    refused(with_model(recipe_of("mixtral", "reap", 4), tmp_path / "m"), "num_local_experts 6, but .* has 8 experts")


def test_an_unknown_family(recipe_of: Recipes, mixture: Mixture, tmp_path: Path) -> None:
    shutil.copytree(mixture("mixtral"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "brand_new"}))
    refused(with_model(recipe_of("mixtral", "reap", 4), tmp_path / "m"), "'brand_new' is not known.*Qwen3-MoE")


def test_experts_that_no_token_reaches_are_named(recipe_of: Recipes, tmp_path: Path) -> None:
    report = run(recipe_of("gpt_oss", "sub_moe", 4), tmp_path / "out")
    never = [(b, e) for b, d in report["details"]["layers"].items() for e, n in enumerate(d["routed"]) if n == 0]
    for block, e in never:
        assert any(f"{block}: no calibration token reached experts" in w and str(e) in w for w in report["warnings"])
        [group] = [g for g in report["details"]["layers"][block]["groups"] if e in g["members"]]
        own = group["shares"][group["members"].index(e)]
        assert own == (0 if sum(group["shares"]) > own else 1)  # nothing, unless it is alone


def test_fused_experts_larger_than_the_budget_are_streamed(recipe_of: Recipes, tmp_path: Path) -> None:
    """Averages of fused tensors are taken in slices; a merge of matrices says what it needs."""
    with pytest.raises(ResourceError, match="max-memory"):
        run(recipe_of("gpt_oss", "m_smoe", 4), tmp_path / "no", max_memory="10KiB")
