"""PLeaS: align two models, merge the neurons that match, keep the others, refit every linear layer by least squares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.graph.nodes import Source as Tensor
from mergekit_lr.matching import after
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Outline, Preparation, Rewrite

WIDTHS = ("intermediate_size", "d_ff", "ffn_dim")
"""Keys of a config that say how wide its feed-forward layers are."""
MERGED = "merged.safetensors"


class Pleas(Rewrite):
    r"""Permutations and least squares: a network whose layers give what the two models' layers give, on data.

    B is aligned to A by weight matching. With budget r, a group of n neurons becomes ``m = round(r n)``: the best
    ``2 n - m`` matched pairs are merged, the rest of both kept. Then for every linear layer, W and b minimise

        sum_samples ||W x + b - y||^2 + ridge mean(diag X^T X) ||(W, b) - (W, b)_0||^2

    x and y: what goes in and comes out, the mean of both models for a merged neuron, one model's own for a kept one;
    ``W_0``: the aligned mean (kept rows as they were). All other tensors are aligned and averaged. fp64; whole models
    in memory. Raises CheckpointError for models that do not fit each other or cannot be run, RecipeError without data.

    Source: Nasery, Hayase, Koh, Oh, "PLeaS: Merging Models with Permutations and Least Squares",
    https://arxiv.org/abs/2407.02447, sections 3.1 and 3.2.
    """

    name = "pleas"
    summary = "aligns two models, keeps neurons that do not match, refits linear layers on data"
    source = Source("PLeaS: Merging Models with Permutations and Least Squares", arxiv="2407.02447")
    base = Base.UNUSED
    min_models = 2
    max_models = 2
    commutes = False
    prepares = True
    settings = frozenset({"permutations", "calibration"})

    class Merge(Parameters):
        budget: float = parameter(default=1.0, ge=1, le=2, description="width of the output; 2 keeps every neuron")
        ridge: float = parameter(default=1e-3, gt=0, description="pull towards the aligned mean")
        seed: int = parameter(default=0, ge=0, description="order in which groups are visited")
        restarts: int = parameter(default=3, ge=1, le=100, description="orders tried; the best objective is kept")
        cost: Literal["weights", "activations", "both"] = parameter(default="weights", description="what is matched")
        data: str | None = parameter(default=None, description="file with `inputs` to run on instead of `calibration`")
        activation: Literal["relu", "gelu", "silu", "tanh"] = parameter(
            default="relu", description="between the layers of a perceptron without config"
        )

    def prepare(self, work: Preparation) -> None:
        from mergekit_lr.checkpoint import fs
        from mergekit_lr.checkpoint.writer import write_safetensors
        from mergekit_lr.evaluation import check_memory
        from mergekit_lr.matching import align, axes, refitted
        from mergekit_lr.matching.running import samples_of
        from mergekit_lr.matching.saved import save_members, saved_choice

        if (work.folder / axes.REPORT).exists():
            return
        recipe = work.recipe
        order = after.aligned_order(recipe)
        models = [work.inputs[m] for m in order]
        merge = after.settings(recipe, list(models[0].tensors), varying=())
        check_memory(models, 6, work.limit, "refitting")
        wanted = align.Wanted(
            seed=merge.seed,
            restarts=merge.restarts,
            cost=merge.cost,
            activation=merge.activation,
            keep=work.limit // 3,
            threads=work.threads,
            tell=work.tell,
            samples=lambda model: samples_of(recipe, merge, model),
        )
        aligned = align.align(models, recipe.permutations, wanted)
        widths = _widths(aligned.specs[0], models[0], merge.budget)
        budgets = dict.fromkeys(widths, merge.budget)
        samples = samples_of(recipe, merge, models[0])
        tensors, layers = refitted.refitted(models, aligned, samples, budgets, merge.ridge, merge.activation)
        write_safetensors(work.folder / MERGED, tensors)
        choice = recipe.permutations or "auto"
        save_members(
            work.folder / axes.PERMUTATIONS, aligned.members, order, family=aligned.specs[0].family,
            permutations=saved_choice(Path(choice)) if choice.endswith(".safetensors") else choice,
        )  # fmt: skip
        text = json.dumps({**aligned.report, "refitted": layers, "widths": widths}, indent=1)
        fs.write_file(work.folder / f"{axes.REPORT}.partial", text.encode())
        fs.rename(work.folder / f"{axes.REPORT}.partial", work.folder / axes.REPORT)

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        from mergekit_lr.matching import align, axes
        from mergekit_lr.matching.inputs import specs_of
        from mergekit_lr.matching.pleas import widened_shape

        order = after.aligned_order(recipe)
        models = [inputs[m] for m in order]
        merge = after.settings(recipe, list(models[0].tensors), varying=())
        _check(recipe, merge, models)
        spec = specs_of(recipe.permutations, models)[0]
        widths = _widths(spec, models[0], merge.budget)
        report: dict[str, Any] = {"models": [], "refitted": []}
        names, extra, files = list(order), {}, {}
        if prepared is not None:
            report = json.loads((prepared / axes.REPORT).read_text(encoding="utf-8"))
            extra["merged"] = open_file(prepared / MERGED, "merged")
            names.append("merged")
            files[f"pleas/{axes.PERMUTATIONS}"] = (prepared / axes.PERMUTATIONS).read_bytes()
        refits = {f"{layer}.{part}" for layer in report["refitted"] for part in ("weight", "bias")}
        sinks, tasks = [], []
        for name, info in models[0].tensors.items():
            if info.dtype not in AVERAGED:
                rule = f"copied: {info.dtype} is not averaged"
                sinks.append(Sink(name, info.dtype, info.shape, Tensor(0, name), rule))
                continue
            shape = widened_shape(spec, name, info.shape, widths)
            rule = "refitted" if name in refits else "aligned and averaged"
            tasks.append(Task(self.name, name, (Tensor(len(models) if extra else 0, name),), (), fixed=8 * info.numel))
            dtype = RECIPE_DTYPES[recipe.output_dtype] if recipe.output_dtype else info.dtype
            sinks.append(Sink(name, dtype, shape, Result(len(tasks) - 1, 0), rule))
        said = align.warnings_of(report) if prepared else ["what is refitted is not known before the merge"]
        return Outline(
            tuple(names), tuple(sinks), tuple(tasks), extra=extra, warnings=tuple(said), details=report, files=files,
            config=_config(models[0], widths),
        )  # fmt: skip

    def compute(self, task: Task, desk: Desk) -> None:
        desk.write(0, desk.read(0))


def _check(recipe: Recipe, merge: Any, models: list[Checkpoint]) -> None:
    from mergekit_lr.matching.vocabulary import row_map

    if merge.data is None and recipe.calibration is None:
        raise RecipeError(
            "there is nothing to run the models on",
            where=str(recipe.origin or "recipe"),
            fix="add `calibration: {text: [FILE]}` for language models, or the parameter `data` for others",
        )
    if row_map(models[0], models[1]) is not None:
        raise CheckpointError(
            "its tokenizer is not that of the first model",
            where=models[1].reference,
            why="the two must give something for the same tokens",
            fix="use weight_matching, which puts token rows in one order",
        )


def _width_key(model: Checkpoint) -> str | None:
    return next((k for k in WIDTHS if type((model.config or {}).get(k)) is int), None)


def _widths(spec: SymmetrySpec, model: Checkpoint, budget: float) -> dict[str, int]:
    """The new widths: of every hidden layer of a plain network, of the feed-forward layers that a config counts.

    Raises:
        CheckpointError: the config counts none.
    """
    if budget == 1:
        return {}
    groups = {n: g.size for n, g in spec.groups.items() if g.parent is None and not spec.children(n)}
    if model.config is not None:
        key = _width_key(model)
        size = None if key is None else model.config[key]
        groups = {n: s for n, s in groups.items() if n.startswith("ffn") and s == size}
    if not groups or any(t.stack for n in groups for t in spec.of_group[n]):
        raise CheckpointError(
            "the model cannot be made wider",
            where=model.reference,
            why=f"its config has none of {', '.join(WIDTHS)} that is the width of plain feed-forward layers",
            fix="set `budget: 1`",
        )
    return {n: round(budget * s) for n, s in groups.items()}


def _config(model: Checkpoint, widths: Mapping[str, int]) -> dict[str, Any] | None:
    key = _width_key(model)
    if model.config is None or key is None or not widths:
        return None
    return {**model.config, key: next(iter(widths.values()))}
