"""Statistics of a whole model as JSON, so that another process can read them without unpickling anything.

What a method returns from its model-wide passes is mostly numbers in lists, dicts and dataclasses. Those have a form
here that gives back equal values (floats to the bit). Anything else has none, and whoever needs it computes it again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields, is_dataclass
from typing import Any

KIND = "kind"


class NotPlain(Exception):
    """The value has no form as plain data."""


def to_text(value: Any) -> str:
    """JSON for a value made of None, bool, int, float, str, list, tuple, dict, frozenset and dataclasses.

    Raises:
        NotPlain: some part of it is something else.
    """
    return json.dumps(_encoded(value))


def from_text(text: str) -> Any:
    """The value again.

    Raises:
        NotPlain: it names a class that is not a dataclass of a module that is loaded already.
    """
    return _decoded(json.loads(text))


def _encoded(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_encoded(v) for v in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return {KIND: "tuple", "items": [_encoded(v) for v in value]}
    if isinstance(value, frozenset):
        return {KIND: "frozenset", "items": sorted((_encoded(v) for v in value), key=repr)}
    if isinstance(value, dict):
        return {KIND: "dict", "items": [[_encoded(k), _encoded(v)] for k, v in value.items()]}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        found = {f.name: _encoded(getattr(value, f.name)) for f in fields(value) if f.init}
        if len(found) == len(fields(value)) and "<locals>" not in kind.__qualname__:
            return {KIND: f"{kind.__module__}:{kind.__qualname__}", "fields": found}
    raise NotPlain(type(value).__name__)


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value[KIND]
    if kind == "tuple":
        return tuple(_decoded(v) for v in value["items"])
    if kind == "frozenset":
        return frozenset(_decoded(v) for v in value["items"])
    if kind == "dict":
        return {_decoded(k): _decoded(v) for k, v in value["items"]}
    module, _, name = kind.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise NotPlain(kind)
    return found(**{k: _decoded(v) for k, v in value["fields"].items()})
