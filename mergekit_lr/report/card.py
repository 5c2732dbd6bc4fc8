"""The output's README.md: metadata that the Hub's model tree reads, the method, the recipe, the inputs.

Names of models come from strangers, so nothing is pasted in: metadata goes through a YAML dumper, text is escaped,
and the recipe's fence is longer than any run of backticks in it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.open import exists, local
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.checkpoint.small_files import read_plain
from mergekit_lr.errors import CheckpointError

if TYPE_CHECKING:
    from mergekit_lr.checkpoint.model import Checkpoint
    from mergekit_lr.recipe.schema import Recipe

MAX_README = 1 << 20
_MARKUP = re.compile(r"([\\`*_\[\]|~#@:$!])")


def model_card(recipe: Recipe, inputs: Sequence[Checkpoint]) -> str:
    """The card of a merge as Markdown with YAML front matter.

    ``inputs`` are the opened models by the references of the recipe and its stages: their revisions and licences are
    stated. A
    licence is given only where every input states the same one. Local models appear by their folder's name.
    """
    import yaml

    opened = {c.reference: c for c in inputs}
    references = [r for r in recipe.leaves() if str(r) in opened]
    names = list(dict.fromkeys(display_name(p) for r in references for p in _places(r)))
    metadata: dict[str, Any] = {"base_model": names, "base_model_relation": "merge"}
    if any(c.config is not None for c in inputs):
        metadata["library_name"] = "transformers"
    metadata["tags"] = list(dict.fromkeys(["mergekit_lr", "merge", recipe.merge_method]))
    license_name = _common_license(inputs)
    if license_name:
        metadata["license"] = license_name
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    method = recipe.method
    source = f"[{escape(method.source.title)}](<{method.source.link}>)" if method.source.link else ""
    base = (
        f" Deltas and copied tensors come from {escape(display_name(recipe.base_model.model))}."
        if recipe.base_model
        else ""
    )
    if recipe.stages:
        steps = ", ".join(f"{escape(name)} (`{stage.merge_method}`)" for name, stage in recipe.stages)
        base += f" Its inputs were themselves made in the same run: {steps}."
    rows = [_row(r, opened[str(r)], r == recipe.base_model) for r in references]
    text = _shown_recipe(recipe.text, references)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return "\n".join(
        [
            "---",
            front + "---",
            "",
            f"# Merge of {', '.join(escape(n) for n in names[:4])}{' and others' if len(names) > 4 else ''}",
            "",
            f"Made with mergekit_lr, method `{recipe.merge_method}`: {escape(method.summary)}."
            + (f" Paper: {source}." if source else "")
            + base,
            "",
            "| model | adapter | revision | role |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "## Recipe",
            "",
            "The same text, unabridged, is in `mergekit_lr.yml`; digests of every tensor are in `merge_report.json`.",
            "",
            f"{fence}yaml",
            text.rstrip("\n"),
            fence,
            "",
        ]
    )


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    marked = _MARKUP.sub(r"\\\1", html.escape(printable, quote=False))
    return re.sub(r"(?i)\bwww\.", r"www\\.", marked)


def display_name(place: Place) -> str:
    """A Hub id as it is, a local path by its last part: where it lay on a disk is nobody's business."""
    if is_local(place):
        path = local(place)
        name = path.name or path.resolve().name
        return "".join(c if c.isprintable() else " " for c in name)
    return place.path


def is_local(place: Place) -> bool:
    """It was read from this machine's disk, not from the Hub."""
    return not place.is_hub_id or "/" not in place.path or exists(local(place))


def _places(reference: ModelReference) -> list[Place]:
    return [reference.model] if reference.adapter is None else [reference.model, reference.adapter]


def _row(reference: ModelReference, checkpoint: Checkpoint, is_base: bool) -> str:
    adapter = "" if reference.adapter is None else _linked(reference.adapter, None)
    revision = checkpoint.revision or ("" if is_local(reference.model) else reference.revision or "")
    role = "base" if is_base else "merged"
    return f"| {_linked(reference.model, checkpoint.revision)} | {adapter} | {escape(revision)} | {role} |"


def _linked(place: Place, revision: str | None) -> str:
    name = escape(display_name(place))
    if is_local(place):
        return name
    at = f"/tree/{revision}" if revision else ""
    return f"[{name}](<https://huggingface.co/{place.path}{at}>)"


def _shown_recipe(text: str, references: Sequence[ModelReference]) -> str:
    """The recipe's text with absolute local paths cut to their names."""
    absolute = {p.path for r in references for p in _places(r) if is_local(p) and p.path.startswith(("/", "~"))}
    for path in sorted(absolute, key=len, reverse=True):
        text = text.replace(path, display_name(Place(path)))
    return text


def _common_license(inputs: Sequence[Checkpoint]) -> str | None:
    stated: set[str | None] = set()
    for checkpoint in inputs:
        folders = [checkpoint.folder, getattr(checkpoint, "adapter_folder", None)]
        stated |= {license_of(f) for f in folders if f is not None}
        if checkpoint.folder is None:
            stated.add(None)
    return stated.pop() if len(stated) == 1 else None


def license_of(folder: Path) -> str | None:
    """The licence identifier in a model card's front matter; None if it states none, or one of its own."""
    try:
        head = read_plain(folder, "README.md", most=64 << 20)[:MAX_README].decode("utf-8", "replace")
    except CheckpointError as e:
        if isinstance(e.__cause__, OSError) and not isinstance(e.__cause__, FileNotFoundError):
            raise  # the disk, not the file: what it says is not known
        return None
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", head, re.DOTALL)
    found = re.findall(r"(?m)^license:[ \t]*[\"']?([A-Za-z0-9.+-]{1,64})[\"']?[ \t]*\r?$", front[1]) if front else []
    return found[0] if len(found) == 1 and found[0] != "other" else None
