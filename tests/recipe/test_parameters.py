"""Values by tensor: precedence, filters and gradients against values worked out by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe import Recipe, load_recipe
from mergekit_lr.recipe.parameters import Gradient

MLP = "model.layers.3.mlp.up_proj.weight"
ATTENTION = "model.layers.3.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def ties(first: dict[str, Any], shared: dict[str, Any] | None = None) -> Recipe:
    return load_recipe(
        {
            "merge_method": "ties",
            "base_model": "./base",
            "models": [
                {"model": "./a", "parameters": first},
                {"model": "./b", "parameters": {"weight": 0.25}},
            ],
            "parameters": shared or {},
        }
    )


def weight(value: object, tensor: str = MLP, t: float = 0.0) -> Any:
    """The weight that ``value`` means for the first model."""
    return ties({"weight": value}).resolve(tensor, t)[1][0].weight  # type: ignore[attr-defined]


# value as written, tensor, t, worked out by hand
FILTERS = [
    (0.5, MLP, 0.3, 0.5),
    ({"value": 0.5}, MLP, 0.3, 0.5),
    ([{"filter": "mlp", "value": 0.1}, {"value": 0.9}], MLP, 0.0, 0.1),
    ([{"filter": "mlp", "value": 0.1}, {"value": 0.9}], ATTENTION, 0.0, 0.9),
    ([{"filter": "mlp", "value": 0.1}, {"filter": "*", "value": 0.9}], EMBEDDING, 0.0, 0.9),
    ([{"filter": "layers.3", "value": 0.2}, {"filter": "mlp", "value": 0.1}, {"value": 0.9}], MLP, 0.0, 0.2),
    ([{"filter": "mlp", "value": 0.1}, {"filter": "layers.3", "value": 0.2}, {"value": 0.9}], MLP, 0.0, 0.1),
    ([{"value": 0.9}, {"filter": "mlp", "value": 0.1}], MLP, 0.0, 0.9),
    ([{"filter": "MLP", "value": 0.1}, {"value": 0.9}], MLP, 0.0, 0.9),
    ([{"filter": "", "value": 0.4}], MLP, 0.0, 0.4),
    ([{"filter": "mlp.*weight", "value": 0.1}, {"value": 0.9}], MLP, 0.0, 0.9),
    ([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": [1.0, 0.0]}], MLP, 0.25, 0.25),
    ([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": [1.0, 0.0]}], ATTENTION, 0.25, 0.75),
]


@pytest.mark.parametrize(("value", "tensor", "t", "expected"), FILTERS)
def test_filters(value: object, tensor: str, t: float, expected: float) -> None:
    assert weight(value, tensor, t) == expected


# s = t (m - 1), i = int(s), f = s - i, (1 - f) v[i] + f v[i + 1]
GRADIENTS = [
    ([0, 1], 0.0, 0.0),
    ([0, 1], 1.0, 1.0),
    ([0, 1], 0.75, 0.75),
    ([0, 0.5, 0.3, 0.7, 1], 0.0, 0.0),
    ([0, 0.5, 0.3, 0.7, 1], 0.25, 0.5),
    ([0, 0.5, 0.3, 0.7, 1], 0.375, 0.4),  # half way from 0.5 to 0.3
    ([0, 0.5, 0.3, 0.7, 1], 0.8125, 0.775),  # a quarter from 0.7 to 1
    ([0, 0.5, 0.3, 0.7, 1], 1.0, 1.0),
    ([2, 1, 0], 0.5, 1.0),
    ([0.3], 0.9, 0.3),
    ([-1, 1], 0.5, 0.0),
]


@pytest.mark.parametrize(("values", "t", "expected"), GRADIENTS)
def test_gradients(values: list[float], t: float, expected: float) -> None:
    assert weight(values, t=t) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.floats(0, 1))
def test_a_gradient_is_numpy_interp_and_stays_within_its_values(values: list[float], t: float) -> None:
    import numpy

    found = Gradient(tuple(values), smooth=True).at(t)
    grid = numpy.linspace(0, 1, len(values))
    assert found == pytest.approx(numpy.interp(t, grid, values), rel=1e-9, abs=1e-6)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9


@pytest.mark.parametrize(
    ("t", "normalize", "scope"),
    [(0.0, True, "tensor"), (0.4, True, "tensor"), (0.5, False, "model"), (1.0, False, "model")],
)
def test_what_is_no_number_is_chosen_not_interpolated(t: float, normalize: bool, scope: str) -> None:
    """v[int(t (m - 1))] with m = 3 values: index 0 below t = 0.5, 1 from there, 2 at t = 1."""
    recipe = ties(
        {"weight": 1},
        {"normalize": [True, False, False], "threshold_scope": ["tensor", "model", "model"]},
    )
    merge, _ = recipe.resolve(MLP, t)
    assert (merge.normalize, merge.threshold_scope) == (normalize, scope)  # type: ignore[attr-defined]


def test_a_whole_number_is_chosen_too() -> None:
    recipe = load_recipe(
        {
            "merge_method": "karcher",
            "models": [{"model": "./a"}, {"model": "./b"}],
            "parameters": {"max_iter": [1, 10]},
        }
    )
    found = [recipe.resolve(MLP, t)[0].max_iter for t in (0.0, 0.99, 1.0)]  # type: ignore[attr-defined]
    assert found == [1, 1, 10]


# the model's own density, the recipe's density, tensor, expected; the default is 1
PRECEDENCE = [
    (None, None, MLP, 1.0),
    (None, 0.7, MLP, 0.7),
    (0.2, None, MLP, 0.2),
    (0.2, 0.7, MLP, 0.2),
    ([{"filter": "mlp", "value": 0.2}], 0.7, MLP, 0.2),
    ([{"filter": "mlp", "value": 0.2}], 0.7, ATTENTION, 0.7),
    ([{"filter": "mlp", "value": 0.2}], [{"filter": "attn", "value": 0.7}], MLP, 0.2),
    ([{"filter": "mlp", "value": 0.2}], [{"filter": "attn", "value": 0.7}], ATTENTION, 0.7),
    ([{"filter": "mlp", "value": 0.2}], [{"filter": "attn", "value": 0.7}], EMBEDDING, 1.0),
    ([{"filter": "mlp", "value": 0.2}, {"value": 0.3}], [{"filter": "attn", "value": 0.7}], ATTENTION, 0.3),
    (None, [{"filter": "attn", "value": 0.7}], MLP, 1.0),
]


@pytest.mark.parametrize(("own", "shared", "tensor", "expected"), PRECEDENCE)
def test_own_then_shared_then_default(own: object, shared: object, tensor: str, expected: float) -> None:
    first = {"weight": 1} | ({} if own is None else {"density": own})
    recipe = ties(first, {} if shared is None else {"density": shared})
    assert recipe.resolve(tensor, 0.0)[1][0].density == expected  # type: ignore[attr-defined]


def test_models_keep_their_order_and_their_own_values() -> None:
    recipe = ties({"weight": [0, 1], "density": 0.1}, {"density": 0.9, "lambda": [1, 3]})
    merge, models = recipe.resolve(MLP, 0.5)
    assert merge.model_dump(by_alias=True)["lambda"] == 2.0
    assert [(m.weight, m.density) for m in models] == [(0.5, 0.1), (0.25, 0.9)]  # type: ignore[attr-defined]


def test_numbers_in_quotes_are_numbers_as_mergekit_has_it() -> None:
    assert weight("1e-3") == 0.001


def test_the_same_question_gives_the_same_object() -> None:
    recipe = ties({"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 1}]})
    assert recipe.resolve(MLP, 0.5) is recipe.resolve("other.mlp", 0.5)
    assert recipe.resolve(MLP, 0.5) is not recipe.resolve(MLP, 0.25)


def test_a_required_value_that_no_filter_gives_names_tensor_model_and_parameter() -> None:
    recipe = ties({"weight": [{"filter": "mlp", "value": 1}]})
    assert recipe.resolve(MLP, 0.0)[1][0].weight == 1  # type: ignore[attr-defined]
    with pytest.raises(RecipeError) as caught:
        recipe.resolve(EMBEDDING, 0.0)
    line = str(caught.value)
    for part in (EMBEDDING, "./a", "weight", "'mlp'", "without a filter"):
        assert part in line


def test_values_that_make_no_sense_together_are_found_at_the_tensor_where_they_meet() -> None:
    """The weights 1 and -1 .. 0 only cancel at t = 0, and 0.5 - 0.5 only where the filter matches."""
    meeting = {"weight": [{"filter": "layers.3", "value": -0.5}, {"value": 1}]}
    source = {
        "merge_method": "linear",
        "models": [{"model": "./a", "parameters": {"weight": 0.5}}, {"model": "./b", "parameters": meeting}],
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert "tensors named like 'layers.3'" in str(caught.value)
    meeting["weight"][0]["value"] = [0, -1, 0]  # meets -0.5 at t = 1/4, between the values that are tried early
    recipe = load_recipe(source)
    recipe.resolve(MLP, 0.5)
    with pytest.raises(RecipeError) as caught:
        recipe.resolve(MLP, 0.25)
    assert MLP in str(caught.value)


@pytest.mark.parametrize("t", [-0.01, 1.01, float("nan")])
def test_a_place_outside_the_layers_is_the_callers_mistake(t: float) -> None:
    with pytest.raises(ValueError, match="t must be in"):
        ties({"weight": 1}).resolve(MLP, t)


def test_a_hundred_thousand_tensors_resolve_in_about_a_second() -> None:
    rules = [{"filter": f"experts.{i}.", "value": [0, 0.5, 1]} for i in range(8)]
    recipe = ties({"weight": [*rules, {"value": [1, 0]}], "density": [0.2, 0.9]})
    names = [(f"model.layers.{i}.mlp.experts.{e}.up_proj.weight", i / 99) for i in range(100) for e in range(1000)]
    began = time.process_time()
    for name, t in names:
        recipe.resolve(name, t)
    assert time.process_time() - began < 2.0


def test_a_hostile_number_of_filters_costs_little() -> None:
    rules = [{"filter": f"f{i}", "value": [0.5] * 50} for i in range(1000)]
    began = time.process_time()
    ties({"weight": [*rules[:999], {"value": 1}], "density": rules[:500]})
    with pytest.raises(RecipeError, match="more than 1,000"):
        ties({"weight": [*rules, {"value": 1}]})
    assert time.process_time() - began < 5.0


def test_rules_that_are_never_reached_are_warned_about() -> None:
    recipe = load_recipe(
        "merge_method: slerp\nbase_model: ./a\nmodels:\n- model: ./b\nparameters:\n  t:\n"
        "  - {filter: mlp, value: 0.1}\n  - {filter: mlp.up, value: 0.2}\n"
        "  - {value: 0.5}\n  - {filter: attn, value: 1}\n"
    )
    assert [w.split(": ")[0] for w in recipe.warnings] == ["recipe:8:5", "recipe:10:5"]
    assert "the filter 'mlp' above it matches first" in recipe.warnings[0]
