"""neuron_select: fewer experts, each made of the neurons that its tokens need, whoever had them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.arch.moe_config import groups_of, top_k
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.deciding import Score
from mergekit_lr.experts.design import Refit
from mergekit_lr.experts.problem import Fit, Reduced
from mergekit_lr.experts.refitting import ExpertRefit, Job, RefitParameters
from mergekit_lr.experts.regroup import Likeness, Regroup
from mergekit_lr.method import Source, parameter


class NeuronSelect(ExpertRefit):
    r"""Fewer experts of the same width: real neurons selected from all members of a group, never averaged.

    In each layer the ``num_experts`` experts with the highest score keep their rows of the router; every other expert
    joins the kept one that it is most like. The router without the dropped rows sends token t to kept expert m with
    gate ``G_m(t)``. Candidates of m are the neurons of all its group's members, ``[P, H]``; with ``phi_t = G_m(t)
    h(x_t)`` and what the other experts leave of the layer's output, ``R_t = T_t - sum_{j != m} G_j(t) E'_j(x_t)``:
    ``A = sum phi phi^T``, ``B = sum phi R^T``. Matching pursuit takes I neurons, in turn the one with the largest
    residual ``||B_p||^2 / (A_pp + lam)``; their down columns are the ridge solution ``down^T = down_0^T + (A_SS + lam
    I)^-1 (B_S - A_SS down_0^T)``. A change counts only if held-out tokens agree. All experts in turn, ``sweeps`` times,
    then one joint least-squares fit of all down projections.

    Stock-loadable: the router has the kept rows. ``select: false`` prunes and refits.

    Source: this project; related to DERN (arXiv:2509.10377), HEAPr (arXiv:2509.22299), MergeMoE (arXiv:2510.14436).
    """

    name = "neuron_select"
    summary = "fewer experts, made of real neurons of all members of a group, down projections refitted"
    source = Source("this project; related work: DERN", arxiv="2509.10377")

    class Merge(RefitParameters):
        num_experts: int = parameter(ge=1, description="experts that each layer keeps")
        score: Score = parameter("gated_square", description="who is kept: a score over routed tokens, see `reap`")
        select: bool = parameter(True, description="choose neurons of all members; `false` keeps the experts' own")
        likeness: Likeness = parameter(
            "router", description="what experts are compared by to form groups: router logits, or outputs"
        )
        sweeps: int = parameter(3, ge=1, le=20, description="how often all experts of a layer choose neurons anew")
        refit: Refit = parameter(
            "joint", description="`joint`: one system for a layer; `blocks`: expert by expert; `own`; `none`"
        )

    def shape(self, job: Job, prepared: Path | None) -> tuple[int, int]:
        check_count(job, job.p.num_experts)
        return job.p.num_experts, job.first.width

    def fit(self, job: Job) -> Fit:
        p = job.p
        groups = groups_of(job.config, job.first.family)
        return Regroup(p.num_experts, None, p.score, p.select, p.likeness, p.sweeps, p.refit, groups=groups)

    def unseen(self, job: Job, layer: MoeLayer, fit: Any, last: Reduced) -> Reduced:
        return Reduced(fit.unseen(job.bank(layer), last), last.kept)


def check_count(job: Job, count: int) -> None:
    """Refuse a number of experts that is no reduction, or that the router cannot choose its top k from."""
    ref, now, k = job.checkpoint.reference, job.first.experts, top_k(job.config) or 1
    if count >= now:
        why = f"its layers have {now} experts"
        raise CheckpointError(f"num_experts {count} is not fewer than now", where=ref, why=why, fix="give fewer")
    if count < k:
        raise CheckpointError(
            f"num_experts {count} is below the number of experts that a token is sent to",
            where=ref,
            why=f"its config.json sends each token to {k}",
            fix=f"keep at least {k}",
        )
