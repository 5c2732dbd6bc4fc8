"""Reduced models of every family: stock transformers loads them, and every tensor is what the decision says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergekit_lr import merge, plan
from mergekit_lr.arch.moe import MoeLayer, moe_layers
from mergekit_lr.checkpoint.model import open_folder

from .moe_models import FAMILIES

Recipes = Callable[..., dict[str, Any]]
ISSUE = [f for f in FAMILIES if f not in ("minimax_m2", "ernie4_5_moe", "qwen3_next")]


def run(recipe: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return merge(recipe, out, device="cpu", threads=1, **more).report


def loaded(folder: Path, **more: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any, length: int = 24) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(5, 5 + length)[None]).logits
    assert torch.isfinite(found).all()
    return found


def slab(tensors: dict[str, torch.Tensor], layer: MoeLayer, e: int) -> list[torch.Tensor]:
    """One expert's stored parts, read with nothing but safetensors."""
    return [tensors[s.tensor].reshape(-1)[s.start : s.stop].view(s.shape) for s in layer.slabs(e)]


def check_output(recipe: dict[str, Any], out: Path, report: dict[str, Any], *, weighted: bool) -> None:
    """Experts and router rows are those of the decision in the report; everything else is untouched."""
    source = Path(recipe["models"][0]["model"])
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    with open_folder(source, "old") as a, open_folder(out, "new") as b:
        before, after = moe_layers(a), moe_layers(b)
    touched = {n for layer in before for n in layer.names}
    assert {n for n in old if n not in touched} == {n for n in new if n not in {m for x in after for m in x.names}}
    for name in old.keys() - touched:
        assert torch.equal(old[name], new[name]), name
    for was, now in zip(before, after, strict=True):
        decision = report["details"]["layers"][was.block]
        groups = decision["groups"]
        assert now.experts == len(groups) == recipe["parameters"]["num_experts"]
        assert sorted([e for g in groups for e in g["members"]] + decision["dropped"]) == list(range(was.experts))
        assert [g["centre"] for g in groups] == sorted(g["centre"] for g in groups)
        for j, g in enumerate(groups):
            parts = [slab(old, was, e) for e in g["members"]]
            for found, *members in zip(slab(new, now, j), *parts, strict=True):
                check_sum(found, members, g["shares"])
            for r_old, r_new in zip(was.router, now.router, strict=True):
                rows = [old[r_old.name].select(r_old.axis, e) for e in g["members"]]
                check_sum(new[r_new.name].select(r_new.axis, j), rows, g["shares"] if weighted else None)


def check_sum(found: torch.Tensor, members: list[torch.Tensor], shares: list[float] | None) -> None:
    if len(members) == 1:
        assert torch.equal(found, members[0])
    elif shares is not None:
        want = sum(f * m.double() for f, m in zip(shares, members, strict=True))
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3_next"])  # calibrate does not run its layers
def test_every_family_is_pruned_and_merged(family: str, recipe_of: Recipes, tmp_path: Path) -> None:
    count = 6 if family == "deepseek_v3" else 5
    for method, weighted in (("reap", False), ("sub_moe", True)):
        recipe = recipe_of(family, method, count)
        out = tmp_path / method
        report = run(recipe, out)
        check_output(recipe, out, report, weighted=weighted)
        logits(loaded(out))
        assert not [w for w in report["warnings"] if "config.json" in w]


@pytest.mark.slow
@pytest.mark.parametrize("family", ISSUE)
@pytest.mark.parametrize("method", ["reap", "sub_moe", "m_smoe", "hc_smoe", "ream", "mergemoe"])
def test_quarters_and_odd_counts(family: str, method: str, recipe_of: Recipes, tmp_path: Path, mixture: Any) -> None:
    if method == "mergemoe" and family == "llama4_text":
        pytest.skip("refused for this family, see test_bad_input")
    for count in (12, 8, 4, 6, 14) if family == "deepseek_v3" else (6, 4, 2, 5, 3, 7):
        recipe = recipe_of(family, method, count)
        if method == "mergemoe":
            recipe["parameters"]["ridge"] = 0.1
            text = Path(__file__).parents[2] / "examples" / "text" / "heldout" / "c.txt"
            recipe["calibration"] |= {"text": [str(text)], "samples": 8, "sequence_length": 48}
        report = run(recipe, tmp_path / str(count))
        logits(loaded(tmp_path / str(count)))
        if method == "reap":
            check_output(recipe, tmp_path / str(count), report, weighted=False)


def test_a_plan_knows_sizes_before_anything_is_decided(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of("qwen3_moe", "sub_moe", 3)
    planned = plan(recipe, device="cpu").to_dict()
    run(recipe, tmp_path / "out")
    assert planned["bytes_out"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert any("decided from calibration text" in w for w in planned["warnings"])


def test_slices_and_threads_do_not_change_a_byte(recipe_of: Recipes, tmp_path: Path) -> None:
    for family, method in (("gpt_oss", "m_smoe"), ("gpt_oss", "sub_moe"), ("mixtral", "m_smoe")):
        recipe, stem = recipe_of(family, method, 3), f"{family}-{method}"
        merge(recipe, tmp_path / f"{stem}1", device="cpu", threads=1)
        merge(recipe, tmp_path / f"{stem}2", device="cpu", threads=2, max_memory="3MiB", shard_size=20_000)
        one = load_file(tmp_path / f"{stem}1" / "model.safetensors")
        many: dict[str, torch.Tensor] = {}
        for path in (tmp_path / f"{stem}2").glob("*.safetensors"):
            many |= load_file(path)
        assert one.keys() == many.keys()
        assert all(torch.equal(one[n], many[n]) for n in one)


def test_the_router_keeps_its_dtype_where_the_rest_is_narrowed(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = {**recipe_of("deepseek_v3", "sub_moe", 8), "dtype": "bfloat16"}
    run(recipe, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    narrow = {n for n, t in tensors.items() if t.dtype == torch.bfloat16}
    assert {n.rpartition("mlp.")[2] for n in tensors.keys() - narrow} == {"gate.weight", "gate.e_score_correction_bias"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    logits(loaded(tmp_path / "out"))


def test_report_card_and_picture_say_who_became_one(recipe_of: Recipes, tmp_path: Path) -> None:
    report = run(recipe_of("qwen3_moe", "hc_smoe", 5), tmp_path / "out")
    counts = report["details"]["expert_parameters"]
    assert counts == {"before": 2 * 8 * 3 * 16 * 32, "after": 2 * 5 * 3 * 16 * 32}
    card = (tmp_path / "out" / "README.md").read_text()
    groups = report["details"]["layers"]["model.layers.1.mlp"]["groups"]
    assert ", ".join("+".join(map(str, g["members"])) for g in groups) in card
    pytest.importorskip("matplotlib")
    assert "![How alike the experts of each layer are](expert_similarity.png)" in card
    assert (tmp_path / "out" / "expert_similarity.png").read_bytes().startswith(b"\x89PNG")
