"""moe_budget: a budget of expert parameters, divided between the number of experts and their width by trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.arch.moe_config import groups_of, top_k
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.budget import Concentration, promising, splits
from mergekit_lr.experts.narrow import Narrow
from mergekit_lr.experts.problem import Fit, Reduced
from mergekit_lr.experts.refitting import SUMMARY, ExpertRefit, Job, RefitParameters, fit_layers, write_json
from mergekit_lr.experts.regroup import Regroup
from mergekit_lr.method import Source, parameter
from mergekit_lr.rewrite import Preparation


class MoeBudget(ExpertRefit):
    r"""Divide ``keep`` of the expert parameters between expert count E' and width I', ``E' I' <= keep E I``.

    Skewed routing favours dropping experts, balanced routing favours narrowing all of them, and which holds differs
    between models. So: (1) measure each layer's concentration, the shares of ``sum_t g |E_e(x_t)|`` ``[E]`` and of
    neuron energy ``sum_t g^2 h_p^2 ||down_p||^2`` ``[E I]``; (2) of ``candidates`` pairs (E', I') between (E, keep I)
    and (keep E, I), leave out those whose kept shares multiply to much less than the best's; (3) reduce all layers
    for each of the others (`width_shrink` for E' = E, else `neuron_select` at width I') and take the pair with the
    lowest loss on held-out calibration windows.

    All layers get one pair, so the output is stock-loadable. Costs one pass for the shares and one reduction for each
    trial.

    Source: this project; the refit follows least squares as in MergeMoE (arXiv:2510.14436).
    """

    name = "moe_budget"
    summary = "a budget of expert parameters, divided between expert count and width by held-out loss"
    source = Source("this project; related work: MergeMoE", arxiv="2510.14436")

    class Merge(RefitParameters):
        keep: float = parameter(gt=0, le=1, description="share of the expert parameters that is kept")
        multiple: int = parameter(
            8, ge=1, le=1024, description="a new width is a multiple of this; grouped products of bfloat16 need 8"
        )
        candidates: int = parameter(4, ge=2, le=16, description="pairs of expert count and width to consider")

    def shape(self, job: Job, prepared: Path | None) -> tuple[int, int]:
        if prepared is not None and (prepared / SUMMARY).exists():
            chosen = json.loads((prepared / SUMMARY).read_text(encoding="utf-8")).get("chosen")
            if chosen is not None:
                return int(chosen[0]), int(chosen[1])
        return self._pairs(job)[0]

    def _pairs(self, job: Job) -> list[tuple[int, int]]:
        groups = groups_of(job.config, job.first.family)
        found = splits(
            job.first.experts,
            job.first.width,
            job.p.keep,
            multiple=job.p.multiple,
            least=top_k(job.config) or 1,
            count=job.p.candidates,
            groups=groups,
        )
        if not found:
            raise CheckpointError(
                f"no number and width of experts keeps {job.p.keep} of the expert parameters",
                where=job.checkpoint.reference,
                why=f"its layers have {job.first.experts} experts of width {job.first.width}, "
                f"and widths are multiples of {job.p.multiple}",
                fix="give a larger keep, or a smaller multiple",
            )
        return found

    def layers_in(self, job: Job, prepared: Path) -> Path:
        return prepared / _folder(self.shape(job, prepared))

    def fit(self, job: Job) -> Fit:
        return self._fit(job, self._pairs(job)[0])

    def _fit(self, job: Job, pair: tuple[int, int]) -> Fit:
        count, width = pair
        if count == job.first.experts:
            return Narrow(width)
        return Regroup(count, width, groups=groups_of(job.config, job.first.family))

    def find(self, job: Job, work: Preparation) -> None:
        pairs = self._pairs(job)
        if pairs == [(job.first.experts, job.first.width)]:
            write_json(work.folder / SUMMARY, {"chosen": pairs[0]})
            return
        windows = job.windows()
        layers = job.concentrations(windows, work)
        trials: dict[tuple[int, int], dict[str, Any]] = {}
        for pair in promising(pairs, list(layers.values()), job.first.width):
            trials[pair] = fit_layers(job, work, windows, self._fit(job, pair), work.folder / _folder(pair))
        best = min(trials, key=lambda p: trials[p]["held_out"]["mean"]["loss"])
        write_json(
            work.folder / SUMMARY,
            {
                "chosen": best,
                "trials": {_folder(p): t["held_out"]["mean"] for p, t in trials.items()},
                "considered": [list(p) for p in pairs],
                "concentration": {b: _shares(c, job.p.keep) for b, c in layers.items()},
                **trials[best],
            },
        )

    def unseen(self, job: Job, layer: MoeLayer, fit: Any, last: Reduced) -> Reduced:
        if isinstance(fit, Narrow):
            return Reduced(fit.unseen(job.bank(layer)))
        return Reduced(fit.unseen(job.bank(layer), last), last.kept)


def _folder(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _shares(found: Concentration, keep: float) -> dict[str, float]:
    experts, neurons = found.kept(round(keep * len(found.experts)), keep)
    return {"experts": round(experts, 6), "neurons": round(neurons, 6)}
