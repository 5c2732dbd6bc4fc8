"""The YAML reader: core-schema scalars, positions, limits, and a bound on time whatever the input."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe.problems import Mark, Problems
from mergekit_lr.recipe.yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, Mapping, Node, Scalar, Sequence, decode, parse


def read(text: str) -> Node:
    problems = Problems("r.yml")
    root = parse(text, problems)
    problems.raise_if_any()
    assert root is not None
    return root


def plain(node: Node) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Sequence):
        return [plain(i) for i in node.items]
    return {k: plain(e.value) for k, e in node.entries.items()}


def problems_of(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return list(caught.value.problems)


# YAML 1.2.2, table in 10.3.2, and the traps of YAML 1.1 beside it.
SCALARS = [
    ("1e-3", 0.001),
    ("1E3", 1000.0),
    ("-1.5e+2", -150.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("+7", 7),
    ("-0", 0),
    ("010", 10),
    ("0o17", 15),
    ("0x1F", 31),
    ("true", True),
    ("False", False),
    ("TRUE", True),
    ("null", None),
    ("~", None),
    ("", None),
    ("no", "no"),
    ("yes", "yes"),
    ("off", "off"),
    ("y", "y"),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("2026-01-02", "2026-01-02"),
    ("tRUE", "tRUE"),
    ("'1'", "1"),
    ('"true"', "true"),
    ("''", ""),
    (".inf", math.inf),
    ("-.INF", -math.inf),
    ("1e", "1e"),
    ("+.5e1", 5.0),
    ("--1", "--1"),
    ("9" * 401, "9" * 401),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    found = plain(read(f"a: {text}\n"))["a"]
    assert found == value
    assert type(found) is type(value)


def test_nan() -> None:
    assert math.isnan(plain(read("a: .NaN\n"))["a"])


def test_positions_count_from_one_and_belong_to_each_node() -> None:
    root = read("# comment\na:\n  - x\n  -   {b: 2, c: [3]}\n")
    assert isinstance(root, Mapping)
    assert root.mark == Mark(2, 1)
    listed = root.entries["a"].value
    assert isinstance(listed, Sequence)
    assert root.entries["a"].key_mark == Mark(2, 1)
    assert listed.items[0].mark == Mark(3, 5)
    inner = listed.items[1]
    assert isinstance(inner, Mapping)
    assert inner.mark == Mark(4, 7)
    assert inner.entries["c"].key_mark == Mark(4, 14)
    assert inner.entries["c"].value.mark == Mark(4, 17)


def test_columns_count_characters_not_bytes() -> None:
    root = read("{'é€𝛼': x, b: y}\n")
    assert isinstance(root, Mapping)
    assert root.entries["b"].key_mark == Mark(1, 12)


def test_an_alias_repeats_its_anchor() -> None:
    assert plain(read("a: &w {weight: 0.5}\nb: *w\nc: *w\n")) == {key: {"weight": 0.5} for key in "abc"}


REFUSED = [
    ("a: 1\nb: 2\na: 3\n", "r.yml:3:1: the key 'a' is given twice", "line 1"),
    ("a: !!str 5\n", "r.yml:1:4: the tag 'tag:yaml.org,2002:str' is not allowed", "remove the tag"),
    ("a: !x {b: 1}\n", "r.yml:1:4: the tag '!x' is not allowed", ""),
    ("a: 1\n<<: {b: 1}\n", "r.yml:2:1: merge keys (<<)", ""),
    ("a: 1\n---\nb: 2\n", "r.yml:2:1: a second YAML document", "its own file"),
    ("? [1]\n: 2\n", "r.yml:1:3: a key must be a plain word", ""),
    ("a: *b\n", "r.yml:1:4: alias *b has no anchor above it", ""),
    ("a: &a [1, *a]\n", "r.yml:1:11: alias *a refers to the value that it is part of", ""),
    ("a: &a {b: 1}\n*a : 2\n", "r.yml:2:1: a key must be a plain word, not an alias", ""),
    ("a: [1, 2\n", "r.yml:2:1: not valid YAML:", "brackets"),
    ("a: b: c\n", "r.yml:1:5: not valid YAML:", ""),
    ("a:\n\t- b\n", "r.yml:2:1: not valid YAML:", ""),
    ("a: \x01\n", "r.yml: not valid YAML:", ""),
    ("a: \ud800\n", "r.yml:1:4: half of a surrogate pair", ""),
    (f"a: {2**63}\n", "r.yml:1:4: 9223372036854775808 is too large a number", ""),
]


@pytest.mark.parametrize(("text", "start", "inside"), REFUSED)
def test_what_is_refused(text: str, start: str, inside: str) -> None:
    [line] = problems_of(text)
    assert line.startswith(start)
    assert inside in line
    assert "\n" not in line


def test_several_faults_are_all_reported() -> None:
    lines = problems_of("a: !x 1\nb: 1\nb: 2\nc: !y 2\n")
    assert [line.split(":")[1] for line in lines] == ["1", "3", "4"]


def nest(levels: int, opening: str, closing: str) -> str:
    return opening * levels + "x" + closing * levels


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("- ", "")])
def test_depth_is_limited_exactly(opening: str, closing: str) -> None:
    read(nest(MAX_DEPTH, opening, closing))
    assert "deeper than 32 levels" in problems_of(nest(MAX_DEPTH + 1, opening, closing))[0]


def test_depth_counts_through_aliases() -> None:
    """Two values of 20 levels, one inside the other by alias, make 40."""
    half = nest(20, "[", "]")
    text = f"a: &a {half}\nb: " + nest(20, "[", "]").replace("x", "*a") + "\n"
    assert "deeper than 32 levels" in problems_of(text)[0]


def test_nodes_are_limited_exactly() -> None:
    """A list of n values is n + 1 nodes."""
    read("[" + "1," * (MAX_NODES - 1) + "]")
    assert "more than 100,000 values" in problems_of("[" + "1," * MAX_NODES + "]")[0]


def bomb(width: int, levels: int) -> str:
    """width ** levels values once expanded."""
    lines = ["a0: &a0 x"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


def test_aliases_are_counted_expanded() -> None:
    """Level i expands to e_i = 1 + 9 e_(i-1) nodes: 10, 91, 820, 7381, 66430 with e_0 = 1; in all 74734 with the
    keys and the root, below the limit. One level more is not."""
    read(bomb(9, 5))
    assert "more than 100,000 values" in problems_of(bomb(9, 6))[0]


HOSTILE = {
    "alias bomb": bomb(9, 30),
    "open brackets": "[" * 20_000,
    "open braces": "{" * 20_000,
    "dashes": "- " * 100_000,
    "question marks": "? " * 100_000,
    "anchors": "&a " * 100_000,
    "aliases of aliases": "- &a x\n" + "- *a\n" * 150_000,
    "values": "- x\n" * 200_000,
    "keys": "{" + ",".join(f"k{i}: {i}" for i in range(60_000)) + "}",
    "the same key": "{" + "a: b, " * 100_000 + "}",
    "tags": "- !x a\n" * 100_000,
    "quotes": "'" * 1_000_000,
    "backslashes": '"' + "\\" * 999_990,
    "colons": ": " * 300_000,
    "percent signs": "%" * 1_000_000,
    "exclamation marks": "!" * 1_000_000,
    "one long word": "a" * 1_000_000,
    "one long number": "a: " + "9" * 1_000_000,
    "folded lines": "k: >\n" + "\n" * 900_000,
    "commas": "[" + "," * 900_000,
    "too large": "#" * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_costs_little(name: str) -> None:
    """Two seconds are several times what the slowest of these takes; without the limits, minutes or a crash."""
    began = time.process_time()
    problems = Problems("r.yml")
    try:
        parse(HOSTILE[name], problems)
        problems.raise_if_any()
    except RecipeError as e:
        assert len(e.problems) <= 100
    assert time.process_time() - began < 2.0


def test_bytes_that_are_not_text() -> None:
    for data, place in ((b"a: 1\nbc: \xff\n", "r.yml:2:5: byte 0xff is not UTF-8"), (b"\xfe\xff\x00a", "r.yml:1:1:")):
        problems = Problems("r.yml")
        assert decode(data, problems) == ""
        with pytest.raises(RecipeError) as caught:
            problems.raise_if_any()
        assert caught.value.problems[0].startswith(place)
    problems = Problems("r.yml")
    decode(b"#" * (MAX_BYTES + 1), problems)
    assert problems.found


def test_text_that_is_too_large() -> None:
    assert "larger than 1,048,576 bytes" in problems_of("#" * MAX_BYTES + "\n")[0]


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    problems = Problems("r.yml")
    assert plain(parse(decode(b"\xef\xbb\xbfa: 1\n", problems), problems)) == {"a": 1}  # type: ignore[arg-type]


# PyYAML writes these without quotes, as words: they are numbers since YAML 1.2.
NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8).filter(
    lambda w: not NUMBER.fullmatch(w)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words.filter(lambda w: w != "<<"), inner, max_size=4),
    max_leaves=20,
)


@given(values)
@settings(max_examples=300, deadline=None)
def test_what_pyyaml_writes_is_read_back(value: object) -> None:
    """PyYAML's dumper is the independent side; it quotes whatever YAML 1.1 or 1.2 could take for something else."""
    text = pyyaml.safe_dump(value, allow_unicode=True)
    assert plain(read(text)) == value


FRAGMENTS = [
    *("a", "b: ", "- ", "[", "]", "{", "}", "&x ", "*x", "!t ", "'", '"', "\n", "\n  ", "|\n", ">\n", "# "),
    *("? ", ": ", "1e-3", "~", "---\n", "...\n", "%YAML 1.2\n", "<<: ", "\t", "\u2028", "é", "\\x", ", ", "@", "`"),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join) | st.text(max_size=80))
@settings(max_examples=1000, deadline=None)
def test_any_text_gives_nodes_or_problems(text: str) -> None:
    """Never another exception; and PyYAML's own composer, where it accepts the text, finds a document too."""
    problems = Problems("r.yml")
    try:
        root = parse(text, problems)
        problems.raise_if_any()
    except RecipeError as e:
        assert all(line.startswith("r.yml") and "\n" not in line for line in e.problems)
        return
    try:
        expected = pyyaml.compose(text, Loader=pyyaml.SafeLoader)
    except pyyaml.YAMLError:  # its scanner in Python is stricter than libyaml in places, such as tabs
        return
    assert (root is None) == (expected is None)
