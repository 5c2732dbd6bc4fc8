"""OTA: optimizer-aware merging with Fast Fisher Grafting."""

from __future__ import annotations

from typing import Any, Literal

from mergekit_lr.curvature_weights import CurvatureParameters, CurvatureWeighted, PerModelCurvature
from mergekit_lr.method import Source, parameter


class Ota(CurvatureWeighted):
    r"""Curvature-weighted mean of task vectors ``D_i = W_i - base``, each reduced to what its curvature says matters.

    With v_i Adam's second moments (or a Fisher diagonal) of model i, >= 0, the weight's shape:

        s_i = v_i D_i^2                                 m_i = s_i among the largest density_i N (or s_i >= threshold_i)
        P_i = w_i ((c_i v_i)^power + eps_i)             c_i = 1 / (1 - beta2^t) where step and beta2 are known
        out = base + lambda * sum_i m_i P_i a_i D_i / sum_i m_i P_i

    ``denominator: all`` divides by ``sum_i P_i`` (the paper), ``kept`` by what the masks kept (the authors' code). An
    entry that no mask kept stays the base's: this is asked of the masks, never of the size of the divisor. Power 1
    without masks is Fisher merging, power 0 a plain mean of what was kept. Without a base (then without masks) the
    mean is over weights. An entry of saliency zero is never kept unless density is 1, which masks nothing.

    Elementwise in fp32, any shape; the saliency as ``sqrt(v) |D|``, which does not underflow. One look at each tensor;
    density below 1 adds two looks (rarely three) at the tensor, or with ``density_scope: model`` at all tensors.

    Source: OTA merging with Fast Fisher Grafting, 2025, arXiv:2509.11167, and the authors' code.
    """

    name = "ota"
    summary = "task vectors pruned by curvature saliency and averaged with curvature as weights"
    source = Source("OTA merging with Fast Fisher Grafting", arxiv="2509.11167")

    class Merge(CurvatureParameters):
        power: float = parameter(0.5, ge=0, le=1, description="exponent of the curvature in the weights")
        denominator: Literal["kept", "all"] = parameter(
            "kept",
            description="which models' weights divide an entry: those whose mask kept it (the authors' code), or all "
            "(the paper)",
        )
        density_scope: Literal["model", "tensor"] = parameter(
            "model", description="where entries compete: over all tensors of a model together, or within each tensor"
        )
        rescale: Literal["none", "l1", "l2"] = parameter(
            "none", description="scale a masked task vector back to its norm before masking, tensor by tensor"
        )
        lam: float = parameter(
            1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged task vector; needs a base"
        )

    class PerModel(PerModelCurvature):
        density: float = parameter(
            1.0, ge=0, le=1, description="share of the entries that is kept, by saliency; below 1 needs a base"
        )
        threshold: float | None = parameter(
            None, ge=0, description="keep entries with v D^2 at least this, instead of a density; needs a base"
        )
        scale: float = parameter(
            1.0, allow_inf_nan=False, description="factor on this model's task vector, not on its weight; needs a base"
        )

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        found = super().problems(merge, models)
        if any(m.threshold is not None and m.density < 1 for m in models):
            found.append("density and threshold both say what is kept; give a model one of them")
        return found
