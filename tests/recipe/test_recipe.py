"""The loaded recipe: sources, inputs in order, warnings, canonical form, digest; and no torch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe import Recipe, load_recipe

TEXT = """\
# two fine-tunes
merge_method: ties
base_model: ./base
models:
  - model: ./math
    parameters: {weight: 0.5, density: [0.2, 0.8]}
  - model: org/code@v1+./lora
    parameters:
      weight:
        - {filter: mlp, value: 0.3}
        - value: 1e-1
parameters:
  lambda: 2
dtype: float32
out_dtype: bfloat16
tokenizer_source: ./math
random_seed: 7
nonfinite: warn
"""


def names(recipe: Recipe) -> list[str]:
    return [str(m.reference) for m in recipe.input_models()]


def recipe(method: str, models: list[str], base: str | None = None, **parameters: object) -> Recipe:
    return load_recipe(
        {
            "merge_method": method,
            "models": [{"model": m} for m in models],
            "base_model": base,
            "parameters": parameters,
        }
    )


def test_what_the_text_says_is_what_the_fields_hold(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(TEXT)
    r = load_recipe(path)
    assert (r.merge_method, r.method.name) == ("ties", "ties")
    assert names(r) == ["./math", "org/code@v1+./lora"]
    second = r.models[1].reference
    assert (second.path, second.revision, str(second.adapter)) == ("org/code", "v1", "./lora")
    assert str(r.base_model) == "./base"
    assert (r.dtype, r.out_dtype, r.output_dtype) == ("float32", "bfloat16", "bfloat16")
    assert str(r.tokenizer_source) == "./math"
    assert str(r.config_source) == "./base"
    assert (r.seed, r.nonfinite, r.warnings) == (7, "warn", ())
    assert (r.text, r.origin) == (TEXT, path)


def test_defaults() -> None:
    r = recipe("linear", ["./a", "./b"], weight=1)
    assert (r.dtype, r.out_dtype, r.output_dtype, r.tokenizer, r.chat_template) == (None, None, None, None, None)
    assert str(r.tokenizer_source) == "./a"
    assert (r.seed, r.nonfinite, r.origin) == (0, "error", None)
    assert str(r.config_source) == "./a"


def test_every_kind_of_source_gives_the_same_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(TEXT)
    loaded = load_recipe(path)
    for source in (str(path), TEXT, yaml.safe_load(TEXT) | {"parameters": {"lambda": 2.0}}, loaded):
        assert load_recipe(source) == loaded
    assert load_recipe(loaded) is loaded


def test_a_dict_gets_a_text_that_is_the_same_recipe() -> None:
    source = yaml.safe_load(TEXT)
    source["models"][1]["parameters"]["weight"][1]["value"] = 0.1
    r = load_recipe(source)
    assert yaml.safe_load(r.text) == source
    assert load_recipe(r.text) == r


@pytest.mark.parametrize(
    ("text", "models"),
    [
        (
            "merge_method: passthrough\nslices:\n"
            "  - sources: [{model: ./b, layer_range: [0, 2]}]\n"
            "  - sources: [{model: ./a, layer_range: [1, 3]}]\n"
            "  - sources: [{model: ./b, layer_range: [2, 4]}]\n",
            ["./b", "./a"],
        ),
        (
            "merge_method: ties\nbase_model: ./base\nparameters: {weight: 1, density: 1}\nmodules:\n"
            "  text: {models: [{model: ./a}, {model: ./b}]}\n"
            "  vision: {models: [{model: ./c}, {model: ./a}]}\n",
            ["./a", "./b", "./c"],
        ),
    ],
    ids=["slices", "modules"],
)
def test_a_model_that_is_merged_at_several_places_is_one_input(text: str, models: list[str]) -> None:
    assert names(load_recipe(text)) == models


def test_a_recipe_is_frozen_and_survives_pickling() -> None:
    r = load_recipe(TEXT)
    with pytest.raises(FrozenInstanceError):
        r.seed = 3  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(r))
    assert copy == r
    assert copy.resolve("x.mlp", 0.5) == r.resolve("x.mlp", 0.5)


# method, models as listed, base, inputs as the method sees them
ORDER = [
    ("ties", ["./a", "./b"], "./base", ["./a", "./b"]),
    ("ties", ["./a", "./base", "./b"], "./base", ["./a", "./b"]),
    ("ties", ["./a", "./base/", "./b"], "./base", ["./a", "./base/", "./b"]),  # identity is that of the text
    ("nuslerp", ["./a", "./b"], None, ["./a", "./b"]),
    ("nuslerp", ["./a", "./base", "./b"], "./base", ["./a", "./b"]),
    ("slerp", ["./a", "./b"], "./a", ["./a", "./b"]),
    ("slerp", ["./a", "./b"], "./b", ["./b", "./a"]),
    ("slerp", ["./b"], "./a", ["./a", "./b"]),
    ("linear", ["./a", "./b"], None, ["./a", "./b"]),
    ("linear", ["./a", "./base"], "./base", ["./a", "./base"]),
    ("linear", ["./base", "./a"], "./base", ["./base", "./a"]),
    ("linear", ["./a", "./b"], "./base", ["./a", "./b", "./base"]),  # as in mergekit
]


@pytest.mark.parametrize(("method", "models", "base", "expected"), ORDER)
def test_inputs_in_the_order_of_the_method(
    method: str, models: list[str], base: str | None, expected: list[str]
) -> None:
    parameters: dict[str, object] = {"t": 0.5} if method == "slerp" else {"weight": 1}
    assert names(recipe(method, models, base, **parameters)) == expected


def test_an_operand_that_is_not_listed_takes_the_shared_parameters() -> None:
    r = recipe("slerp", ["./b"], "./a", t=0.5)
    merge, models = r.resolve("x", 0.0)
    assert merge.t == 0.5  # type: ignore[attr-defined]
    assert len(models) == 2


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("slerp", ["./a", "./b", "./c"], "./a", "exactly 2 models, the base among them; here are 3"),
        ("slerp", ["./a"], "./a", "here are 1"),
        ("model_stock", ["./a", "./base"], "./base", "at least 2 models beside the base; here are 1"),
        ("passthrough", ["./a", "./b"], None, "exactly 1 model; here are 2"),
        ("nuslerp", ["./a", "./b", "./c"], None, "exactly 2 models beside the base; here are 3"),
    ],
)
def test_counts(method: str, models: list[str], base: str | None, message: str) -> None:
    parameters: dict[str, object] = {"slerp": {"t": 0.5}, "nuslerp": {"weight": 1}}.get(method, {})
    with pytest.raises(RecipeError, match=message):
        recipe(method, models, base, **parameters)


def test_warnings() -> None:
    twice = load_recipe("merge_method: linear\nmodels:\n- model: a\n- model: a\nparameters: {weight: 1}\n")
    assert twice.warnings == ("recipe:4:3: models[1]: names the same model as models[0]",)
    joined = load_recipe("merge_method: linear\nbase_model: b\nmodels:\n- model: a\nparameters: {weight: 1}\n")
    assert joined.warnings == (
        "recipe:2:13: base_model: is merged too: linear takes every model, and the base is not listed under models, "
        "as in mergekit; drop base_model to merge only the models listed, or list it with parameters of its own",
    )
    base = load_recipe(
        "merge_method: ties\nbase_model: b\nmodels:\n- model: a\n- {model: b, parameters: {weight: 1}}\n"
        "parameters: {weight: 1}\n"
    )
    assert base.warnings == ("recipe:5:3: models[1]: parameters of the base model have no effect",)


# Canonical form and digest

SAME = [
    ("tokenizer_source: ./math", "tokenizer: {source: ./math, tokens: null}"),
    ("dtype: float32\n", "dtype: 'float32'\n"),
    ("lambda: 2\n", "lambda: 2.0\n"),
    ("lambda: 2\n", "lambda: [2]\n"),
    ("lambda: 2\n", "lambda: [{value: 2}]\n"),
    ("lambda: 2\n", "lambda: {filter: '*', value: 2}\n"),
    ("lambda: 2\n", "{lambda: 2, normalize: true}\n".replace("{lambda", "{'lambda'")),
    ("weight: 0.5, density: [0.2, 0.8]", "density: [0.2, 0.8], weight: 0.5"),
    ("        - value: 1e-1\n", "        - {filter: '*', value: 0.10}\n        - {filter: x, value: 3}\n"),
    ("random_seed: 7\n", "seed: 7\n"),
    ("# two fine-tunes\n", ""),
    ("  - model: org/code", "  - {model: ./base}\n  - model: org/code"),
]
OTHER = [
    ("lambda: 2\n", "lambda: 2.5\n"),
    ("weight: 0.5,", "weight: 0.51,"),
    ("[0.2, 0.8]", "[0.8, 0.2]"),
    ("filter: mlp", "filter: attn"),
    ("./math", "./maths"),
    ("@v1", "@v2"),
    ("./lora", "./lora2"),
    ("./base", "./base2"),
    ("merge_method: ties", "merge_method: dare_ties"),
    ("out_dtype: bfloat16", "out_dtype: float16"),
    ("dtype: float32", "dtype: float16"),
    ("tokenizer_source: ./math", "tokenizer_source: base"),
    ("tokenizer_source: ./math", "tokenizer: {source: ./math, pad_to_multiple_of: 8}"),
    ("tokenizer_source: ./math", "tokenizer: {source: ./math, tokens: {a: {source: ./base}}}"),
    ("tokenizer_source: ./math", "tokenizer_source: ./math\nchat_template: chatml"),
    ("random_seed: 7", "random_seed: 8"),
    ("nonfinite: warn", "nonfinite: allow"),
]


def edited(old: str, new: str) -> Recipe:
    assert old in TEXT
    text = TEXT.replace(old, new)
    if "{'lambda'" in new:
        text = text.replace("parameters:\n  {", "parameters: {")
    return load_recipe(text)


@pytest.mark.parametrize(("old", "new"), SAME)
def test_the_same_merge_said_differently_has_the_same_digest(old: str, new: str) -> None:
    assert edited(old, new).digest() == load_recipe(TEXT).digest()


@pytest.mark.parametrize(("old", "new"), OTHER)
def test_another_merge_has_another_digest(old: str, new: str) -> None:
    assert edited(old, new).digest() != load_recipe(TEXT).digest()


def test_a_parameter_given_to_all_is_the_same_as_given_to_each() -> None:
    shared = recipe("linear", ["./a", "./b"], weight=0.5)
    each = load_recipe(
        {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("./a", "./b")]}
    )
    assert shared.digest() == each.digest()


def test_the_canonical_form_writes_every_default_out() -> None:
    assert recipe("linear", ["./a", "./b"], weight=0.5).canonical() == {
        "merge_method": "linear",
        "models": [
            {"model": "./a", "parameters": {"weight": 0.5}},
            {"model": "./b", "parameters": {"weight": 0.5}},
        ],
        "base_model": None,
        "parameters": {"normalize": True},
        "dtype": None,
        "out_dtype": None,
        "seed": 0,
        "nonfinite": "error",
    }


def test_the_digest_is_the_same_in_every_process() -> None:
    """Recorded; it changes only if the canonical form does, and then unfinished runs cannot be resumed."""
    assert recipe("linear", ["./a", "./b"], weight=0.5).digest() == DIGEST


DIGEST = "16ec32e6321cd9e16baeef68ab5b03fa1182912877ae0d6f262c4e0b298356d5"

number = st.floats(0, 1)
leaf = number | st.lists(number, min_size=1, max_size=4)
rules = st.lists(
    st.builds(lambda f, v: {"filter": f, "value": v}, st.sampled_from(["mlp", "attn", "q_", "*"]), leaf), max_size=3
).flatmap(lambda found: leaf.map(lambda last: [*found, {"value": last}]))


@given(
    st.lists(st.tuples(leaf | rules, leaf | rules), min_size=1, max_size=3),
    st.none() | leaf | rules,
    st.booleans(),
    st.sampled_from([None, "float16", "bfloat16"]),
)
@settings(deadline=None)
def test_the_canonical_form_is_a_recipe_for_the_same_merge(
    values: list[tuple[Any, Any]], shared: Any, normalize: bool, dtype: str | None
) -> None:
    source: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": f"m{i}", "parameters": {"weight": w, "density": d}} for i, (w, d) in enumerate(values)],
        "parameters": {"normalize": normalize} | ({} if shared is None else {"lambda": shared}),
        "out_dtype": dtype,
    }
    first = load_recipe(source)
    again = load_recipe(json.loads(json.dumps(first.canonical())))
    assert again.canonical() == first.canonical()
    assert again.digest() == first.digest()
    for name in ("a.mlp.q_proj", "b.attn", "norm"):
        for t in (0.0, 0.4, 1.0):
            assert again.resolve(name, t) == first.resolve(name, t)


def test_a_copy_with_another_seed_resolves_afresh() -> None:
    r = load_recipe(TEXT)
    assert replace(r, seed=9).digest() != r.digest()
    assert replace(r, seed=9).resolve("x", 0.0) == r.resolve("x", 0.0)


def test_reading_a_recipe_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(TEXT)
    code = (
        "import sys\n"
        "from mergekit_lr.recipe import load_recipe\n"
        f"load_recipe({str(path)!r}).resolve('x', 0.5)\n"
        "from mergekit_lr.recipe.json_schema import schema\n"
        "schema()\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
