"""Chat templates by name, and which one a merge's output gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.recipe.tokens import TEMPLATES
from mergekit_lr.tokenizer.vocabulary import tokenizer_folder

FILE = "chat_template.jinja"


def builtin(name: str) -> str:
    """The text of a template that comes with this package."""
    return (files("mergekit_lr.tokenizer") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def template_of(checkpoint: Checkpoint) -> str | None:
    """A model's own chat template, the default one where it has several; None where it has none."""
    folder = tokenizer_folder(checkpoint)
    if folder is None:
        return None
    if (folder / FILE).is_file():
        return inside(folder, FILE).read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    content = read_json(inside(folder, path.name)) if path.is_file() else {}
    return default_of(content.get("chat_template") if isinstance(content, dict) else None)


def default_of(value: Any) -> str | None:
    """The template in a ``chat_template`` of tokenizer_config.json: a text, or the one called default of several."""
    if isinstance(value, list):
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


def chosen(asked: str, models: Iterable[Checkpoint]) -> str | None:
    """The text that a recipe's ``chat_template`` means; None where it is ``auto`` and no model has one.

    ``auto`` is the one that most of the models have; of equally frequent ones, the first in the recipe's order.
    """
    if asked in TEMPLATES:
        return builtin(asked)
    if asked != "auto":
        return asked
    found = [t.strip() for m in models if (t := template_of(m)) is not None]
    return Counter(found).most_common(1)[0][0] if found else None
