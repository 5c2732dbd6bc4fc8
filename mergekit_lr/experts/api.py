"""The public ``moe``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lr.engine.run import MergeResult, merge
from mergekit_lr.recipe.moe_file import MoeSource, load_moe
from mergekit_lr.recipe.schema import Recipe


def moe(config: MoeSource | Recipe, out: str | Path, **options: Any) -> MergeResult:
    """Build a mixture of experts as a mergekit-moe file says. ``options`` as in `mergekit_lr.merge`.

    Raises:
        RecipeError: the file is not valid.
        CheckpointError: the models do not fit each other or the mixture.
    """
    return merge(config if isinstance(config, Recipe) else load_moe(config), out, **options)
