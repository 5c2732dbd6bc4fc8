"""A method's parameters as a recipe may set them: names, types, ranges, and errors in plain words."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mergekit_lr.method import Parameters
from mergekit_lr.recipe.problems import shown

_COLLECTIONS = (list, tuple, set, frozenset, dict)


@dataclass(frozen=True)
class ParameterField:
    """One field of a parameter model under the name that recipes use (the alias where it has one)."""

    name: str
    attribute: str
    info: FieldInfo
    admits: frozenset[type]

    @property
    def required(self) -> bool:
        return self.info.is_required()

    @property
    def default(self) -> Any:
        """The default; None for a required parameter."""
        return None if self.required else self.info.get_default(call_default_factory=True, validated_data={})

    @property
    def takes_lists(self) -> bool:
        """A list is one value of this parameter, so it cannot be a gradient over layers."""
        return any(issubclass(kind, _COLLECTIONS) for kind in self.admits)

    def interpolates(self, values: tuple[Any, ...]) -> bool:
        """A list of these values runs smoothly over the layers; other lists choose one of their values."""
        return float in self.admits and all(type(v) in (int, float) for v in values)

    def coerce(self, value: Any) -> Any:
        """``value`` in the field's own type.

        Raises:
            ValueError: it is not of that type, out of range or not finite; says so in a few words.
        """
        if value is None and type(None) in self.admits:
            return None
        if type(value) is bool and bool not in self.admits and object not in self.admits:
            raise ValueError(f"{str(value).lower()} is not {self.kind()}; write {self.kind()}")
        try:
            result = _adapter(self).validate_python(value)
        except ValidationError as e:
            raise ValueError(_in_words(e.errors()[0], value, self.kind())) from None
        if isinstance(result, float) and not math.isfinite(result):
            raise ValueError(f"{shown(value)} is not a finite number; write a finite one")
        return result

    def kind(self) -> str:
        """The type in words, for messages."""
        for literal in _literals(self.info.annotation):
            return f"one of {literal}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        named = [w for t, w in words.items() if t in self.admits and not (t is int and float in self.admits)]
        if self.takes_lists:
            named.append("a list")
        return " or ".join(named) or "a value of its type"


@cache
def parameter_fields(model: type[Parameters]) -> Mapping[str, ParameterField]:
    """Fields of a parameter model by the name that recipes use."""
    found = {}
    for attribute, info in model.model_fields.items():
        name = info.alias or attribute
        found[name] = ParameterField(name, attribute, info, frozenset(_admitted(info.annotation)))
    return types.MappingProxyType(found)


_ADAPTERS: dict[int, tuple[FieldInfo, TypeAdapter[Any]]] = {}


def _adapter(field: ParameterField) -> TypeAdapter[Any]:
    """Validator of one field, built when first used; keyed by identity because FieldInfo has no hash."""
    known = _ADAPTERS.get(id(field.info))
    if known is None:
        kind: Any = field.info.annotation
        for limit in field.info.metadata:
            kind = Annotated[kind, limit]
        known = (field.info, TypeAdapter(kind))
        _ADAPTERS[id(field.info)] = known
    return known[1]


def _admitted(annotation: Any) -> set[type]:
    """The plain types that an annotation lets through."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _admitted(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(_admitted(a) for a in get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if isinstance(origin, type):
        return {origin}
    if annotation is float:
        return {float, int}
    if isinstance(annotation, type) and annotation is not Any:
        return {str} if issubclass(annotation, Enum) and issubclass(annotation, str) else {annotation}
    return {object}


def _literals(annotation: Any) -> list[str]:
    """The choices of a Literal or an Enum inside an annotation, as one text; empty where there is none."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [", ".join(str(v) for v in get_args(annotation))]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [", ".join(str(m.value) for m in annotation)]
    return [text for a in get_args(annotation) for text in _literals(a)]


def _in_words(error: ErrorDetails, value: Any, kind: str) -> str:
    """``what; fix`` for pydantic's complaint about one value."""
    context = error.get("ctx", {})
    limits = {
        "greater_than_equal": ("ge", "at least"),
        "greater_than": ("gt", "more than"),
        "less_than_equal": ("le", "at most"),
        "less_than": ("lt", "less than"),
    }
    if error["type"] in limits:
        key, words = limits[error["type"]]
        return f"{shown(value)} is out of range; it must be {words} {context[key]:g}"
    if error["type"] == "finite_number":
        return f"{shown(value)} is not a finite number; write a finite one"
    if error["type"] == "value_error":
        return f"{shown(value)}: {context.get('error', error['msg'])}"
    return f"{shown(value)} is not {kind}; write {kind}"
