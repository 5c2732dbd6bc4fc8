"""Recipes: what a user asks for, read strictly. Knows nothing of tensors and never imports torch."""

from mergekit_lr.recipe.groups import Group, ModelEntry, Slice
from mergekit_lr.recipe.load import load_recipe
from mergekit_lr.recipe.schema import Recipe

__all__ = ["Group", "ModelEntry", "Recipe", "Slice", "load_recipe"]
