"""width_shrink: every expert and the router stay, and each expert keeps the neurons that carry its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.experts.design import Refit
from mergekit_lr.experts.narrow import Narrow, Selection, narrowed_width
from mergekit_lr.experts.problem import Fit, Reduced
from mergekit_lr.experts.refitting import ExpertRefit, Job, RefitParameters
from mergekit_lr.method import Source, parameter


class WidthShrink(ExpertRefit):
    r"""Narrower experts: neurons chosen by pivoted least squares, then all down projections of a layer refitted.

    Expert e, ``E_e(x) = down_e h_e(x)``, ``h = act(gate x) * up x``, keeps ``I' = keep * I`` of its I neurons. With
    ``A = sum_t g_t^2 h_t h_t^T`` ``[I, I]`` over the tokens that the router sends to it (gates ``g_t``) and ``B = A
    down^T`` ``[I, H]``, orthogonal matching pursuit takes in turn the neuron with the largest residual
    ``||B_p||^2 / (A_pp + lam)``. Then ``down`` of all experts solves ``min sum_t ||sum_e g_e(t) down_e h_e(x_t) -
    T_t||^2 + lam ||down - down_0||^2`` with ``T_t = sum_e g_e(t) E_e(x_t)`` of the original layer, in float64, guarded
    by held-out tokens.

    The router is untouched, so every token goes where it went before; a token passes ``keep`` of the parameters.
    Stock-loadable: all layers get one width, a multiple of ``multiple``.

    Source: this project; related to HEAPr (arXiv:2509.22299) and to orthogonal matching pursuit (Pati et al., 1993).
    """

    name = "width_shrink"
    summary = "keep every expert and the router; keep the neurons that matter, refit the down projections"
    source = Source("this project; related work: HEAPr", arxiv="2509.22299")

    class Merge(RefitParameters):
        keep: float = parameter(
            gt=0, le=1, description="share of each expert's neurons that is kept; 1 changes nothing"
        )
        multiple: int = parameter(
            8, ge=1, le=1024, description="a new width is a multiple of this; grouped products of bfloat16 need 8"
        )
        selection: Selection = parameter(
            "pivoted", description="`pivoted`: least squares, one neuron after the other; `energy`: each by itself"
        )
        refit: Refit = parameter(
            "joint", description="`joint`: one system for a layer; `blocks`: expert by expert; `own`; `none`"
        )

    def shape(self, job: Job, prepared: Path | None) -> tuple[int, int]:
        return job.first.experts, narrowed_width(job.first.width, job.p.keep, job.p.multiple)

    def fit(self, job: Job) -> Fit:
        return Narrow(self.shape(job, None)[1], job.p.selection, job.p.refit)

    def unseen(self, job: Job, layer: MoeLayer, fit: Any, last: Reduced) -> Reduced:
        return Reduced(fit.unseen(job.bank(layer)))
