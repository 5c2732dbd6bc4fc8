"""Reversible model merging: pack task models as a few shared low-rank factors, recover any of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.nodes import Task
from mergekit_lr.lowrank.bundling import Bundling
from mergekit_lr.lowrank.summary import packing_summary
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Kind, Outline, Preparation, Rewrite

Granularity = Literal["position", "tensor"] | Annotated[int, Field(ge=1)]


class Reversible(Rewrite):
    r"""Reversible model merging: a mean, p basis vectors and coefficients stored in place of n low-rank changes.

    Each task is ``W_i = base + B_i A_i``: an adapter with its scale folded in, or a full fine-tune whose task vector
    is cut to ``rank`` (truncated SVD, split evenly). Pairs are brought to one gauge first, because ``(B G, G^-1 A)`` is
    the same model and another pair. Then every row of B and every column of A (a *position*) is a problem of its own:
    with ``x_i`` the tasks' vectors of length r there,

        mu = mean_i x_i,   V = p leading left singular vectors of [x_i - mu],   c_i = V^T (x_i - mu),

    and ``mu + V c_i`` comes back. This is the optimum (Eckart and Young); it is exact from ``p = min(r, n - 1)`` on.
    Stored share: ``(p (r + n) + r) / (r n)``. With ``granularity: g`` neighbouring g positions share coefficients, with
    ``tensor`` all of them: ``(p + 1) / n``. fp64 Grams of order min(n, g r). The base is not stored, but named by its
    digests; what is no low-rank change (norms, heads, embeddings, new tokens) is stored verbatim for each task.

    Source: Alipour and Amiri, "Towards Reversible Model Merging For Low-rank Weights", arXiv:2510.14163.
    """

    name = "reversible"
    summary = "pack low-rank task models as a mean and a small basis, and give any of them back"
    source = Source("Towards reversible model merging for low-rank weights", arxiv="2510.14163")
    base = Base.REQUIRED
    settings = frozenset({"names"})
    kind: ClassVar[Kind] = "bundle"
    prepares = True

    class Merge(Parameters):
        basis: int | None = parameter(None, ge=0, description="basis vectors p at every position, at most n - 1")
        max_bytes: int | str | None = parameter(
            None, description="instead of basis: most bytes that are stored, such as 20MB; spent where they help most"
        )
        max_error: float | None = parameter(
            None, ge=0, le=1, description="instead of basis: largest relative error of all factors together"
        )
        granularity: Granularity = parameter(
            "position", description="positions that share coefficients: each its own, a number, or a whole tensor"
        )
        rank: int | None = parameter(
            None,
            ge=1,
            description="most components of each task's change; full fine-tunes need it, or energy or ratio",
        )
        energy: float | None = parameter(
            None, gt=0, le=1, description="for full fine-tunes, the smallest ranks that keep this share of the energy"
        )
        ratio: float | None = parameter(
            None, gt=0, le=1, description="for full fine-tunes, rank as a share of a matrix's smaller side"
        )
        gauge: Literal["svd", "aligned"] = parameter(
            "svd", description="svd: each pair's own singular vectors; aligned: then rotated towards the other tasks"
        )
        embeddings: Literal["verbatim", "low_rank"] = parameter(
            "verbatim", description="for full fine-tunes, how changed token embeddings and heads are stored"
        )
        different_bases: bool = parameter(
            False, description="accept adapters whose configurations name different revisions of the base"
        )

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        sizes = [merge.basis, merge.max_bytes, merge.max_error]
        if sum(s is not None for s in sizes) != 1:
            return ["give one of basis, max_bytes and max_error"]
        if merge.energy is not None and merge.ratio is not None:
            return ["give energy or ratio, not both"]
        return []

    def prepare(self, work: Preparation) -> None:
        found = Bundling(work.recipe, work.inputs, None)
        found.prepare_pairs(work)
        if found.merge.basis is None:
            Bundling(work.recipe, work.inputs, work.folder).prepare_spectra(work)

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        return Bundling(recipe, inputs, prepared).outline(self.name)

    def compute(self, task: Task, desk: Desk) -> None:
        from mergekit_lr.lowrank.packing import pack_module

        pack_module(task.call, desk)

    def files(self, recipe: Recipe, report: Mapping[str, Any]) -> dict[str, bytes]:
        return {"packing.json": (json.dumps(packing_summary(report), indent=1) + "\n").encode()}
