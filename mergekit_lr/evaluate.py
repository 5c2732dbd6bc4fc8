"""Held-out loss under the name that scripts import it by; all of it is in `mergekit_lr.evaluation`."""

from __future__ import annotations

from mergekit_lr.evaluation import evaluate, loss_table

__all__ = ["evaluate", "loss_table"]
