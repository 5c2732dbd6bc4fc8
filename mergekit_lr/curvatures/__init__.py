"""Curvature of trained models: second moments out of optimizer states, Fisher diagonals out of text, and reports."""

from mergekit_lr.curvatures.api import curvature

__all__ = ["curvature"]
