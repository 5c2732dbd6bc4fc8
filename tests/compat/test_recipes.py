"""Every recipe of the corpus is accepted, fits models, says its differences; the comparison in the docs is of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mergekit_lr import load_recipe, plan
from mergekit_lr.recipe.differences import differences, normalised

ROOT = Path(__file__).parents[2]
RECIPES = sorted((Path(__file__).parent / "recipes").glob("*/*.yml"))
TOKENIZER = ROOT / "examples" / "models" / "base" / "tokenizer.json"
LAYERS, HIDDEN, VOCABULARY = 8, 4, 1536


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def comparison() -> Any:
    """The module that made the table, and what it found."""
    spec = importlib.util.spec_from_file_location("compare_mergekit", ROOT / "benchmarks" / "compare_mergekit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPARE = comparison()
RESULT = json.loads(COMPARE.RESULT.read_bytes())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the recipes name: eight thin layers and a tokenizer each."""
    root = tmp_path_factory.mktemp("corpus")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{p}_proj.weight": (HIDDEN, HIDDEN) for p in ("gate", "up", "down")}
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    config |= {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_attention_heads": 1, "vocab_size": VOCABULARY}
    for name in COMPARE.MODELS:
        (root / name).mkdir()
        tensors = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}
        save_file(tensors, root / name / "model.safetensors", {"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(config))
        (root / name / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    (root / "lora").mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{prefix}A.weight": torch.zeros(2, HIDDEN), f"{prefix}B.weight": torch.zeros(HIDDEN, 2)}
    save_file(factors, root / "lora" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(adapter))
    return root


def test_the_corpus_is_as_large_as_it_is_said_to_be() -> None:
    kinds = [p.parent.name for p in RECIPES]
    assert kinds.count("cards") >= 60
    assert {p.stem for p in RECIPES if p.parent.name == "examples"} >= {"linear", "bio_merge", "gradient_slerp"}
    assert f"{len(RECIPES)} in all" in COMPARE.PAGE.read_text().replace("\n  ", " ")
    first = [p.read_text().splitlines()[0] for p in RECIPES]
    assert all(line.startswith("# ") for line in first)
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_accepted_and_planned(path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    recipe = load_recipe(path)
    assert plan(recipe, device="cpu").graph.sinks
    again = load_recipe(normalised(recipe))
    assert again.digest() == recipe.digest()
    assert differences(again) == differences(recipe)


def test_every_recipe_was_compared_and_every_difference_has_a_reason() -> None:
    found = RESULT["recipes"]
    assert sorted(found) == sorted(named(p) for p in RECIPES)
    for name, result in found.items():
        assert not result["why"] or result["why"] in COMPARE.REASONS, name
        assert COMPARE.judge(name, result) == result["why"]
        if not result["why"]:
            assert result["as written"]["beyond"] == result["in float32"]["beyond"] == 0
        elif result["why"] not in ("random", "fusion", "wider"):
            assert result["in float32"]["beyond"] == 0


def test_the_table_is_that_of_the_result() -> None:
    page = COMPARE.PAGE.read_text()
    assert COMPARE.renewed(page, RESULT) == page, "run `make compare-mergekit`"


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_difference_that_was_measured_was_foretold(path: Path) -> None:
    """`import` names arithmetic, random masks and thresholds wherever the outputs differed by them."""
    expected = {"arithmetic": "arithmetic", "selection": "arithmetic", "random": "random masks"}
    expected |= {"fusion": "quartiles", "wider": "dtype"}
    why = RESULT["recipes"][named(path)]["why"]
    if why:
        assert expected[why] in {d.about for d in differences(load_recipe(path))}


def test_documents_are_plain_yaml() -> None:
    for path in RECIPES:
        assert all(isinstance(d, dict) for d in yaml.safe_load_all(path.read_text()))
