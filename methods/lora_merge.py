"""Merge LoRA adapters into one adapter, in the space of their factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.nodes import Task
from mergekit_lr.lowrank.merged import PairCall, merge_pair, merge_saved
from mergekit_lr.lowrank.merging import Layout
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Kind, Outline, Rewrite


class LoraMerge(Rewrite):
    r"""Merge adapters ``W_i = base + s_i B_i A_i`` of one base into one PEFT adapter; nothing dense is formed.

    For each module, with ``B_i [out, r_i]``, ``A_i [r_i, in]`` and weights w_i, fp64:

    - ``cat``: ``B = [w_1 s_1 B_1 ... ]``, ``A = [A_1; ...]``: exactly ``sum_i w_i s_i B_i A_i``, of rank ``sum r_i``.
    - ``svd``: the nearest pair of rank ``rank`` to that sum, by QR of the stacked factors and a core of order
      ``sum r_i``.
    - ``knots``: ``[s_1 B_1 A_1 ... s_k B_k A_k] = U S [V_1^T ... V_k^T]``; ``rule`` (TIES, DARE, a sum) merges the
      parts ``S V_i^T``, whose entries mean the same in all tasks, with the weights; the result is ``U`` times that.
      Directions with ``sigma <= 1e-5 sigma_1`` are dropped.
    - ``peft_linear``: ``(sum sqrt(w_i s_i) B_i)(sum sqrt(w_i s_i) A_i)``, PEFT's ``linear``, which adds cross terms
      ``B_i A_j`` that no adapter has. For comparison only.

    All but the last are times ``lambda``. Tensors that adapters saved whole become ``base + lambda sum_i w_i (W_i -
    base)``. An adapter without a module counts as zero there, and is named in a warning.

    Source: Stoica et al., "Model merging with SVD to tie the knots", ICLR 2025, arXiv:2410.19735, section 4, for
    ``knots``; the rest is block algebra.
    """

    name = "lora_merge"
    summary = "merge LoRA adapters into one adapter, exactly, in the space of their factors"
    source = Source("Model merging with SVD to tie the knots (KnOTS)", arxiv="2410.19735")
    base = Base.REQUIRED
    kind: ClassVar[Kind] = "adapter"

    class Merge(Parameters):
        combination: Literal["svd", "cat", "knots", "peft_linear"] = parameter(
            "svd", description="how pairs are merged: compressed sum, exact sum, aligned parts, or PEFT's cross terms"
        )
        rank: int | None = parameter(
            None,
            ge=1,
            description="rank of the result with svd and knots; by default the largest of the adapters' ranks with "
            "svd, and everything with knots",
        )
        rule: Literal["ties", "dare_ties", "dare_linear", "task_arithmetic"] = parameter(
            "ties", description="with knots, the method that merges the aligned parts"
        )
        lam: float = parameter(1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged change")
        missing: Literal["zero", "error"] = parameter(
            "zero", description="a module that an adapter lacks counts as unchanged by it, or is an error"
        )
        different_bases: bool = parameter(
            False, description="accept adapters whose configurations name different revisions of the base"
        )

    class PerModel(Parameters):
        weight: float = parameter(allow_inf_nan=False, description="factor on this adapter's change")
        density: float = parameter(
            1.0,
            ge=0,
            le=1,
            description="with knots and a sparse rule, share of the aligned part's entries that is kept",
        )

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        return Layout(recipe, inputs).outline()

    def compute(self, task: Task, desk: Desk) -> None:
        if isinstance(task.call, PairCall):
            merge_pair(task.call, desk)
        else:
            merge_saved(task.call, desk)

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        found = []
        if merge.rank is not None and merge.combination in ("cat", "peft_linear"):
            found.append(f"rank is not used with combination {merge.combination}; remove it, or use svd")
        sparse = merge.combination == "knots" and merge.rule != "task_arithmetic"
        if any(m.density < 1 for m in models) and not sparse:
            found.append("density is used only by knots with ties, dare_ties or dare_linear")
        return found
