"""Files for mergekit-moe: what each means as a recipe, and what is wrong with one, at its place."""

from __future__ import annotations

import pytest

from mergekit_lr import load_recipe
from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe.moe_file import load_moe

EXPERT = {"source_model": "./a", "positive_prompts": ["x"]}
TEXT = "base_model: ./base\nexperts:\n  - {source_model: ./a, positive_prompts: [x]}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_moe(text)
    return list(caught.value.problems)


def test_shared_experts_are_models_that_every_token_passes() -> None:
    found = load_moe(
        {
            "base_model": "./base",
            "gate_mode": "random",
            "experts_per_token": None,
            "architecture": "deepseek",
            "seed": 3,
            "experts": [EXPERT, {"source_model": "./b", "negative_prompts": None}],
            "shared_experts": [{"source_model": "./c", "residual_scale": 0.5}],
        }
    )
    same = load_recipe(
        {
            "merge_method": "moe_build",
            "base_model": "./base",
            "seed": 3,
            "models": [
                {"model": "./a", "parameters": {"positive_prompts": ["x"]}},
                {"model": "./b"},
                {"model": "./c", "parameters": {"shared": True, "residual_scale": 0.5}},
            ],
            "parameters": {"gate_mode": "random", "architecture": "deepseek"},
        }
    )
    assert found.canonical() == same.canonical()
    assert [p.shared for p in found.resolve("x", 0)[1]] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TEXT + "---\n" + TEXT, "recipe:4:1: this is a second document; build one mixture with each file"),
        ("- 1\n- 2\n", "recipe:1:1: such a file is a mapping; start with `base_model: ...` and `experts: [...]`"),
        (
            TEXT + "merge_method: linear\n",
            "recipe:4:1: merge_method: this is a recipe of its own; run it with `mergekit-lr merge`",
        ),
        ("base_model: ./base\n", "recipe:1:1: experts: is missing; list the models to make experts of"),
        (
            "base_model: ./base\nexperts: [./a]\n",
            "recipe:2:11: experts[0]: must be a mapping; write `- source_model: PATH`",
        ),
        ("base_model: ./base\nexperts: ./a\n", "recipe:2:10: experts: must be a list; write each as"),
        (TEXT + "shared_experts: [./b]\n", "recipe:4:18: shared_experts[0]: must be a mapping"),
        (
            TEXT + "shared_experts: [{source: ./b}]\n",
            "shared_experts[0].source: unknown key; did you mean 'source_model'",
        ),
    ],
)
def test_what_is_no_such_file(text: str, problem: str) -> None:
    assert any(problem in p for p in problems(text))
