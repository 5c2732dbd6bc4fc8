"""Reads a model reference: one line of text, or mergekit's mapping of path, revision and adapter."""

from __future__ import annotations

from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe.problems import Problems, nearest
from mergekit_lr.recipe.yaml import Mapping, Node, Scalar

PLACE_KEYS = ("path", "revision")
REFERENCE_KEYS = ("model", "lora", "override_architecture")
SYNTAX = "write PATH_OR_HUB_ID[@REVISION][+ADAPTER], in quotes if needed"


def read_reference(node: Node, path: str, problems: Problems) -> ModelReference | None:
    """The reference at ``path``, or None after a problem, which is noted.

    A mapping is ``{model: PLACE, lora: PLACE}`` or a PLACE itself, each PLACE text or ``{path: ..., revision: ...}``.
    """
    if isinstance(node, Mapping):
        return _from_mapping(node, path, problems)
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        what = "must be text" if isinstance(node, Scalar) else "must be one line of text"
        problems.add(node.mark, path, what, SYNTAX)
        return None
    try:
        return ModelReference.parse(node.value)
    except RecipeError as e:
        problems.add(node.mark, path, e.what, e.fix)
        return None


def _from_mapping(node: Mapping, path: str, problems: Problems) -> ModelReference | None:
    if "path" in node.entries:
        place = _place(node, path, problems)
        return ModelReference(place) if place else None
    for key, entry in node.entries.items():
        if key not in REFERENCE_KEYS:
            problems.add(entry.key_mark, f"{path}.{key[:60]}", "unknown key", nearest(key, REFERENCE_KEYS))
        elif key == "override_architecture" and not _empty(entry.value):
            what = "has no effect: tensors are matched by the names in the files, whatever class loads them"
            problems.warn(entry.key_mark, f"{path}.{key}", what, "remove it")
    model, lora = node.entries.get("model"), node.entries.get("lora")
    if model is None:
        problems.add(node.mark, path, "names no model", "add `model: PATH` or `path: PATH`")
        return None
    place = _place(model.value, f"{path}.model", problems)
    if lora is None or _empty(lora.value):
        return ModelReference(place) if place else None
    adapter = _place(lora.value, f"{path}.lora", problems)
    return ModelReference(place, adapter) if place and adapter else None


def _place(node: Node, path: str, problems: Problems) -> Place | None:
    """``PATH[@REVISION]`` as text, or ``{path: PATH, revision: REVISION}``."""
    if not isinstance(node, Mapping):
        reference = read_reference(node, path, problems)
        if reference is not None and reference.adapter is not None:
            problems.add(node.mark, path, "names an adapter inside a mapping", "put it under `lora`")
            return None
        return reference.model if reference else None
    for key, entry in node.entries.items():
        if key not in PLACE_KEYS:
            problems.add(entry.key_mark, f"{path}.{key[:60]}", "unknown key", nearest(key, PLACE_KEYS))
            return None
    where = node.entries.get("path")
    reference = read_reference(where.value, f"{path}.path", problems) if where else None
    if where is None:
        problems.add(node.mark, path, "has no path", "add `path: PATH_OR_HUB_ID`")
    if reference is None:
        return None
    revision = node.entries.get("revision")
    if revision is None or _empty(revision.value):
        return reference.model
    text = revision.value.value if isinstance(revision.value, Scalar) else None
    if not isinstance(text, str) or not text or "@" in text or "+" in text:
        problems.add(revision.value.mark, f"{path}.revision", "must be a branch, a tag or a commit", "write it as text")
        return None
    if reference.adapter is not None or reference.revision is not None:
        problems.add(node.mark, path, "says its revision twice", "keep one of them")
        return None
    return Place(reference.path, text)


def _empty(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None
