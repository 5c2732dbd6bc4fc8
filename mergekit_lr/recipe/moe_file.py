"""A file written for mergekit-moe, read as a recipe of `moe_build`.

``experts`` and ``shared_experts`` become ``models``, what stands beside them becomes their ``parameters``. Every node
keeps its place in the text, so that messages point into the file as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping as AbstractMapping
from typing import Any

from mergekit_lr.recipe.load import read_nodes
from mergekit_lr.recipe.problems import Mark, Problems, nearest
from mergekit_lr.recipe.schema import Recipe
from mergekit_lr.recipe.walk import read_recipe
from mergekit_lr.recipe.yaml import Entry, Mapping, Node, Scalar, Sequence

OF_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
OF_MERGE = ("gate_mode", "experts_per_token", "architecture")
AS_THEY_ARE = ("base_model", "dtype", "out_dtype", "seed", "tokenizer_source", "nonfinite")
ROOT = ("experts", "shared_experts", *OF_MERGE, *AS_THEY_ARE)

MoeSource = str | os.PathLike[str] | AbstractMapping[str, Any]


def load_moe(source: MoeSource) -> Recipe:
    """The recipe that a mergekit-moe file, its text or a dict of the same keys means.

    Raises:
        RecipeError: it is no such file; ``problems`` holds every error with its line and column.
    """
    documents, problems, text, path = read_nodes(source)
    root = documents[0].root
    if len(documents) > 1:
        problems.fail(Mark(documents[1].first, 1), "", "this is a second document", "build one mixture with each file")
    if not isinstance(root, Mapping):
        problems.fail(
            root.mark if root else None,
            "",
            "such a file is a mapping",
            "start with `base_model: ...` and `experts: [...]`",
        )
    if "merge_method" in root.entries:
        fix = "run it with `mergekit-lr merge`"
        problems.fail(root.entries["merge_method"].key_mark, "merge_method", "this is a recipe of its own", fix)
    recipe = _as_recipe(root, problems)
    problems.raise_if_any()
    return read_recipe(recipe, problems, text, path)


def _as_recipe(root: Mapping, problems: Problems) -> Mapping:
    entries = {"merge_method": Entry(root.mark, Scalar("moe_build", root.mark))}
    parameters: dict[str, Entry] = {}
    models: list[Node] = []
    for key, entry in root.entries.items():
        if key in ("experts", "shared_experts"):
            models += _models(key, entry, problems)
        elif key in OF_MERGE:
            if not _absent(entry):
                parameters[key] = entry
        elif key in AS_THEY_ARE:
            entries[key] = entry
        else:
            problems.add(entry.key_mark, key[:60], "unknown key", nearest(key, ROOT))
    if "experts" not in root.entries:
        problems.add(root.mark, "experts", "is missing", "list the models to make experts of")
    entries["models"] = Entry(root.mark, Sequence(models, root.mark))
    entries["parameters"] = Entry(root.mark, Mapping(parameters, root.mark))
    return Mapping(entries, root.mark)


def _absent(entry: Entry) -> bool:
    return isinstance(entry.value, Scalar) and entry.value.value is None


def _models(key: str, entry: Entry, problems: Problems) -> list[Node]:
    if key == "shared_experts" and _absent(entry):
        return []
    if not isinstance(entry.value, Sequence):
        problems.add(entry.value.mark, key, "must be a list", "write each as `- source_model: PATH`")
        return []
    found: list[Node] = []
    for i, item in enumerate(entry.value.items):
        if not isinstance(item, Mapping):
            problems.add(item.mark, f"{key}[{i}]", "must be a mapping", "write `- source_model: PATH`")
            continue
        own: dict[str, Entry] = {}
        parameters: dict[str, Entry] = {}
        for name, value in item.entries.items():
            if name not in OF_EXPERT:
                problems.add(value.key_mark, f"{key}[{i}].{name[:60]}", "unknown key", nearest(name, OF_EXPERT))
            elif name == "source_model":
                own["model"] = value
            elif not _absent(value):
                parameters[name] = value
        if "model" not in own:
            problems.add(item.mark, f"{key}[{i}]", "names no source_model", "add `source_model: PATH`")
        if key == "shared_experts":
            parameters["shared"] = Entry(item.mark, Scalar(True, item.mark))
        own["parameters"] = Entry(item.mark, Mapping(parameters, item.mark))
        found.append(Mapping(own, item.mark))
    return found
