"""Finds methods: the built-in package first, then other distributions' entry points, by name and lazily."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import ModuleType

from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Declared, Method
from mergekit_lr.rewrite import Rewrite

GROUP = "mergekit_lr.methods"


def methods_in(module: ModuleType) -> list[type[Declared]]:
    """Concrete methods that ``module`` itself defines."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Declared)
        and value.__module__ == module.__name__
        and isinstance(getattr(value, "name", None), str)
    ]


@cache
def builtin_methods() -> dict[str, Declared]:
    """Every method of ``mergekit_lr.methods``, by name, sorted."""
    package = importlib.import_module("mergekit_lr.methods")
    found: dict[str, Declared] = {}
    for info in pkgutil.iter_modules(package.__path__):
        for cls in methods_in(importlib.import_module(f"{package.__name__}.{info.name}")):
            found[cls.name] = cls()
    return dict(sorted(found.items()))


@cache
def _by_file_name(name: str) -> Declared | None:
    """The built-in method in the file of its own name: one import instead of all."""
    if not name.isidentifier() or find_spec(f"mergekit_lr.methods.{name}") is None:
        return None
    module = importlib.import_module(f"mergekit_lr.methods.{name}")
    return next((cls() for cls in methods_in(module) if cls.name == name), None)


@cache
def plugin_method(name: str) -> Declared | None:
    """A method that another installed distribution offers under ``name``; only that one is imported."""
    for point in entry_points(group=GROUP, name=name):
        loaded = point.load()
        if isinstance(loaded, type) and issubclass(loaded, Declared):
            return loaded()
        raise RecipeError(
            f"entry point {point.value!r} is not a merge method",
            where=f"distribution {point.dist.name if point.dist else '?'}",
            why=f"it gives {type(loaded).__name__}, not a subclass of mergekit_lr.method.Declared",
            fix="mend or uninstall that distribution",
        )
    return None


def method_names() -> list[str]:
    """Names of every method, plug-ins included, without importing the plug-ins."""
    plugins = {p.name for p in entry_points(group=GROUP)} - {"builtin"}
    return sorted(set(builtin_methods()) | plugins)


def get_method(name: str) -> Declared:
    """The method called ``name``; RecipeError with the nearest names where there is none."""
    method = _by_file_name(name) or builtin_methods().get(name) or plugin_method(name)
    if method is None:
        near = difflib.get_close_matches(name, method_names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`mergekit-lr methods` lists them"
        raise RecipeError(f"there is no merge method {name!r}", fix=hint)
    return method


def tensor_method(name: str) -> Method:
    """The method of an `Operation`."""
    method = get_method(name)
    assert isinstance(method, Method), f"{name} does not work on single tensors"
    return method


def rewrite(name: str) -> Rewrite:
    """The method of a `Task`."""
    method = get_method(name)
    assert isinstance(method, Rewrite), f"{name} lays out no output of its own"
    return method
