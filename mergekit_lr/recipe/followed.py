"""A method after which another one runs (`Declared.followed_by`) takes the parameters of that one beside its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import create_model

from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Declared, Method, Parameters
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.yaml import Mapping, Node, Scalar, Sequence
from mergekit_lr.registry import get_method


def with_followers(method: Declared, parameters: Node | None) -> Declared:
    """``method`` with the parameters of every method that its parameter ``followed_by`` names in a recipe.

    Where both have a parameter of one name, the recipe's value goes to both, and the range of ``method`` holds. Names
    of no method, and of methods that cannot follow, add nothing: `Declared.problems` says what is wrong with them.
    """
    key = method.followed_by
    entry = parameters.entries.get(key) if key and isinstance(parameters, Mapping) else None
    if entry is None:
        return method
    names = [v for v in _values(entry.value) if isinstance(v, str)]
    return extended(method.name, tuple(dict.fromkeys(names)))


def _values(node: Node) -> Iterator[object]:
    """Every value that a parameter may take: alone, in a gradient, or under filters."""
    if isinstance(node, Scalar):
        yield node.value
    elif isinstance(node, Sequence):
        for item in node.items:
            yield from _values(item)
    elif "value" in node.entries:
        yield from _values(node.entries["value"].value)


@cache
def extended(name: str, followers: tuple[str, ...]) -> Declared:
    """The method ``name`` with the parameters of ``followers``."""
    method = get_method(name)
    others = [m for m in map(_known, followers) if m is not None]
    if not others:
        return method
    cls = type(method)
    merge = _joined(cls.Merge, [type(m).Merge for m in others])
    per_model = _joined(cls.PerModel, [type(m).PerModel for m in others])
    made = type(cls.__name__, (cls,), {"Merge": merge, "PerModel": per_model, "__module__": cls.__module__})
    found = made()
    assert isinstance(found, Declared)
    return found


def _joined(own: type[Parameters], others: list[type[Parameters]]) -> type[Parameters]:
    """The fields of all; the first class that has a name decides what it admits."""
    fields: dict[str, Any] = {}
    names = set(parameter_fields(own))
    for attribute, info in ((a, i) for other in others for a, i in other.model_fields.items()):
        name = info.alias or attribute
        if name not in names:
            names.add(name)
            fields[attribute] = (info.annotation, info)
    return create_model(own.__name__, __base__=own, **fields)


def _known(name: str) -> Method | None:
    try:
        method = get_method(name)
    except RecipeError:
        return None
    return method if isinstance(method, Method) else None
