"""What mergekit takes without a word: warned about where it is harmless, refused where it is not."""

from __future__ import annotations

import pytest

from mergekit_lr import load_recipe
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.foreign import METHODS, PARAMETERS
from mergekit_lr.registry import builtin_methods, get_method

FUSION = """\
merge_method: arcee_fusion
base_model: ./base
models:
  - model: ./tuned
parameters:
  normalize: true
  int8_mask: true
  rescale: false
dtype: float16
"""


def warned(text: str) -> list[str]:
    return [line.partition(": ")[2] for line in load_recipe(text).warnings]


def test_parameters_of_other_methods_are_said_to_do_nothing() -> None:
    assert [w.partition(":")[0] for w in warned(FUSION)] == [
        "parameters.normalize",
        "parameters.int8_mask",
        "parameters.rescale",
    ]
    assert all("has no effect in arcee_fusion, here as in mergekit; remove it" in w for w in warned(FUSION))


def test_they_change_nothing() -> None:
    plain = FUSION.replace("parameters:\n  normalize: true\n  int8_mask: true\n  rescale: false\n", "")
    assert load_recipe(FUSION).digest() == load_recipe(plain).digest()


@pytest.mark.parametrize("word", ["normalise", "int8mask", "denstiy"])
def test_a_word_that_mergekit_does_not_know_is_an_error(word: str) -> None:
    with pytest.raises(RecipeError, match="unknown parameter"):
        load_recipe(FUSION.replace("normalize", word))


def test_a_method_that_mergekit_does_not_have_takes_only_its_own() -> None:
    recipe = {"merge_method": "wudi", "base_model": "./b", "models": [{"model": "./a"}], "parameters": {"density": 1}}
    with pytest.raises(RecipeError, match="unknown parameter"):
        load_recipe(recipe)


LINEAR = "merge_method: linear\nmodels:\n  - {model: ./a, parameters: {weight: 1}}\n  - {model: ./b%s}\n%s"


@pytest.mark.parametrize(
    "text",
    [
        LINEAR % (", parameters: {weight: 1, density: 0.5}", ""),
        LINEAR % (", parameters: {weight: 1, normalize: true}", ""),
        LINEAR % (", parameters: {weight: 1, normalize: false}", "parameters: {normalize: 0.0}\n"),
        LINEAR % (", parameters: {weight: 1}, density: 0.5", ""),
        LINEAR % (", parameters: {weight: 1}", "int8_mask: true\n"),
        LINEAR % (", parameters: {weight: 1}", "normalize: true\n"),
        LINEAR % (", parameters: {weight: 1}, layer_range: [0, 32]", ""),
    ],
    ids=[
        "another's",
        "the default",
        "the recipe's",
        "beside parameters",
        "int8_mask at the top",
        "default at the top",
        "range",
    ],
)
def test_harmless_where_it_stands(text: str) -> None:
    assert len(warned(text)) == 1
    assert "no effect" in warned(text)[0] or "default" in warned(text)[0]


@pytest.mark.parametrize(
    "text",
    [
        LINEAR % (", weight: 1", ""),
        LINEAR % (", parameters: {weight: 1, normalize: false}", ""),
        LINEAR % (", parameters: {weight: 1, normalize: true}", "parameters: {normalize: false}\n"),
        LINEAR % (", parameters: {weight: 1}", "normalize: false\n"),
        LINEAR % (", parameters: {weight: 1}", "parameters: {random_seed: 3}\n"),
        LINEAR % (", parameters: {weight: 1}", "parameters: {dtype: float16}\n"),
    ],
    ids=["beside parameters", "of a model", "against the recipe's", "at the top", "seed", "dtype"],
)
def test_refused_where_mergekit_drops_a_wish(text: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINEAR % (", parameters: {weight: 1}", "weight: 1\n"), "weight: unknown key; it is a parameter of linear"),
        (LINEAR % (", parameters: {weight: 1}", "normalize: [true]\n"), "normalize: unknown key; it is a parameter"),
        (LINEAR % (", parameters: {weight: 1}", "normalize: maybe\n"), "normalize: unknown key; it is a parameter"),
        (
            LINEAR % (", parameters: {weight: 1, normalize: true}", "parameters: {normalize: [true, true]}\n"),
            "normalize of linear is one for all models: put it under the recipe's `parameters`",
        ),
    ],
    ids=["has no default", "a list", "no such value", "varies in the recipe"],
)
def test_what_may_not_be_the_default_is_not_taken_for_it(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    assert message in caught.value.problems[0]


def test_residual_weight_of_a_slice_does_nothing() -> None:
    sliced = (
        "merge_method: passthrough\nslices:\n  - {sources: [{model: ./a, layer_range: [0, 2]}], residual_weight: 1}\n"
    )
    assert len(warned(sliced)) == 1


def test_a_misplaced_residual_weight_is_an_error() -> None:
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe(LINEAR % (", parameters: {weight: 1}, residual_weight: 1", ""))


def test_every_method_of_mergekit_is_here_with_the_parameters_that_are_listed() -> None:
    assert set(builtin_methods()) >= METHODS
    for name in METHODS:
        method = get_method(name)
        own = {*parameter_fields(method.Merge), *parameter_fields(method.PerModel)}
        additions = {"threshold_scope", "rescale_by", "epsilon_rule", "mass_floor", "norm_floor"}
        assert own - additions <= PARAMETERS, name


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{model: ./a}", ModelReference(Place("./a"))),
        ("{model: {path: org/a, revision: v1}}", ModelReference(Place("org/a", "v1"))),
        ("{model: org/a@v1, lora: ./l}", ModelReference(Place("org/a", "v1"), Place("./l"))),
        (
            "{model: {path: org/a}, lora: {path: org/l, revision: x}}",
            ModelReference(Place("org/a"), Place("org/l", "x")),
        ),
        ("{path: org/a, revision: v1}", ModelReference(Place("org/a", "v1"))),
        ("{model: {path: org/a, revision: null}, lora: null}", ModelReference(Place("org/a"))),
    ],
)
def test_a_model_may_be_a_mapping(written: str, meant: ModelReference) -> None:
    for text in (f"{{model: {written}, parameters: {{weight: 1}}}}",):
        recipe = load_recipe(f"merge_method: linear\nmodels: [{text}]\n")
        assert recipe.models[0].reference == meant
    assert load_recipe(f"merge_method: ram\nmodels: [{{model: ./x}}]\nbase_model: {written}\n").base_model == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{}", "names no model"),
        ("{modle: ./a}", "did you mean 'model'?"),
        ("{model: {revision: v1}}", "has no path"),
        ("{model: {path: org/a, revison: v1}}", "did you mean 'revision'?"),
        ("{model: {path: org/a, revision: 3}}", "must be a branch, a tag or a commit"),
        ("{model: {path: org/a@v1, revision: v2}}", "says its revision twice"),
        ("{model: org/a+org/l}", "names an adapter inside a mapping"),
        ("{path: org/a, lora: ./l}", "unknown key"),
    ],
)
def test_what_is_wrong_with_such_a_mapping(written: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"merge_method: linear\nmodels: [{{model: {written}, parameters: {{weight: 1}}}}]\n")
    assert said in "\n".join(caught.value.problems)


def test_an_architecture_override_has_no_use() -> None:
    text = "merge_method: linear\nmodels: [{model: {model: ./a, override_architecture: X}, parameters: {weight: 1}}]\n"
    assert len(warned(text)) == 1


def test_torch_may_stand_before_a_dtype() -> None:
    assert load_recipe(LINEAR % (", parameters: {weight: 1}", "dtype: torch.bfloat16\n")).dtype == "bfloat16"
