"""The JSON Schema accepts what the loader accepts, and refuses what a schema can refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe import load_recipe
from mergekit_lr.recipe.catalogue import methods
from mergekit_lr.recipe.json_schema import schema
from mergekit_lr.recipe.problems import Problems
from mergekit_lr.recipe.walk import ROOT_KEYS, SYNONYMS
from mergekit_lr.recipe.yaml import Node, Scalar, Sequence, parse_documents
from mergekit_lr.registry import builtin_methods

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("**/*.yml"))

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
ANNOTATIONS = {"$schema", "title", "description", "default"}


def is_type(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def plain(node: Node) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Sequence):
        return [plain(i) for i in node.items]
    return {k: plain(e.value) for k, e in node.entries.items()}


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def accepts(s: dict[str, Any], v: Any) -> bool:
    """JSON Schema draft-07 for the keywords that the schema uses; any other keyword fails the test."""
    rules = {
        "type": lambda x: any(is_type(v, t) for t in ([x] if isinstance(x, str) else x)),
        "enum": lambda x: any(same(v, e) for e in x),
        "const": lambda x: same(v, x),
        "anyOf": lambda x: any(accepts(o, v) for o in x),
        "oneOf": lambda x: sum(accepts(o, v) for o in x) == 1,
        "maxItems": lambda x: not isinstance(v, list) or len(v) <= x,
        "allOf": lambda x: all(accepts(o, v) for o in x),
        "if": lambda x: accepts(s["then"], v) if accepts(x, v) else True,
        "then": lambda x: True,
        "required": lambda x: not isinstance(v, dict) or all(k in v for k in x),
        "properties": lambda x: not isinstance(v, dict) or all(accepts(p, v[k]) for k, p in x.items() if k in v),
        "additionalProperties": lambda x: all(
            x is True or (isinstance(x, dict) and accepts(x, v[k]))
            for k in (set(v) - set(s.get("properties", {})) if isinstance(v, dict) else ())
        ),
        "$ref": lambda x: accepts({"#": SCHEMA}[x], v),
        "items": lambda x: not isinstance(v, list) or all(accepts(x, i) for i in v),
        "minItems": lambda x: not isinstance(v, list) or len(v) >= x,
        "pattern": lambda x: not isinstance(v, str) or re.search(x, v) is not None,
        "minLength": lambda x: not isinstance(v, str) or len(v) >= x,
        "minimum": lambda x: not is_type(v, "number") or v >= x,
        "maximum": lambda x: not is_type(v, "number") or v <= x,
        "exclusiveMinimum": lambda x: not is_type(v, "number") or v > x,
        "exclusiveMaximum": lambda x: not is_type(v, "number") or v < x,
    }
    return all(rules[key](rule) for key, rule in s.items() if key not in ANNOTATIONS)


SCHEMA = schema()


def base(**changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "./base",
        "models": [{"model": "./a", "parameters": {"weight": 0.5}}],
        **changes,
    }


def own(**parameters: Any) -> list[dict[str, Any]]:
    return [{"model": "./a", "parameters": {"weight": 1, **parameters}}]


def sliced(*sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = {"merge_method": "linear", "slices": [{"sources": list(sources)}], "parameters": {"weight": 1}}
    return {**found, **changes}


GOOD = [
    sliced({"model": "./a", "layer_range": [0, 2]}, {"model": "./b", "layer_range": [1, 3]}),
    sliced({"model": "./a", "layer_range": [0, 2], "parameters": {"weight": [2, 1]}}, parameters=None),
    {
        "merge_method": "slerp",
        "slices": [
            {
                "sources": [{"model": m, "layer_range": [0, 2]} for m in ("./a", "./b")],
                "base_model": "./a",
                "parameters": {"t": [0, 1]},
            }
        ],
    },
    base(),
    base(models=own(weight=[0, 0.5, 1])),
    base(models=own(weight=[{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}])),
    base(models=own(density={"filter": "mlp", "value": 0.5})),
    base(parameters={"weight": 1, "lambda": [1, 2], "normalize": [True, False]}),
    base(parameters={"threshold_scope": "model"}, dtype="float32", out_dtype="bfloat16", seed=3),
    base(parameters=None, dtype=None, tokenizer_source="base", nonfinite="warn"),
    base(tokenizer={"source": "union", "pad_to_multiple_of": 64, "tokens": {"a": {"source": "./a", "force": True}}}),
    base(tokenizer={"tokens": {"a": {"source": {"kind": "zero"}}, "b": None}}, chat_template="chatml"),
    base(tokenizer={"tokens": {"a": {"source": {"kind": "model_token", "model": "./a", "token_id": 3}}}}),
    base(chat_template="{{ messages }}"),
    {"merge_method": "slerp", "base_model": "./a", "models": [{"model": "./b"}], "parameters": {"t": 0.3}},
    {"merge_method": "linear", "models": own()},
    {
        **{"merge_method": "weight_matching", "base_model": "./base", "models": own(density=[0.5, 0.3])},
        "parameters": {"then": "dare_ties", "rescale_by": "l1", "normalize": True, "restarts": 2},
    },
]
BAD = [
    {},
    sliced({"model": "./a"}),
    sliced({"model": "./a", "layer_range": [0]}),
    sliced({"model": "./a", "layer_range": [0, 1, 2]}),
    sliced({"model": "./a", "layer_range": [-1, 2]}),
    sliced({"model": "./a", "layer_range": [0, 1.5]}),
    sliced({"model": "./a", "layer_range": [0, 2], "weight": 1}),
    sliced({"model": "./a", "layer_range": [0, 2], "parameters": {"densty": 1}}),
    sliced(),
    sliced({"model": "./a", "layer_range": [0, 2]}, slices=[]),
    sliced({"model": "./a", "layer_range": [0, 2]}, models=[{"model": "./a"}]),
    sliced({"model": "./a", "layer_range": [0, 2]}, slices=[{"sources": [], "parameters": {}}]),
    sliced({"model": "./a", "layer_range": [0, 2]}, slices=[{"surces": []}]),
    base(models=None),
    base(models=[]),
    base(merge_method="teis"),
    base(dtpye="float32"),
    base(dtype="float17"),
    base(tokenizer={"sorce": "union"}),
    base(tokenizer={"pad_to_multiple_of": 0}),
    base(tokenizer={"tokens": {"a": {"source": {"kind": "model_token", "model": "./a"}}}}),
    base(tokenizer={"tokens": {"a": {"source": {"kind": "zeros"}}}}),
    base(chat_template="chatlm"),
    base(base_model=None),
    {"merge_method": "weight_matching", "models": own(densty=1), "parameters": {"then": "ties"}},
    base(models=own(densty=1)),
    base(models=own(density=1.5)),
    base(models=own(density=[0.5, 1.5])),
    base(models=own(density=[])),
    base(models=own(density=[{"filter": "mlp"}])),
    base(models=own(density=[{"filtre": "mlp", "value": 1}])),
    base(models=own(weight=True)),
    base(models=own(**{"lambda": 2})),
    base(models=["./a"]),
    base(models=[{"model": 3}]),
    base(models=[{"modle": "./a"}]),
    base(parameters={"threshold_scope": "layer"}),
    base(parameters={"tt": 1}),
    base(seed=-1),
    base(seed=1.5),
    {"merge_method": "slerp", "base_model": "./a", "models": [{"model": "./b"}]},
    {"merge_method": "slerp", "base_model": "./a", "models": [{"model": "./b"}], "parameters": {"t": [0, "x"]}},
]


@pytest.mark.parametrize("recipe", GOOD)
def test_good_recipes(recipe: dict[str, Any]) -> None:
    load_recipe(recipe)
    assert accepts(SCHEMA, recipe)


@pytest.mark.parametrize("recipe", BAD)
def test_bad_recipes(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        load_recipe(recipe)
    assert not accepts(SCHEMA, recipe)


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_the_recipes_that_come_with_the_package(path: Path) -> None:
    recipe = load_recipe(path)
    documents = parse_documents(path.read_text(), Problems(path.name))
    assert documents
    for document in documents:
        assert document.root is not None
        assert accepts(SCHEMA, plain(document.root))
    assert accepts(SCHEMA, recipe.canonical())


def test_another_implementation_agrees() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft7Validator(SCHEMA)
    assert [validator.is_valid(r) for r in GOOD] == [True] * len(GOOD)
    assert [validator.is_valid(r) for r in BAD] == [False] * len(BAD)


def test_the_schema_knows_the_keys_and_methods_of_the_loader() -> None:
    assert set(SCHEMA["properties"]) == {*ROOT_KEYS, *SYNONYMS}
    assert set(SCHEMA["properties"]["merge_method"]["enum"]) >= set(builtin_methods())
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_every_parameter_is_described_with_its_default() -> None:
    for case in SCHEMA["allOf"]:
        for parameter in case["then"]["properties"]["parameters"]["properties"].values():
            assert re.search(r"\w{3}", parameter["description"])
    [ties] = [c for c in SCHEMA["allOf"] if c["if"]["properties"]["merge_method"]["const"] == "ties"]
    assert "(default 1.0)" in ties["then"]["properties"]["parameters"]["properties"]["density"]["description"]


def test_one_method_in_full() -> None:
    found = methods("slerp")
    assert isinstance(found, dict)
    assert (found["base"], found["min_models"], found["max_models"]) == ("operand", 2, 2)
    [t] = [p for p in found["parameters"] if p["name"] == "t"]
    assert (t["type"], t["required"], t["default"]) == ("a number", True, None)
    density = next(p for p in methods("ties")["model_parameters"] if p["name"] == "density")  # type: ignore[call-overload]
    assert (density["range"], density["default"]) == (">= 0, <= 1", 1.0)


def test_all_methods_in_short() -> None:
    found = methods()
    assert isinstance(found, list)
    assert {m["name"] for m in found} >= set(builtin_methods())
    assert json.loads(json.dumps(found)) == found
