"""Recipes that are meant to exhaust the reader, to construct objects, or to be read in two ways (rows 20, 21)."""

from __future__ import annotations

import re
import time
from pathlib import Path

from staging import attack, main, refused

from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe import load_recipe
from mergekit_lr.registry import builtin_methods

GOOD = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


def rejected(text: str, match: str) -> str:
    builtin_methods()  # the first recipe imports the methods, and torch
    began = time.process_time()
    try:
        load_recipe(text)
    except RecipeError as e:
        assert time.process_time() - began < 2, "it took too long"
        found = [line for line in e.problems if re.search(match, line)]
        assert found and all(line.isprintable() for line in e.problems), f"{match!r} is not in {e.problems}"
        return found[0][:200]
    raise AssertionError("it was accepted")


@attack(20)
def alias_bomb(room: Path) -> str:
    """330 bytes of aliases that expand to 10^9 values"""
    lines = ["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    return rejected("\n".join(lines) + "\n", "more than 100,000 values once aliases are expanded")


@attack(20)
def self_reference(room: Path) -> str:
    """a list that contains itself"""
    return rejected("models: &a [*a]\n", "refers to the value that it is part of")


@attack(20)
def deep(room: Path) -> str:
    """20,000 brackets overflow the stack"""
    return rejected(GOOD + "x: " + "[" * 20_000 + "\n", "nested deeper than 32 levels|exceeded maximum nesting depth")


@attack(20)
def large(room: Path) -> str:
    """a recipe of 50 MB"""
    path = room / "r.yml"
    with path.open("wb") as f:
        f.truncate(50 << 20)
    return refused(lambda: load_recipe(path), "larger than 1,048,576 bytes", kind=RecipeError)


@attack(20)
def python_object(room: Path) -> str:
    """a tag that makes unsafe loaders call os.system"""
    return rejected(GOOD + "x: !!python/object/apply:os.system ['touch canary']\n", "the tag .* is not allowed")


@attack(20)
def python_name(room: Path) -> str:
    """a tag that makes unsafe loaders import a module"""
    return rejected(GOOD + "x: !!python/name:antigravity.fly ''\n", "the tag .* is not allowed")


@attack(20)
def binary(room: Path) -> str:
    """bytes that are not text"""
    path = room / "r.yml"
    path.write_bytes(b"merge_method: \xff\xfe\n")
    return refused(lambda: load_recipe(path), "is not UTF-8", kind=RecipeError)


@attack(20)
def twice(room: Path) -> str:
    """a key that is given twice: a reviewer sees the first, the program takes the second"""
    return rejected("merge_method: linear\nmerge_method: ties\nmodels: []\n", r":2:1: .*given twice")


@attack(20)
def merge_key(room: Path) -> str:
    """a merge key that changes a mapping elsewhere in the file"""
    return rejected("x: &x {merge_method: ties}\n<<: *x\nmodels: []\n", "merge keys")


@attack(20)
def second_document(room: Path) -> str:
    """a second document behind the first, which some readers take instead"""
    return rejected(GOOD + "---\nmerge_method: ties\n", "the second recipe without a name")


@attack(20)
def words_that_were_booleans(room: Path) -> str:
    """no, on and 1:30: words that YAML 1.1 reads as false, true and 90"""
    for word in ("no", "on", "1:30"):
        line = rejected(GOOD.replace("weight: 1", f"weight: {word}"), "weight")
    return line


@attack(20)
def not_a_number(room: Path) -> str:
    """weights of NaN and 1e999, which would spoil every tensor without a word"""
    rejected(GOOD.replace("weight: 1", "weight: 1e999"), "weight")
    return rejected(GOOD.replace("weight: 1", "weight: .nan"), "weight")


@attack(21)
def misspelt(room: Path) -> str:
    """keys that are nearly right, so that a default is taken in silence"""
    line = rejected(GOOD.replace("weight", "wieght"), r":2:\d+.*wieght.*weight")
    rejected(GOOD + "out_dytpe: bfloat16\n", r":3:1: .*out_dytpe.*out_dtype")
    rejected(GOOD + "base_modle: a\n", r":3:1: .*base_modle.*base_model")
    return line


@attack(21)
def unknown_method(room: Path) -> str:
    """a method that does not exist, so that another one is taken"""
    return rejected(GOOD.replace("linear", "linaer"), "linaer.*linear")


@attack(20)
def control_characters(room: Path) -> str:
    """a model whose name writes to the terminal"""
    return rejected('merge_method: linear\nmodels: [{model: "\\e[2Ja"}]\n', "control character")


main(__name__)
