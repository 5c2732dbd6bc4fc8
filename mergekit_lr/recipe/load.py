"""Reads a recipe and reports everything that is wrong with it at once, each with its line and column."""

from __future__ import annotations

import os
from collections.abc import Mapping as AbstractMapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe.problems import Problems, shown
from mergekit_lr.recipe.schema import Recipe
from mergekit_lr.recipe.stages import read_documents
from mergekit_lr.recipe.yaml import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_NODES,
    Document,
    Entry,
    Mapping,
    Node,
    Scalar,
    Sequence,
    decode,
    parse_documents,
)

RecipeSource = str | os.PathLike[str] | AbstractMapping[str, Any] | Recipe


def load_recipe(source: RecipeSource, *, stage: str | None = None) -> Recipe:
    """A checked recipe from a file, from YAML text, from a dict, or from a recipe (given back as it is).

    A string with a line break is YAML text; any other string is the path of a file. No tensor is read and no
    model is looked for. ``stage``: make this one of a file's named recipes instead of its output.

    Raises:
        RecipeError: the recipe is not valid. ``problems`` holds every error as ``file:line:col: path: what; fix``
            (without line and column for a dict).
    """
    if isinstance(source, Recipe):
        return source if stage is None else _chosen(source, stage)
    return read_documents(*read_nodes(source), stage)


Read = tuple[list[Document], Problems, str, Path | None]


def read_nodes(source: str | os.PathLike[str] | AbstractMapping[str, Any]) -> Read:
    """What a file, a text or a dict holds before it is looked at as a recipe: documents, problems, text, file.

    Raises:
        RecipeError: it cannot be read, is no YAML, or is empty.
    """
    if isinstance(source, AbstractMapping):
        return _from_mapping(source)
    if isinstance(source, str) and ("\n" in source or not source):
        problems = Problems("recipe")
        return _from_text(source, problems, None)
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(
            f"a recipe cannot be made from {type(source).__name__}", fix="give a path, YAML text or a dict"
        )
    path = Path(source)
    problems = Problems(str(path))
    text = decode(_read(path), problems)
    problems.raise_if_any()
    return _from_text(text, problems, path)


def _chosen(recipe: Recipe, stage: str) -> Recipe:
    known = dict(recipe.stages)
    if stage not in known:
        fix = f"known here: {', '.join(known) or 'none'}"
        raise RecipeError(f"there is no stage {shown(stage)}", where=str(recipe.origin or "recipe"), fix=fix)
    return known[stage]


def check(recipe: RecipeSource) -> Recipe:
    """`load_recipe` under the name of the command: the recipe alone is checked, no model is opened."""
    return load_recipe(recipe)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError("there is no such recipe", where=str(path), fix="check the path") from None
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else str(e)
        raise RecipeError("cannot read the recipe", where=str(path), why=why or str(e)) from None


def _from_text(text: str, problems: Problems, path: Path | None) -> Read:
    documents = parse_documents(text, problems)
    if not documents:
        problems.raise_if_any()
        problems.fail(None, "", "the recipe is empty", "start with merge_method and models")
    return documents, problems, text, path


def _from_mapping(source: AbstractMapping[str, Any]) -> Read:
    problems = Problems("recipe")
    budget = [MAX_NODES]
    root = _node(source, problems, "", MAX_DEPTH, budget)
    problems.raise_if_any()
    text = yaml.safe_dump(_plain(root), sort_keys=False, allow_unicode=True)
    return [Document(root, 1)], problems, text, None


def _node(value: Any, problems: Problems, path: str, depth: int, budget: list[int]) -> Node:
    """A Python value as the nodes that YAML would have given, without positions."""
    budget[0] -= 1
    if budget[0] < 0 or depth == 0:
        what = f"nested deeper than {MAX_DEPTH} levels" if depth == 0 else f"more than {MAX_NODES:,} values"
        problems.fail(None, path, what)
    if type(value) is int and abs(value) >= MAX_INTEGER:
        problems.fail(None, path, f"{shown(value)} is too large a number", "use one below 2^63")
    if value is None or isinstance(value, bool | int | float | str):
        return Scalar(value, None)
    if isinstance(value, ModelReference | Path):
        return Scalar(str(value), None)
    if isinstance(value, AbstractMapping):
        entries: dict[str, Entry] = {}
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            if not isinstance(key, str):
                problems.add(None, inner, f"a key must be a string, not {type(key).__name__}")
            entries[str(key)] = Entry(None, _node(item, problems, inner, depth - 1, budget))
        return Mapping(entries, None)
    if isinstance(value, list | tuple):
        items = [_node(v, problems, f"{path}[{i}]", depth - 1, budget) for i, v in enumerate(value)]
        return Sequence(items, None)
    problems.add(None, path, f"{type(value).__name__} has no place in a recipe", "use plain Python values")
    return Scalar(None, None)


def _plain(node: Node) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Sequence):
        return [_plain(item) for item in node.items]
    return {key: _plain(entry.value) for key, entry in node.entries.items()}
