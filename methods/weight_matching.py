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
        data: str | None = parameter(default=None, description="safetensors file with `inputs`, for perceptrons")
        activation: Literal["relu", "gelu", "silu", "tanh"] = parameter(
            default="relu", description="between the layers of a perceptron without config"
        )
        then: str | None = parameter(
            default=None,
            description="method applied to the aligned models instead of t; its parameters stand beside these",
        )

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        found = after.problems(merge, models)
        if merge.data is not None and merge.cost == "weights":
            found.append("data is for matching by activations; set cost to activations or both")
        if merge.then is None and len(models) > 2 and merge.t != 0.5:
            found.append("t is for two models; three or more are averaged")
        return found

    def prepare(self, work: Preparation) -> None:
        from mergekit_lr.matching import align
        from mergekit_lr.matching.saved import saved_choice

        if (work.folder / align.REPORT).exists():
            return
        order = after.aligned_order(work.recipe)
        models = [work.inputs[m] for m in order]
        merge = after.settings(work.recipe, list(models[0].tensors))
        spec, members, report = align.align(
            models,
            work.recipe.permutations,
            seed=merge.seed,
            restarts=merge.restarts,
            only=after.patterns(merge.only),
            to_first=work.recipe.base_model is not None,
            keep=work.limit // 2,
            threads=work.threads,
            tell=work.tell,
            cost=merge.cost,
            record=lambda model, spec: self._recorded(work.recipe, merge, model, spec),
        )
        choice = work.recipe.permutations or "auto"
        if choice.endswith(".safetensors"):
            choice = saved_choice(Path(choice))
        align.write_alignment(work.folder, spec, members, report, models, choice)

    def _recorded(self, recipe: Recipe, merge: Any, model: Checkpoint, spec: Any) -> Any:
        """A model's activations, on text or on data."""
        from mergekit_lr.matching import activations, align, network

        if merge.data is not None:
            read = align.reader(model, 0)
            seen: dict[str, Any] = {}
            inputs = network.read_inputs(Path(merge.data))
            network.perceptron({n: read(n) for n in model.tensors}, inputs, merge.activation, model.reference, seen)
            return seen
        text = recipe.calibration.text if recipe.calibration else ()
        if not text or model.folder is None or recipe.calibration is None:
            raise RecipeError(
                "matching by activations needs something to run on",
                where=str(recipe.origin or "recipe"),
                fix="add `calibration: {text: [FILE]}` for language models, or the parameter `data` for perceptrons",
            )
        c = recipe.calibration
        return activations.record_text(Path(model.folder), spec, text, c.samples, c.sequence_length)

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        from mergekit_lr.matching import align

        order = after.aligned_order(recipe)
        models = [inputs[m] for m in order]
        spec = align.spec_of(recipe.permutations, models[0])
        align.check_inputs(spec, models)
        after.settings(recipe, list(models[0].tensors))
        at = positions(models[0].tensors)
        report: dict[str, Any] = {"uses": {}, "models": []}
        names, extra = list(order), {}
        if prepared is not None:
            report = json.loads((prepared / align.REPORT).read_text(encoding="utf-8"))
            extra["axes"] = open_file(prepared / align.AXES, "axes")
            names.append("axes")
        sinks, tasks = [], []
        out_dtype = recipe.out_dtype or recipe.dtype
        for name, info in models[0].tensors.items():
            if info.dtype not in AVERAGED:
                rule = f"copied: {info.dtype} is not averaged"
                sinks.append(Sink(name, info.dtype, info.shape, Tensor(0, name), rule))
                continue
            sources, moves = [Tensor(0, name)], []
            for i in range(1, len(models)):
                use = report["uses"].get(f"{i}.{name}", {"source": name, "axes": {}})
                sources.append(Tensor(i, use["source"]))
                moves += [(i, int(axis), key) for axis, key in use["axes"].items()]
            first = len(sources)
            keys = list(dict.fromkeys(key for _, _, key in moves))
            sources += [Tensor(len(models), key) for key in keys]
            placed = tuple((i, axis, first + keys.index(key)) for i, axis, key in moves)
            call = (placed, after.call(recipe, name, at[name], order))
            size = 4 * info.numel
            tasks.append(Task(self.name, name, tuple(sources), call, fixed=size * (2 * len(models) + 4)))
            dtype = RECIPE_DTYPES[out_dtype] if out_dtype else info.dtype
            sinks.append(Sink(name, dtype, info.shape, Result(len(tasks) - 1, 0), "merged"))
        said = align.warnings_of(report) if prepared else ["the permutations are not known before the merge"]
        details = {k: v for k, v in report.items() if k != "uses"}
        files = {}
        if prepared is not None:
            files[f"weight_matching/{align.PERMUTATIONS}"] = (prepared / align.PERMUTATIONS).read_bytes()
        return Outline(
            tuple(names), tuple(sinks), tuple(tasks), extra=extra, warnings=tuple(said), details=details, files=files
        )

    def compute(self, task: Task, desk: Desk) -> None:
        from mergekit_lr.lazy import torch
        from mergekit_lr.matching.align import decoded

        moves, how = task.call
        models = [desk.read(i) for i in range(how.models)]
        for i, axis, code in moves:
            models[i] = decoded(models[i], axis, desk.read(code, dtype=torch.int32), models[0])
        desk.write(0, how.merged(models, task.key))
