"""MergeMoE: average gate and up, then fit the down projection to what the members give together."""

from __future__ import annotations

from typing import Any

from mergekit_lr.experts.deciding import Parts
from mergekit_lr.experts.reduction import ExpertReduction, MergingParameters
from mergekit_lr.method import Source, parameter


class MergeMoe(ExpertReduction):
    r"""MergeMoE: merging seen as the merging of outputs.

    The ``num_experts`` most used experts of a layer are centres; each other joins the one whose gate and up matrices
    are nearest in Frobenius norm. With usages ``f_i`` (summing to 1 in a group), gate and up are averaged; with Q the
    members' hidden activations stacked and P those of the averaged expert on the calibration tokens, the down
    projection is ``[f_1 D_1 ... f_k D_k] Q P^+``. That is the least-squares fit ``argmin_D |D P - sum_i f_i E_i(X)|``;
    ``D`` ``[hidden, width]``.

    Here the fit has a ridge towards the averaged ``sum f_i D_i``, in fp64; ``ridge: 0`` is the paper's pseudoinverse.
    All members run on all tokens; ``width^2`` and ``hidden width`` numbers are kept for one group at a time.

    Source: Miao et al., "MergeMoE: Efficient compression of MoE models via expert output merging", 2025,
    arXiv:2510.14436.
    """

    name = "mergemoe"
    summary = "average gate and up of neighbouring experts, fit down by least squares to their averaged outputs"
    source = Source("MergeMoE", arxiv="2510.14436")

    class Merge(MergingParameters):
        ridge: float = parameter(
            1e-6, ge=0, le=1e6, description="pull towards the averaged down projection, relative to the mean diagonal"
        )

    def parts(self, p: Any) -> Parts:
        return Parts(
            score="frequency",
            grouping="nearest",
            features="weights",
            merge="least_squares",
            router=p.router,
            ridge=p.ridge,
        )
