"""How the curvatures of a recipe's models overlap, what masks keep, and what each model gives to the merge.

For a recipe of `ota` or `fisher`: one look at weights and curvatures, piece by piece, after the looks that find masks.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergekit_lr.arch.layers import layer_of
from mergekit_lr.curvature_weights import CurvatureWeighted
from mergekit_lr.engine.plan import Plan, planned
from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.nodes import Operation
from mergekit_lr.lazy import torch
from mergekit_lr.method import Call, Pass, Piece
from mergekit_lr.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[np.float64]
OUTSIDE = "outside the layers"


@dataclass
class Tally:
    """Sums over some tensors for n models: everything in the report is a quotient of these.

    ``entries``; ``kept`` and ``given`` ``[n]``: entries that masks kept, and squares of each model's term of the
    merge; over the entries with curvature above zero in every model: ``count``, ``logs`` ``[n]``, ``products [n, n]``.
    """

    entries: int
    kept: Array
    given: Array
    count: int
    logs: Array
    products: Array

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def overlap(self) -> Array:
        """Cosine of the log curvatures, each about its own mean: ``[n, n]``, NaN where one does not vary."""
        n = max(self.count, 1)
        covariance = self.products / n - np.outer(self.logs, self.logs) / n**2
        spread = np.sqrt(np.clip(np.diag(covariance), 0, None))
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = np.clip(covariance / np.outer(spread, spread), -1, 1)
        return found

    def density(self) -> Array:
        found: Array = self.kept / max(self.entries, 1)
        return found

    def contribution(self) -> Array:
        """Each model's share of the squared norm of the terms that add up to the merge."""
        total = float(self.given.sum())
        found: Array = self.given / total if total > 0 else np.zeros_like(self.given)
        return found


@dataclass(frozen=True)
class CurvatureReport:
    """Tallies by layer, by role (``q_proj``, ``norm``) and of the whole; ``models`` in the order of their axes."""

    models: tuple[str, ...]
    layers: dict[str, Tally]
    roles: dict[str, Tally]
    whole: Tally

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Overlaps are matrices over the models, None where curvature does not vary."""

        def shown(t: Tally) -> dict[str, Any]:
            overlap = [[None if math.isnan(v) else round(float(v), 6) for v in row] for row in t.overlap()]
            return {
                "entries": t.entries,
                "overlap": overlap,
                "density": [round(float(v), 6) for v in t.density()],
                "contribution": [round(float(v), 6) for v in t.contribution()],
            }

        return {
            "models": list(self.models),
            "whole": shown(self.whole),
            "layers": {k: shown(t) for k, t in self.layers.items()},
            "roles": {k: shown(t) for k, t in self.roles.items()},
        }

    def lines(self) -> Iterator[str]:
        """The report in words: overlap as the mean over pairs of models, then each model's density and share."""
        yield f"models: {', '.join(self.models)}"
        yield "where: overlap of log curvature; kept of each model; share of the merge of each model"
        parts = [("whole", self.whole), *self.layers.items(), *self.roles.items()]
        for name, t in parts:
            upper = t.overlap()[np.triu_indices(len(self.models), 1)]
            overlap = f"{np.nanmean(upper):.3f}" if upper.size and not np.isnan(upper).all() else "-"
            kept = " ".join(f"{v:.1%}" for v in t.density())
            given = " ".join(f"{v:.1%}" for v in t.contribution())
            yield f"{name}: {overlap}; {kept}; {given}"


@dataclass
class _Look(Pass[Tally, Tally]):
    """Sums over the pieces of one tensor, in fp64."""

    method: CurvatureWeighted
    state: Any

    def map(self, call: Call, piece: Piece) -> Tally:
        n = len(piece.tensors)
        terms = self.method.terms(call, piece, self.state)
        given = np.array([float(t.double().square().sum()) for t in terms])
        masks = self.method.masks(call, piece, self.state)
        size = piece.tensors[0].numel()
        kept = np.array([size if m is None else float(torch.count_nonzero(m)) for m in masks], dtype=np.float64)
        if not piece.extra:
            return Tally(size, kept, given, 0, np.zeros(n), np.zeros((n, n)))
        v = torch.stack([x.reshape(-1) for x in piece.extra]).double()
        logs = v[:, (v > 0).all(0)].log()
        products: Tensor = logs @ logs.T
        return Tally(size, kept, given, logs.shape[1], logs.sum(1).cpu().numpy(), products.cpu().numpy())

    def fold(self, total: Tally | None, partial: Tally) -> Tally:
        return partial if total is None else total + partial

    def finish(self, total: Tally) -> Tally:
        return total


def curvature_report(recipe: Recipe | str | Path | dict[str, Any], *, device: str = "cpu") -> CurvatureReport:
    """Look at what a recipe of `ota` or `fisher` merges. Nothing is written.

    Raises:
        RecipeError: its method does not weigh by curvature.
        CheckpointError: as in `merge`.
    """
    loaded = load_recipe(recipe)
    if not isinstance(loaded.method, CurvatureWeighted):
        raise RecipeError(f"{loaded.merge_method} does not weigh by curvature", fix="give a recipe of ota or fisher")
    with planned(loaded, device=device) as plan, tempfile.TemporaryDirectory(prefix="mergekit_lr-") as folder:
        tallies = dict(_tallies(plan, loaded.method, Path(folder)))
    if not tallies:
        raise RecipeError("the recipe merges no tensor", where=str(loaded.origin or "recipe"))
    layers: dict[str, Tally] = {}
    roles: dict[str, Tally] = {}
    for name, tally in tallies.items():
        place = layer_of(name)
        for table, key in ((layers, f"{place[0]}.{place[1]}" if place else OUTSIDE), (roles, role_of(name))):
            table[key] = table[key] + tally if key in table else tally
    whole = next(iter(tallies.values()))
    for tally in list(tallies.values())[1:]:
        whole = whole + tally
    models = tuple(str(e.reference) for e in loaded.input_models())
    return CurvatureReport(models, layers, roles, whole)


def role_of(name: str) -> str:
    """What a tensor does, by the last word of its name that is no ``weight`` or ``bias``: ``q_proj``, ``norm``."""
    words = [w for w in name.split(".") if w not in ("weight", "bias") and not w.isdigit()]
    return words[-1] if words else name


def _tallies(plan: Plan, method: CurvatureWeighted, folder: Path) -> Iterator[tuple[str, Tally]]:
    from mergekit_lr.engine.artifacts import compute_artifacts
    from mergekit_lr.engine.evaluate import Looks
    from mergekit_lr.engine.execute import Worker
    from mergekit_lr.engine.journal import Journal
    from mergekit_lr.engine.portion import job_of, one_thread_each
    from mergekit_lr.pieces import drive

    job = job_of(plan, folder, Journal(folder / "journal"))
    with one_thread_each(), torch.inference_mode():
        compute_artifacts(plan, job)
        worker = Worker(job)
        for operation in plan.graph.operations:
            looks: Looks = _looks(Looks, worker, method, operation, job.artifacts.get(operation.method))
            state = drive(method.statistics(operation.call, looks.shared), looks.run)
            yield operation.call.name, looks.run(_Look(method, state))


def _looks(kind: Any, worker: Any, method: CurvatureWeighted, operation: Operation, shared: Any) -> Any:
    return kind(worker, method, operation, shared)
