"""Files of several recipes: which one is the output, what it needs, and what is wrong with a file."""

from __future__ import annotations

import pytest

from mergekit_lr import load_recipe
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import RecipeError

FIRST = "name: first\nmerge_method: linear\nmodels:\n  - {model: ./a, parameters: {weight: 1}}\n"
SECOND = "name: second\nmerge_method: ram\nbase_model: ./base\nmodels:\n  - {model: first}\n  - {model: ./b}\n"
LAST = "merge_method: slerp\nbase_model: first\nmodels:\n  - model: second\nparameters: {t: 0.5}\n"


def joined(*documents: str) -> str:
    return "---\n".join(documents)


def problems(text: str, stage: str | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text, stage=stage)
    return list(caught.value.problems)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_one_without_a_name_is_the_output(order: tuple[int, ...]) -> None:
    recipe = load_recipe(joined(*([FIRST, SECOND, LAST][i] for i in order)))
    assert recipe.merge_method == "slerp"
    assert [name for name, _ in recipe.stages] == ["first", "second"]
    assert [stage.merge_method for _, stage in recipe.stages] == ["linear", "ram"]
    assert [[n for n, _ in stage.stages] for _, stage in recipe.stages] == [[], ["first"]]
    assert [str(r) for r in recipe.leaves()] == ["./a", "./base", "./b"]


def test_where_all_have_names_the_output_is_what_no_other_uses() -> None:
    recipe = load_recipe(joined(FIRST, SECOND))
    assert recipe.merge_method == "ram"
    assert [name for name, _ in recipe.stages] == ["first"]


def test_a_stage_can_be_chosen() -> None:
    text = joined(FIRST, SECOND, LAST)
    assert load_recipe(text, stage="first").stages == ()
    assert [n for n, _ in load_recipe(text, stage="second").stages] == ["first"]
    assert "known here: first, second" in problems(text, "third")[0]
    assert "there is no stage 'x'" in problems(FIRST, "x")[0]


def test_a_stage_of_a_recipe_that_was_read_before_can_be_chosen() -> None:
    recipe = load_recipe(joined(FIRST, SECOND, LAST))
    assert load_recipe(recipe) is recipe
    assert load_recipe(recipe, stage="second").digest() == load_recipe(joined(FIRST, SECOND)).digest()
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, stage="third")
    assert (caught.value.what, caught.value.fix) == ("there is no stage 'third'", "known here: first, second")
    with pytest.raises(RecipeError, match="known here: none"):
        load_recipe(load_recipe(FIRST), stage="first")


def test_a_name_that_is_like_no_stage_is_a_model() -> None:
    recipe = load_recipe(joined(FIRST.replace("./a", "elsewhere"), LAST.replace("second", "./b")))
    assert [str(r) for r in recipe.leaves()] == ["./b", "elsewhere"]


def test_a_mapping_of_stages_is_the_same() -> None:
    recipe = load_recipe(joined(FIRST, SECOND, LAST))
    again = load_recipe(recipe.canonical())
    assert again.digest() == recipe.digest()
    assert again.canonical() == recipe.canonical()
    assert [n for n, _ in again.stages] == ["first", "second"]


def test_the_digest_is_of_all_stages() -> None:
    text = joined(FIRST, SECOND, LAST)
    assert load_recipe(text).digest() != load_recipe(text.replace("weight: 1", "weight: 2")).digest()


def test_a_stage_may_carry_an_adapter() -> None:
    recipe = load_recipe(joined(FIRST, "merge_method: passthrough\nmodels: [{model: first+./lora}]\n"))
    assert recipe.models[0].reference == ModelReference.parse("first+./lora")
    assert [n for n, _ in recipe.stages] == ["first"]


def test_an_unused_recipe_is_said_not_to_be_made() -> None:
    recipe = load_recipe(joined(FIRST, FIRST.replace("first", "spare"), LAST.replace("second", "./b")))
    assert [n for n, _ in recipe.stages] == ["first"]
    assert [w for w in recipe.warnings if "'spare' is not used by the output" in w]


def test_empty_documents_are_nothing() -> None:
    recipe = load_recipe(f"---\n{LAST.replace('first', './a').replace('second', './b')}---\n---\n")
    assert recipe.stages == ()


def test_a_name_alone_in_its_file_has_no_effect() -> None:
    assert "has no effect in a file of one recipe" in load_recipe(FIRST).warnings[0]


def test_a_stage_keeps_its_own_text() -> None:
    recipe = load_recipe(joined(FIRST, SECOND, LAST))
    assert recipe.text == joined(FIRST, SECOND, LAST)
    assert [stage.text.removeprefix("---\n") for _, stage in recipe.stages] == [FIRST, SECOND]


WRONG = {
    joined(FIRST.replace("./a", "second"), SECOND, LAST): "wait for each other: first needs second needs first",
    joined(FIRST.replace("./a", "first"), LAST.replace("second", "./b")): "wait for each other: first needs first",
    joined(FIRST, FIRST, LAST): "'first' is the name of another recipe too",
    joined(LAST.replace("first", "./x"), LAST): "is the second recipe without a name",
    joined(FIRST, FIRST.replace("first", "other")): "more than one output: 'first' and 'other'",
    joined(FIRST, LAST.replace("second", "frist")): "did you mean 'first'?",
    joined(FIRST, LAST.replace("second", "first@v1")): "asks for a revision of a stage",
    joined(FIRST.replace("name: first", "name: [1]"), LAST): "name: a list is no name for a stage",
    joined(FIRST.replace("name: first", "name: ../up"), LAST): "is no name for a stage",
    joined(FIRST, "- 1\n"): "a recipe is a mapping",
    "stages: [1]\n" + LAST: "stages: must be a mapping",
    "stages: {first: 3}\n" + LAST: "stages.first: must be a recipe",
    "stages: {../up: {merge_method: linear}}\n" + LAST: "is no name for a stage",
    "stages: {first: {stages: {}, merge_method: linear, models: [{model: ./a, parameters: {weight: 1}}]}}\n"
    + LAST: "stages.first.stages: unknown key",
}


@pytest.mark.parametrize("text", WRONG, ids=list(WRONG.values()))
def test_what_is_wrong_is_said(text: str) -> None:
    assert any(WRONG[text] in p for p in problems(text))


def test_mistakes_in_all_documents_are_told_at_once_with_their_lines() -> None:
    text = joined(FIRST + "dytpe: float32\n", SECOND + "seed: x\n", LAST + "nonfinite: maybe\n")
    assert [p.split(": ")[:2] for p in problems(text)] == [
        ["recipe:5:1", "dytpe"],
        ["recipe:13:7", "seed"],
        ["recipe:20:12", "nonfinite"],
    ]


def test_many_recipes_are_too_many() -> None:
    text = joined(*(FIRST.replace("first", f"s{i}") for i in range(101)))
    assert "more than 100 recipes in one file" in problems(text)[0]
