"""Generalised task arithmetic: drop entries of each task vector, weigh, elect signs, add up, scale.

    ``base + lambda * sum_i w_i s_i S(W_i - base)``

with S a rule of `mergekit_lr.sparsify` and s_i its rescaling; with consensus, only entries of the elected
sign are added; with ``normalize`` the sum is divided by the weights that took part. Every method of the
family is a class attribute or two; see the files in ``methods/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mergekit_lr.combine import agreeing_sum, majority, scalar, sum_in_place, summable
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Slicing, Statistics, parameter
from mergekit_lr.sparsify import KeepAll, Sparsifier
from mergekit_lr.statistics import Float64, Sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NO_WEIGHT = 1e-8  # a sum of weights below this divides nothing (as in mergekit)
NO_MASS = 1e-7  # L1 norms below this are not rescaled (as in mergekit)


class CommonParameters(Parameters):
    """What every method of the family takes for the whole merge."""

    normalize: bool = parameter(False, description="divide by the sum of the weights that took part")
    lam: float = parameter(
        1.0,
        alias="lambda",
        allow_inf_nan=False,
        description="factor on the merged task vector, after normalize",
    )
    int8_mask: bool = parameter(
        False,
        description="accepted so that mergekit recipes run unchanged: there it sets how sign masks are "
        "stored; here no masks are stored, so it changes nothing",
    )

    @property
    def rescale_by_l1(self) -> bool:
        """Whether what is left of a task vector is scaled back to its L1 norm."""
        return False

    @property
    def rescale_by_density(self) -> bool:
        """Whether what is left of a task vector is divided by its probability of being kept."""
        return False


class RankedParameters(CommonParameters):
    """For methods that drop by rank of magnitude."""

    rescale: bool = parameter(
        False,
        description="scale what is left of a task vector back to its L1 norm, tensor by tensor: by "
        "sum |D| / sum |D kept|",
    )
    threshold_scope: Literal["tensor", "model"] = parameter(
        "tensor",
        description="where magnitudes compete: within each tensor, or over all tensors of a model together",
    )

    @property
    def rescale_by_l1(self) -> bool:
        return self.rescale


class RandomParameters(CommonParameters):
    """For methods that drop at random."""

    rescale: bool = parameter(True, description="scale what is left of a task vector, by the rule rescale_by")
    rescale_by: Literal["density", "l1"] = parameter(
        "density",
        description="density: divide by the probability of being kept, so that the expected value stays "
        "(the paper); l1: multiply by sum |D| / sum |D kept| of the tensor (mergekit)",
    )

    @property
    def rescale_by_l1(self) -> bool:
        return self.rescale and self.rescale_by == "l1"

    @property
    def rescale_by_density(self) -> bool:
        return self.rescale and self.rescale_by == "density"


class WeightParameters(Parameters):
    """What every method of the family takes for each model."""

    weight: float = parameter(allow_inf_nan=False, description="factor on this model's task vector")


class DensityParameters(WeightParameters):
    """For methods that drop entries."""

    density: float = parameter(1.0, ge=0, le=1, description="share of the task vector's entries that is kept")


@dataclass
class _State:
    rule: Any
    scales: list[float] | None


class TaskVectorMethod(Method):
    """The family. Subclasses set ``rule``, ``consensus``, parameter models, name, summary and source."""

    base = Base.REQUIRED
    exposes_nonfinite = True
    rule: ClassVar[Sparsifier]
    consensus: ClassVar[bool] = False

    class Merge(CommonParameters):
        """Parameters of the whole merge."""

    class PerModel(WeightParameters):
        """Parameters of each model."""

    def slicing(self, merge: Any) -> Slicing:
        return self.rule.slicing

    def model_statistics(self, calls: Sequence[Call]) -> Statistics | None:
        return self.rule.model_statistics(calls)

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        needed = self.rule.statistics(call, model_state)
        if needed is None and not call.merge.rescale_by_l1:
            return None
        return self._passes(call, needed)

    def _passes(self, call: Call, needed: Statistics | None) -> Statistics:
        state = None if needed is None else (yield from needed)
        if not call.merge.rescale_by_l1:
            return _State(state, None)

        def magnitudes(call: Call, piece: Piece) -> list[Tensor]:
            kept = [self.rule.apply(call, piece, state, i).abs_() for i in range(len(piece.tensors))]
            return [x.abs() for x in piece.tensors] + kept

        sums = yield Sum(magnitudes, by_row=self.rule.slicing is Slicing.ROWWISE)
        return _State(state, _l1_ratios(sums))

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        if self.consensus or not isinstance(self.rule, KeepAll) or state is not None:
            return None
        weights = call.values("weight")
        total = sum(weights)
        divisor = total if call.merge.normalize and abs(total) >= NO_WEIGHT else 1.0
        return summable([w * (call.merge.lam / divisor) for w in weights])

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        state = state or _State(None, None)
        weights = call.values("weight")
        parts = []
        for i, weight in enumerate(weights):
            factor = weight * self._scale(call, state, i)
            part = self.rule.apply(call, piece, state.rule, i)
            parts.append(part if factor == 1 else part.mul_(scalar(factor)))
        if not self.consensus:
            total = sum(weights)
            divisor = total if call.merge.normalize and abs(total) >= NO_WEIGHT else 1.0
            return sum_in_place(parts).mul_(scalar(call.merge.lam / divisor))
        shares = weights if call.merge.normalize else None
        merged = agreeing_sum(parts, majority(parts), shares=shares)
        return merged if call.merge.lam == 1 else merged.mul_(scalar(call.merge.lam))

    def _scale(self, call: Call, state: _State, model: int) -> float:
        if state.scales is not None:
            return state.scales[model]
        return self.rule.scale(call, model) if call.merge.rescale_by_density else 1.0


def _l1_ratios(sums: Float64) -> list[float]:
    """``sum |D| / sum |D kept|`` of each model; 1 where either is next to nothing."""
    n = len(sums) // 2
    before, after = (s.tolist() for s in (sums[:n], sums[n:]))
    return [a / b if min(a, b) >= NO_MASS else 1.0 for a, b in zip(before, after, strict=True)]
