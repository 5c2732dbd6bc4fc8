"""Routers whose rows are tied, and layers of different sizes: what stock loaders cannot express."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_lr.errors import CheckpointError

from .test_outputs import Recipes, loaded, logits, run


def grouped(source: Path, report: dict[str, Any]) -> Any:
    """The original model with every member's weights set to its group's weighted mean: the tied router by hand."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        for block, decision in report["details"]["layers"].items():
            experts = model.model.layers[int(block.split(".")[2])].mlp.experts
            for g in decision["groups"]:
                for weight in (experts.gate_up_proj, experts.down_proj):
                    mean = sum(f * weight[e].double() for e, f in zip(g["members"], g["shares"], strict=True))
                    weight[g["members"]] = mean.float().expand(len(g["members"]), -1, -1)
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("neighbours", [1, 2])
def test_tied_output_computes_the_grouped_experts(
    family: str, neighbours: int, recipe_of: Recipes, mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(family, "sub_moe", 4, router="tied", sidecar=True, neighbouring_layers=neighbours)
    report = run(recipe, tmp_path / "out")
    tied = loaded(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(tied), logits(grouped(mixture(family), report)), rtol=1e-4, atol=1e-5)
    counts = [len(d["groups"]) for d in report["details"]["layers"].values()]
    assert sum(counts) == 8
    assert [layer.mlp.experts.num_experts for layer in tied.model.layers] == counts
    mapping = json.loads((tmp_path / "out" / "expert_map.json").read_text())["layers"]
    assert mapping == json.loads((tmp_path / "out" / "config.json").read_text())["expert_map"]
    assert not [w for w in report["warnings"] if "config.json says" in w]
    with pytest.raises((RuntimeError, ValueError)):  # a stock loader must not take it for a model of its own
        loaded(tmp_path / "out", trust_remote_code=False)


def test_sidecars_are_refused_unless_asked_for(recipe_of: Recipes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a tied router cannot be loaded by stock.*sidecar: true"):
        run(recipe_of("mixtral", "m_smoe", 4, router="tied"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no model class with tied experts for 'olmoe'.*router: mean"):
        run(recipe_of("olmoe", "m_smoe", 4, router="tied", sidecar=True), tmp_path / "out")
