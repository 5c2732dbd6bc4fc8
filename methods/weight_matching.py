"""Weight matching: align models that share no base by their symmetries, then interpolate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mergekit_lr.arch.layers import positions
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.graph.nodes import Source as Tensor
from mergekit_lr.matching import after
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Outline, Preparation, Rewrite


class WeightMatching(Rewrite):
    r"""Git Re-Basin: permute (and flip signs in) every model towards the first, then interpolate.

    ``pi = argmax_pi sum_T <A_T, pi(B)_T>`` over the exact symmetries of the family, by coordinate ascent over linear
    assignments; then ``A + t (pi(B) - A)`` for two models, the mean for three or more (MergeMany), or the method named
    by ``then``. ``pi(B)`` computes the same function as B. With a ``base_model``, every model is aligned to it.

    Any shape; assignments and objective in fp64, interpolation in fp32. Raises CheckpointError for models of different
    shapes, a spec that does not cover a tensor, and quantised weights; LinalgError for NaN and infinity.

    Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries",
    https://arxiv.org/abs/2209.04836, algorithms 1 and 2.
    """

    name = "weight_matching"
    summary = "aligns models that share no base by permutations, then interpolates"
    source = Source("Git Re-Basin: Merging Models modulo Permutation Symmetries", arxiv="2209.04836")
    base = Base.OPTIONAL
    min_models = 1
    commutes = False
    prepares = True
    aligns_tokens = True
    settings = frozenset({"permutations", "calibration"})
    followed_by = "then"

    class Merge(Parameters):
        t: float = parameter(default=0.5, ge=0, le=1, description="place between two models: 0 is the first")
        seed: int = parameter(default=0, ge=0, description="order in which groups are visited")
        restarts: int = parameter(default=3, ge=1, le=100, description="orders tried; the best objective is kept")
        only: str | None = parameter(default=None, description="groups that may move, such as `ffn.*, kv.*`")
        cost: Literal["weights", "activations", "both"] = parameter(
            default="weights", description="what is matched; activations are taken on `calibration` text or on `data`"
        )
        data: str | None = parameter(
            default=None, description="file with `inputs` (and `labels`) to run on instead of text"
        )
        activation: Literal["relu", "gelu", "silu", "tanh"] = parameter(
            default="relu", description="between the layers of a perceptron without config"
        )
        matching: Literal["permutation", "learned", "transport"] = parameter(
            default="permutation",
            description="by weights or activations; then learned from the loss half-way; or mixed by optimal transport",
        )
        regularization: float = parameter(
            default=0.05, ge=0, description="how soft transport is, in units of the mean gain; 0 is exact"
        )
        steps: int = parameter(default=200, ge=1, le=100_000, description="steps of `matching: learned`")
        rate: float = parameter(default=0.01, gt=0, description="step size of `matching: learned`")
        reset_statistics: bool = parameter(default=False, description="measure BatchNorm's statistics anew")
        repair: bool = parameter(default=False, description="give every unit the models' mean and variance (REPAIR)")
        then: str | None = parameter(
            default=None,
            description="method applied to the aligned models instead of t; its parameters stand beside these",
        )

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        found = after.problems(merge, models)
        if merge.data is not None and not _runs(merge):
            found.append("data is for matching that runs the models; set cost or matching, or ask for new statistics")
        if merge.then is None and len(models) > 2 and merge.t != 0.5:
            found.append("t is for two models; three or more are averaged")
        if merge.repair and merge.reset_statistics:
            found.append("repair is for networks without BatchNorm, reset_statistics for those with it; choose one")
        return found

    def prepare(self, work: Preparation) -> None:
        from mergekit_lr.checkpoint.writer import write_safetensors
        from mergekit_lr.evaluation import check_memory
        from mergekit_lr.matching import align, axes, mended
        from mergekit_lr.matching.running import samples_of
        from mergekit_lr.matching.saved import saved_choice

        if (work.folder / axes.REPORT).exists():
            return
        recipe = work.recipe
        order = after.aligned_order(recipe)
        models = [work.inputs[m] for m in order]
        merge = _settings(recipe, models)
        if _runs(merge):
            copies = 8 if merge.matching == "learned" else 2 + len(models) if _measures(merge) else 2
            check_memory(models, copies, work.limit, "running the models")
        wanted = align.Wanted(
            matching=merge.matching,
            seed=merge.seed,
            restarts=merge.restarts,
            only=tuple(after.patterns(merge.only)),
            to_first=recipe.base_model is not None,
            cost=merge.cost,
            activation=merge.activation,
            regularization=merge.regularization,
            steps=merge.steps,
            rate=merge.rate,
            keep=work.limit // 2,
            threads=work.threads,
            tell=work.tell,
            samples=lambda model: samples_of(recipe, merge, model),
        )
        aligned = align.align(models, recipe.permutations, wanted)
        if _measures(merge):
            at = positions(models[0].tensors)
            hows = {n: after.call(recipe, n, at[n], order) for n, t in models[0].tensors.items() if t.dtype in AVERAGED}
            found = mended.mended(
                models, aligned, hows, samples_of(recipe, merge, models[0]), activation=merge.activation,
                repair=merge.repair,
            )  # fmt: skip
            write_safetensors(work.folder / mended.MENDED, found)
        choice = recipe.permutations or "auto"
        if choice.endswith(".safetensors"):
            choice = saved_choice(Path(choice))
        axes.write_alignment(work.folder, aligned, models, choice)

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        from mergekit_lr.matching import align, axes, mended
        from mergekit_lr.matching import inputs as fitting

        order = after.aligned_order(recipe)
        models = [inputs[m] for m in order]
        merge = _settings(recipe, models)
        fitting.specs_of(recipe.permutations, models, widths=merge.matching != "transport")
        at = positions(models[0].tensors)
        report: dict[str, Any] = {"uses": {}, "models": []}
        names, extra = list(order), {}
        new: Mapping[str, Any] = {}
        if prepared is not None:
            report = json.loads((prepared / axes.REPORT).read_text(encoding="utf-8"))
            extra["axes"] = open_file(prepared / axes.AXES, "axes")
            names.append("axes")
            if _measures(merge):
                extra["mended"] = open_file(prepared / mended.MENDED, "mended")
                names.append("mended")
                new = extra["mended"].tensors
        sinks, tasks = [], []
        out_dtype = recipe.out_dtype or recipe.dtype
        for name, info in models[0].tensors.items():
            if info.dtype not in AVERAGED:
                rule = f"copied: {info.dtype} is not averaged"
                sinks.append(Sink(name, info.dtype, info.shape, Tensor(0, name), rule))
                continue
            dtype = RECIPE_DTYPES[out_dtype] if out_dtype else info.dtype
            if name in new:
                call: Call = ((), (), None)
                sources, rule = [Tensor(len(models) + 1, name)], "merged, with statistics of the data"
            else:
                sources, moves, mixes = _sources(name, len(models), report["uses"])
                call, rule = (moves, mixes, after.call(recipe, name, at[name], order)), "merged"
            fixed = 4 * info.numel * (2 * len(models) + (8 if call[1] else 4))
            tasks.append(Task(self.name, name, tuple(sources), call, fixed=fixed))
            sinks.append(Sink(name, dtype, info.shape, Result(len(tasks) - 1, 0), rule))
        said = align.warnings_of(report) if prepared else ["the permutations are not known before the merge"]
        details = {k: v for k, v in report.items() if k != "uses"}
        files = {}
        if prepared is not None:
            files[f"weight_matching/{axes.PERMUTATIONS}"] = (prepared / axes.PERMUTATIONS).read_bytes()
        return Outline(
            tuple(names), tuple(sinks), tuple(tasks), extra=extra, warnings=tuple(said), details=details, files=files
        )

    def compute(self, task: Task, desk: Desk) -> None:
        from mergekit_lr.lazy import torch
        from mergekit_lr.matching.axes import placed

        moves, mixes, how = task.call
        if how is None:
            desk.write(0, desk.read(0))
            return
        models = [desk.read(i) for i in range(how.models)]
        for i in range(1, how.models):
            codes = {axis: desk.read(code, dtype=torch.int32) for j, axis, code in moves if j == i}
            plans = {
                axis: (desk.read(plan, dtype=torch.float64), block, reads)
                for j, axis, plan, block, reads in mixes
                if j == i
            }
            models[i] = placed(models[i], codes, plans, models[0])
        desk.write(0, how.merged(models, task.key))


Moves = tuple[tuple[int, int, int], ...]
"""(model, axis, input that holds its code)."""
Mixes = tuple[tuple[int, int, int, int, bool], ...]
"""(model, axis, input that holds the plan, block, whether values come in along it)."""
Call = tuple[Moves, Mixes, after.How | None]


def _sources(name: str, count: int, uses: Mapping[str, Any]) -> tuple[list[Tensor], Moves, Mixes]:
    """The inputs of one tensor's task: it in every model, then the codes and plans of its axes."""
    sources = [Tensor(0, name)]
    moves, mixes = [], []
    for i in range(1, count):
        use = uses.get(f"{i}.{name}", {"source": name, "axes": {}, "mixed": {}})
        sources.append(Tensor(i, use["source"]))
        moves += [(i, int(axis), key) for axis, key in use["axes"].items()]
        mixes += [(i, int(axis), *what) for axis, what in use["mixed"].items()]
    first = len(sources)
    keys = list(dict.fromkeys([*(m[2] for m in moves), *(m[2] for m in mixes)]))
    sources += [Tensor(count, key) for key in keys]
    return (
        sources,
        tuple((i, axis, first + keys.index(key)) for i, axis, key in moves),
        tuple((i, axis, first + keys.index(key), block, reads) for i, axis, key, block, reads in mixes),
    )


def _measures(merge: Any) -> bool:
    return bool(merge.repair or merge.reset_statistics)


def _runs(merge: Any) -> bool:
    """Whether models are run on text or data."""
    return merge.cost != "weights" or merge.matching == "learned" or _measures(merge)


def _settings(recipe: Recipe, models: list[Checkpoint]) -> Any:
    """The parameters of the whole merge.

    Raises:
        RecipeError: one differs between tensors, or there is calibration that nothing uses.
    """
    names = list(models[0].tensors)
    merge = after.settings(recipe, names)
    if merge.repair:  # the moments of whole models are mixed, by one t
        after.settings(recipe, names, varying=("then",))
    if recipe.calibration is not None and not _runs(merge):
        raise RecipeError(
            "calibration is given and no model is run on it",
            where=str(recipe.origin or "recipe"),
            fix="remove it, or set cost, `matching: learned`, repair or reset_statistics",
        )
    return merge
