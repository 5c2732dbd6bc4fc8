"""Fuzzing: whatever the recipe, the answer is a recipe or a RecipeError with places, and it comes soon."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe import Recipe, load_recipe

PLACE = re.compile(r"recipe(:\d+:\d+)?: ")

SEEDS = [
    "merge_method: ties\nbase_model: ./base\nmodels:\n  - model: ./a\n    parameters: {weight: 0.5, density: [0, 1]}\n"
    "  - model: ./b\n    parameters:\n      weight:\n        - {filter: mlp, value: 0.3}\n        - value: 1e-1\n"
    "parameters: {lambda: 2, normalize: true}\ndtype: float32\nout_dtype: bfloat16\n",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters:\n  t:\n  - filter: self_attn\n"
    "    value: [0, 0.5, 0.3, 0.7, 1]\n  - value: 0.5\ntokenizer_source: base\n",
    "merge_method: linear\nmodels:\n- &m\n  model: x\n  parameters: {weight: 1}\n- *m\nseed: 3\nnonfinite: allow\n",
]
TOKENS = ["[", "]", "{", "}", ":", "- ", "*m", "&m ", "!x ", "'", '"', "\n", "  ", "~", ".nan", "-1", "9" * 30, "no"]
TOKENS += ["1e999", "weight", "models", "\t", "é", "\x00", "# ", "|", ">", "? ", "\ufeff", "true", "0x", "<<: "]


def answer(source: Any) -> Recipe | None:
    """The recipe, or None where it is refused in the right way. Any other exception fails the test."""
    try:
        recipe = load_recipe(source)
    except RecipeError as e:
        assert e.problems
        for line in e.problems:
            assert "\n" not in line
            assert PLACE.match(line), line
            assert len(line) < 1000
        return None
    for t in (0.0, 0.3, 1.0):
        try:
            recipe.resolve("model.layers.0.mlp.up_proj.weight", t)
        except RecipeError as e:
            assert "tensor" in str(e)
    return recipe


def mutated(rng: random.Random) -> str:
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(text) + 1), rng.choice((0, 0, 1, 3, 12))
        text = text[:at] + rng.choice([*TOKENS, text[at : at + 20] * 2]) + text[at + length :]
    return text + "\n"


@pytest.mark.parametrize(("seed", "count"), [(20, 2000), pytest.param(21, 20_000, marks=pytest.mark.slow, id="long")])
def test_mutated_recipes(seed: int, count: int) -> None:
    """Edits of good recipes. Some stay good, most do not; none takes long."""
    rng = random.Random(seed)
    good, slowest = 0, 0.0
    for _ in range(count):
        text = mutated(rng)
        began = time.process_time()
        good += answer(text) is not None
        slowest = max(slowest, time.process_time() - began)
    assert 0.01 < good / count < 0.5
    assert slowest < 1.0


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(TOKENS)
KEYS = [
    *("merge_method", "models", "model", "base_model", "parameters", "weight", "density", "lambda", "filter", "value"),
    *("dtype", "out_dtype", "seed", "nonfinite", "tokenizer_source", "t", "normalize", "slices", "x"),
]
keys = st.sampled_from(KEYS) | st.text(max_size=4)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5), max_leaves=15
)
documents = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["ties", "slerp", "linear", "karcher", "della", "passthrough"]) | trees},
    optional={
        "models": st.lists(
            st.fixed_dictionaries({"model": st.sampled_from(["a", "b"]) | trees}, optional={"parameters": trees}),
            max_size=3,
        )
        | trees,
        "base_model": st.sampled_from(["a", "base"]) | trees,
        "parameters": st.dictionaries(keys, trees, max_size=4) | trees,
        "dtype": trees,
        "seed": trees,
        "tokenizer_source": trees,
        "tokenizer": st.dictionaries(st.sampled_from(["source", "tokens", "pad_to_multiple_of"]), trees) | trees,
        "chat_template": trees,
        "nonfinite": trees,
    },
)


@given(documents)
@settings(max_examples=300, deadline=None)
def test_any_tree_of_plain_values(document: dict[str, Any]) -> None:
    answer(document)


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text(text: str) -> None:
    answer(text + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: [" + "{model: a, parameters: {weight: 1}}, " * 20_000 + "]\n",
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [" + "1, " * 90_000 + "]}\n",
        "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters:\n  weight: &w\n"
        + "".join(f"  - {{filter: f{i}, value: [1, 2, 3]}}\n" for i in range(900))
        + "  density: 1\n",
        "merge_method: linear\nmodels:\n" + "- {modl: a}\n" * 20_000,
        "merge_method: " + "x" * 500_000 + "\nmodels: [{model: a}]\n",
        "".join(f"key{i}: 1\n" for i in range(40_000)),
    ],
    ids=["models", "gradient", "filters", "faults", "name", "keys"],
)
def test_large_recipes_cost_little(text: str) -> None:
    began = time.process_time()
    answer(text)
    assert time.process_time() - began < 5.0
