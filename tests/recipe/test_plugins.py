"""Methods of other distributions: every kind of parameter, and one that fails does not take others with it."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, field_validator, model_validator

from mergekit_lr import registry
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.cli.text import method_lines, table_lines
from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Base, Method, Parameters, Source, parameter
from mergekit_lr.recipe import load_recipe
from mergekit_lr.recipe.catalogue import methods, value_schema
from mergekit_lr.recipe.json_schema import schema


class Side(StrEnum):
    LEFT = "left"
    RIGHT = "right"


def short(text: str) -> str:
    if len(text) > 3:
        raise ValueError("longer than three letters")
    return text


class Everything(Method):
    """One parameter of every kind."""

    name = "everything"
    summary = "for tests"
    source = Source("none", url="https://example.org")
    base = Base.UNUSED

    class Merge(Parameters):
        names: list[str] = Field(default_factory=list, description="a list is one value")
        sides: tuple[Side, ...] = parameter((Side.LEFT,), description="several choices")
        side: Side = parameter(Side.LEFT, description="a choice")
        either: float | Literal["auto"] = parameter("auto", description="a number or a word")
        count: Annotated[int, Field(gt=0, lt=10)] = parameter(1, description="a whole number in a range")
        even: int = parameter(2, description="checked by a function")
        word: str = parameter("w", description="any text")
        brief: Annotated[str, AfterValidator(short)] = parameter("b", description="a text with a check of its own")
        anything: Any = parameter(0, description="anything at all")
        low: float = parameter(0, description="at most high")
        high: float = parameter(1, description="at least low")

        @field_validator("even")
        @classmethod
        def is_even(cls, value: int) -> int:
            if value % 2:
                raise ValueError("must be even")
            return value

        @model_validator(mode="after")
        def in_order(self) -> Everything.Merge:
            if self.low > self.high:
                raise ValueError("low is above high")
            return self

    def merge(self, call: Any, piece: Any, state: Any) -> Any:
        return piece.tensors[0]


class Point:
    """An entry point, as importlib.metadata gives it."""

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.value, self.loaded = name, f"somewhere:{name}", loaded
        self.dist = type("Distribution", (), {"name": "some-plugin", "version": "1.2"})()

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture(autouse=True)
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        Point("everything", Everything),
        Point("broken", ImportError("no module named 'numpi'")),
        Point("no_method", "text"),
    ]

    def entry_points(group: str, name: str | None = None) -> list[Point]:
        return [p for p in points if name in (None, p.name)]

    monkeypatch.setattr("mergekit_lr.registry.entry_points", entry_points)
    monkeypatch.setattr("mergekit_lr.recipe.catalogue.entry_points", entry_points)
    registry.plugin_method.cache_clear()


def everything(**parameters: object) -> Any:
    return load_recipe({"merge_method": "everything", "models": [{"model": "./a"}], "parameters": parameters})


def value(name: str, given: object, t: float = 0.0) -> object:
    return getattr(everything(**{name: given}).resolve("x", t)[0], name)


@pytest.mark.parametrize(
    ("name", "given", "t", "expected"),
    [
        ("names", ["a", "b"], 0.9, ["a", "b"]),
        ("names", [{"filter": "y", "value": ["a"]}, {"value": ["b"]}], 0.0, ["b"]),
        ("sides", ["right", "left"], 0.0, (Side.RIGHT, Side.LEFT)),
        ("side", "right", 0.0, Side.RIGHT),
        ("side", ["left", "right"], 1.0, Side.RIGHT),
        ("either", [0, 1], 0.5, 0.5),
        ("either", ["auto", 1], 0.5, "auto"),
        ("either", ["auto", 1], 1.0, 1),
        ("count", [1, 9], 0.5, 1),
        ("word", "no", 0.0, "no"),
        ("anything", True, 0.0, True),
    ],
)
def test_every_kind_of_value(name: str, given: object, t: float, expected: object) -> None:
    assert value(name, given, t) == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("side", "up", "'up' is not one of left, right; write one of left, right"),
        ("sides", ["left", "up"], "is not one of left, right"),
        ("either", "manual", "'manual' is not one of auto"),
        ("count", 0, "0 is out of range; it must be more than 0"),
        ("count", 10, "10 is out of range; it must be less than 10"),
        ("count", 1.5, "1.5 is not a whole number"),
        ("word", 3, "3 is not a text"),
        ("word", None, "has no value"),
        ("even", 3, "must be even"),
        ("brief", "four", "parameters.brief: 'four': longer than three letters"),
        ("anything", float("inf"), "inf is not a finite number"),
    ],
)
def test_every_kind_of_mistake(name: str, given: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        everything(**{name: given})
    [problem] = caught.value.problems
    assert message in problem


@pytest.mark.parametrize("name", ["count", "low", "anything"])
def test_a_number_that_python_will_not_print(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        everything(**{name: 10**5000})
    assert f"parameters.{name}: a number of thousands of digits is too large a number" in str(caught.value)


def test_a_rule_between_parameters_is_checked_where_they_meet() -> None:
    with pytest.raises(RecipeError, match="low is above high"):
        everything(low=2)
    recipe = everything(low=[0, 1.5, 0, 0], high=[2, 2, 2, 2])
    with pytest.raises(RecipeError, match="low is above high"):
        everything(low=[{"filter": "q", "value": 3}])
    assert recipe.resolve("x", 0.0)[0].low == 0


def test_the_canonical_form_of_every_kind_is_json() -> None:
    recipe = everything(sides=["right"], either=["auto", 1], names=["a"])
    form = json.loads(json.dumps(recipe.canonical()))
    assert form["parameters"]["sides"] == ["right"]
    assert load_recipe(form).digest() == recipe.digest()


def test_a_broken_plugin_is_a_problem_with_a_place() -> None:
    for name, message in (("broken", "no module named 'numpi'"), ("no_method", "is not a merge method")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(f"merge_method: {name}\nmodels: [{{model: a}}]\n")
        [problem] = caught.value.problems
        assert problem.startswith("recipe:1:15: merge_method: ")
        assert message in problem


def test_a_broken_plugin_beside_another_mistake() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("merge_method: broken\ndtpye: float32\nmodels: [{model: a}]\n")
    assert [p.split(": ")[0] for p in caught.value.problems] == ["recipe:1:15", "recipe:2:1"]


def test_broken_plugins_break_nothing_else() -> None:
    assert load_recipe({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]})
    listed = methods()
    assert isinstance(listed, list)
    assert [m["name"] for m in listed][-3:] == ["broken", "everything", "no_method"]
    assert "plug-in, loaded when named (some-plugin 1.2)" in table_lines(listed)[-1]
    assert {"broken", "everything"} <= set(schema()["properties"]["merge_method"]["enum"])


def test_a_plugin_in_full() -> None:
    found = methods("everything")
    assert isinstance(found, dict)
    assert found["origin"] == "some-plugin 1.2"
    lines = method_lines(found)
    for line in (
        "  source   none, https://example.org",
        "  names: a list, default []",
        "  side: one of left, right, default left",
        "  count: a whole number, > 0, < 10, default 1",
        "  anything: a value of its type, default 0",
    ):
        assert line in lines


def test_references_between_schemas_are_resolved() -> None:
    assert value_schema(Everything.Merge, "sides") == {
        "items": {"enum": ["left", "right"], "title": "Side", "type": "string"},
        "type": "array",
    }


def test_python_values_that_stand_for_text() -> None:
    recipe = load_recipe({"merge_method": "passthrough", "models": [{"model": Path("a/b")}]})
    assert load_recipe({"merge_method": "passthrough", "models": [{"model": ModelReference.parse("a/b")}]}) == recipe
    assert recipe.references() == (ModelReference.parse("a/b"),)
