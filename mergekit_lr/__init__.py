"""Merge, shrink and pack models, tensor by tensor, within a memory budget.

Everything public is imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mergekit_lr.bundle.open import open_bundle as open_bundle
    from mergekit_lr.bundle.recover import recover as recover
    from mergekit_lr.calibration.calibrate import calibrate as calibrate
    from mergekit_lr.curvatures.api import curvature as curvature
    from mergekit_lr.curvatures.report import curvature_report as curvature_report
    from mergekit_lr.engine.api import plan as plan
    from mergekit_lr.engine.run import MergeResult as MergeResult
    from mergekit_lr.engine.run import merge as merge
    from mergekit_lr.evaluation import evaluate as evaluate
    from mergekit_lr.experts.api import moe as moe
    from mergekit_lr.fitting import fit_scales as fit_scales
    from mergekit_lr.lowrank.extract import extract_lora as extract_lora
    from mergekit_lr.matching.barrier import barrier as barrier
    from mergekit_lr.recipe import load_recipe as load_recipe
    from mergekit_lr.recipe.json_schema import schema as schema
    from mergekit_lr.recipe.load import check as check
    from mergekit_lr.report.doctor import doctor as doctor
    from mergekit_lr.report.inspect import inspect as inspect
    from mergekit_lr.report.verify import verify as verify
    from mergekit_lr.tokenizer.transplant import transplant as transplant

_HOMES = {
    "merge": "mergekit_lr.engine.run",
    "MergeResult": "mergekit_lr.engine.run",
    "plan": "mergekit_lr.engine.api",
    "check": "mergekit_lr.recipe.load",
    "load_recipe": "mergekit_lr.recipe",
    "schema": "mergekit_lr.recipe.json_schema",
    "open_bundle": "mergekit_lr.bundle.open",
    "recover": "mergekit_lr.bundle.recover",
    "inspect": "mergekit_lr.report.inspect",
    "doctor": "mergekit_lr.report.doctor",
    "verify": "mergekit_lr.report.verify",
    "calibrate": "mergekit_lr.calibration.calibrate",
    "evaluate": "mergekit_lr.evaluation",
    "moe": "mergekit_lr.experts.api",
    "extract_lora": "mergekit_lr.lowrank.extract",
    "barrier": "mergekit_lr.matching.barrier",
    "fit_scales": "mergekit_lr.fitting",
    "curvature": "mergekit_lr.curvatures.api",
    "curvature_report": "mergekit_lr.curvatures.report",
    "transplant": "mergekit_lr.tokenizer.transplant",
}
__all__ = [
    "MergeResult",
    "barrier",
    "calibrate",
    "check",
    "curvature",
    "curvature_report",
    "doctor",
    "evaluate",
    "extract_lora",
    "fit_scales",
    "inspect",
    "load_recipe",
    "merge",
    "open_bundle",
    "plan",
    "recover",
    "schema",
    "transplant",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
