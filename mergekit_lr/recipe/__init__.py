"""Recipes: what a user asks for, read strictly. Knows nothing of tensors and never imports torch."""

from mergekit_lr.recipe.load import load_recipe
from mergekit_lr.recipe.schema import ModelEntry, Recipe

__all__ = ["ModelEntry", "Recipe", "load_recipe"]
