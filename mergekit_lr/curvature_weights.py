"""Means weighted by curvature: what every method of the family takes, and what it does with it.

Subclasses choose which of the family's parameters a recipe may set; the others have the values given here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mergekit_lr.combine import weighted_sum
from mergekit_lr.grafting import GraftState, masks_of, model_passes, tensor_passes
from mergekit_lr.method import (
    Base,
    Call,
    Companion,
    Facts,
    Method,
    Missing,
    Parameters,
    Piece,
    Statistics,
    parameter,
)
from mergekit_lr.preconditioned import bias_correction, preconditioned_mean

if TYPE_CHECKING:
    from torch import Tensor

COMPANION = Companion(
    parameter="curvature",
    suffixes=(".exp_avg_sq", ".fisher", ""),
    make="make one from a training checkpoint or from text: mergekit-lr curvature CHECKPOINT OUT.safetensors",
    nonnegative=True,
)
UNLIKE = 1.5
"""Files whose steps or batch sizes differ by more than this factor are remarked upon."""


class CurvatureParameters(Parameters):
    """For the whole merge."""

    epsilon: float = parameter(
        0.0,
        ge=0,
        le=1,
        description="added to every weight, as a share of the model's mean weight in the tensor: 0 leaves entries "
        "without any curvature to the base",
    )
    normalize_curvature: Literal["none", "tensor", "model"] = parameter(
        "none",
        description="divide each model's weights by their mean, over the tensor or over all tensors: evens out batch "
        "sizes, clipping and loss scales that differ between training runs",
    )
    bias_correction: bool = parameter(
        True, description="divide second moments by 1 - beta2^step where their file says both and is not corrected yet"
    )
    fallback: Literal["base", "mean"] = parameter(
        "base",
        description="what an entry gets that no mask kept or that has no curvature in any model: the base's value, or "
        "the plain mean; without a base always the mean",
    )
    missing: Missing = parameter(
        "error",
        description="what becomes of a tensor that no curvature file has: an error, the plain mean, or the base's",
    )


class PerModelCurvature(Parameters):
    """For each model."""

    curvature: str = parameter(
        description="safetensors file of second moments or Fisher diagonals under the weights' names, full or as row "
        "and column sums"
    )
    weight: float = parameter(
        1.0, ge=0, allow_inf_nan=False, description="factor on this model's curvature, above and below the line"
    )


class UnmaskedParameters(CurvatureParameters):
    """For a method that masks nothing: the curvature itself is the weight."""

    power: ClassVar[float] = 1.0
    denominator: ClassVar[str] = "kept"
    density_scope: ClassVar[str] = "model"
    rescale: ClassVar[str] = "none"
    lam: ClassVar[float] = 1.0


class PerModelUnmasked(PerModelCurvature):
    """For each model of such a method."""

    density: ClassVar[float] = 1.0
    threshold: ClassVar[float | None] = None
    scale: ClassVar[float] = 1.0


def remarks_on(calls: Sequence[Call]) -> list[str]:
    """Warnings about curvatures of runs that are unlike each other, or of which too little is known."""
    facts: tuple[Facts, ...] = next((c.facts for c in calls if c.facts), ())
    keys = next((c.keys for c in calls if c.facts), ())
    known = [dict(f) for f in facts]
    told = []
    for key, words in (("step", "training steps"), ("batch_size", "sequences a batch")):
        numbers = [_number(f.get(key)) for f in known]
        given = [n for n in numbers if n]
        if len(given) > 1 and len(given) == len(numbers) and max(given) > UNLIKE * min(given):
            each = ", ".join(f"{k}: {n:g}" for k, n in zip(keys, given, strict=True))
            told.append(
                f"curvatures come from runs of unlike {words} ({each}; ratio {max(given) / min(given):.1f}), so their "
                "scales may not compare; `normalize_curvature: model` evens them out"
            )
    corrected = [bias_correction(f) != 1 or f.get("bias_corrected") == "true" for f in known]
    if any(corrected) and not all(corrected) and calls[0].merge.bias_correction:
        told.append(
            "Adam's bias correction is known for some curvature files and not for others, so their scales differ; "
            "make all of them with mergekit-lr curvature, or set `bias_correction: false`"
        )
    sources = {f.get("source", "") for f in known}
    if "text" in sources and len(sources) > 1:
        told.append(
            "some curvatures are estimated from text and some are an optimizer's: their scales do not compare; "
            "set `normalize_curvature: model`, or estimate all of them"
        )
    return told


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


class CurvatureWeighted(Method):
    """The family. Subclasses set parameter models, name, summary and source."""

    base = Base.OPTIONAL
    companion = COMPANION

    class Merge(CurvatureParameters):
        """Parameters of the whole merge."""

    class PerModel(PerModelCurvature):
        """Parameters of each model."""

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        if any(m.weight > 0 for m in models):
            return []
        return ["every weight is zero, so there is nothing to average; give one model a weight above 0"]

    def misfits(self, call: Call) -> list[str]:
        if call.has_base:
            return []
        asked = [a for a in ("density", "scale") if any(getattr(m, a) != 1 for m in call.models)]
        asked += ["threshold"] if any(m.threshold is not None for m in call.models) else []
        asked += ["lambda"] if call.merge.lam != 1 else []
        return [f"{a} works on task vectors; name a base_model" for a in asked]

    def remarks(self, calls: Sequence[Call]) -> list[str]:
        return remarks_on(calls)

    def model_statistics(self, calls: Sequence[Call]) -> Statistics | None:
        return model_passes(calls)

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return tensor_passes(call, model_state)

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        state = state or GraftState()
        scales = self._scales(call, state)
        mean, divisor = self._mean(call, piece, state, scales if any(s != 1 for s in scales) else None)
        if call.merge.fallback == "mean" or not call.has_base:
            weights = call.values("weight")
            plain = weighted_sum(piece.tensors, [w / math.fsum(weights) for w in weights])
            mean = mean.where(divisor > 0, plain)
        return mean if call.merge.lam == 1 else mean.mul_(call.merge.lam)

    def terms(self, call: Call, piece: Piece, state: Any) -> list[Tensor]:
        """What each model adds to the merged piece; they sum to it but for rounding and where nothing was kept."""
        state = state or GraftState()
        scales = self._scales(call, state)
        one_hot = [[s if i == j else 0.0 for j, s in enumerate(scales)] for i in range(len(scales))]
        return [self._mean(call, piece, state, alone)[0].mul_(call.merge.lam) for alone in one_hot]

    def masks(self, call: Call, piece: Piece, state: Any) -> list[Tensor | None]:
        """Each model's 0/1 mask, None where everything is kept."""
        return masks_of(call, piece, state or GraftState())

    def _scales(self, call: Call, state: GraftState) -> list[float]:
        rescale = state.rescale or [1.0] * len(call.models)
        return [m.scale * r for m, r in zip(call.models, rescale, strict=True)]

    def _mean(self, call: Call, piece: Piece, state: GraftState, scales: list[float] | None) -> tuple[Tensor, Tensor]:
        """The weighted mean and its divisor."""
        merge, weights = call.merge, call.values("weight")
        corrections = [bias_correction(f) if merge.bias_correction else 1.0 for f in call.facts]
        norms = state.norms or [1.0] * len(weights)
        extra, power = piece.extra, merge.power
        if not extra:  # by `missing: mean`: every entry counts alike, and nothing is masked
            extra, power, corrections = piece.tensors, 0.0, [1.0] * len(weights)
        return preconditioned_mean(
            piece.tensors,
            extra,
            power=power,
            shares=[w * c**power / n for w, c, n in zip(weights, corrections, norms, strict=True)],
            scales=scales,
            masks=masks_of(call, piece, state),
            all_in_divisor=merge.denominator == "all",
            epsilons=state.epsilons,
        )
