"""Merge, shrink and pack models, tensor by tensor, within a memory budget."""
