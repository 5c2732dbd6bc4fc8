"""Statistics as text for other machines: equal values come back, and nothing else has a form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.engine.plain import NotPlain, from_text, to_text


@dataclass(frozen=True)
class Threshold:
    name: str
    values: tuple[float, ...]


@dataclass
class Counted:
    total: int
    seen: int = field(default=0, init=False)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.tuples(st.text(), st.integers()) | st.frozensets(st.integers())
plain = st.recursive(
    leaves | st.builds(Threshold, st.text(), st.tuples(st.floats(allow_nan=False))),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner),
)


def same(a: Any, b: Any) -> bool:
    """Equal, of one type all through, zeros of one sign, dicts in one order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, Threshold):
        return same((a.name, a.values), (b.name, b.values))
    return bool(a == b)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_values_come_back_as_they_were(value: Any) -> None:
    assert same(from_text(to_text(value)), value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, 1j, object(), Threshold, [{"deep": (Counted(1),)}]])
def test_what_has_no_form_is_not_written(value: Any) -> None:
    with pytest.raises(NotPlain):
        to_text(value)


def test_a_dataclass_of_a_function_cannot_be_found_again() -> None:
    @dataclass
    class Inner:
        x: int

    with pytest.raises(NotPlain, match="Inner"):
        to_text(Inner(1))


@pytest.mark.parametrize(
    "kind", ["os:system", "subprocess:Popen", "not_loaded:Thing", f"{__name__}:leaves", "builtins:int"]
)
def test_text_makes_nothing_but_dataclasses(kind: str) -> None:
    with pytest.raises(NotPlain, match=kind):
        from_text(json.dumps({"kind": kind, "fields": {}}))
