"""What a mergekit recipe means here, and every place where that is not what mergekit 0.1.5 makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mergekit_lr.method import Parameters
from mergekit_lr.recipe.foreign import METHODS
from mergekit_lr.recipe.parameters import Chain, Gradient
from mergekit_lr.recipe.schema import Recipe

RANDOM = frozenset({"dare_linear", "dare_ties", "della", "della_linear"})
SELECTING = frozenset({"ties", "breadcrumbs", "breadcrumbs_ties"})
PAGE = "docs/mergekit.md"


@dataclass(frozen=True)
class Difference:
    """What it is about, what mergekit does, what happens here."""

    about: str
    there: str
    here: str

    def __str__(self) -> str:
        return f"{self.about}: in mergekit {self.there}; here {self.here}"


def differences(recipe: Recipe) -> tuple[Difference, ...]:
    """Every difference that this recipe meets, its stages' too, each once; none that it does not meet."""
    if recipe.merge_method not in METHODS:
        return (Difference("merge_method", f"there is no {recipe.merge_method}", "there is"),)
    found: list[Difference] = []
    for _, stage in recipe.stages:
        found += differences(stage)
    found += _arithmetic(recipe)
    found += _methods(recipe)
    found += _inputs(recipe)
    if recipe.stages:
        there = "every named recipe is kept in a folder, and one that is there is used again whatever the recipe says"
        here = "stages are streamed, or written beside the unfinished output, and gone when it is complete"
        found.append(Difference("stages", there, here))
    return tuple(dict.fromkeys(found))


def _arithmetic(recipe: Recipe) -> Iterator[Difference]:
    if recipe.merge_method != "passthrough" and recipe.dtype != "float32":
        kind = recipe.dtype or "the inputs' dtype"
        there = f"inputs are cast to {kind} and merged in it" if recipe.dtype else f"inputs are merged in {kind}"
        yield Difference("arithmetic", there, "in float32, rounded once at the end")
    if recipe.merge_method == "arcee_fusion" and recipe.output_dtype not in (None, "float32") and not recipe.out_dtype:
        yield Difference("dtype", "Arcee Fusion writes float32", f"{recipe.output_dtype} is written")


def _methods(recipe: Recipe) -> Iterator[Difference]:
    method, densities = recipe.merge_method, set(_values(recipe, "density"))
    sparse = any(d < 1 for d in densities)
    if method in RANDOM and sparse:
        there = "masks come from one stream, and differ from run to run without --random-seed"
        yield Difference("random masks", there, f"from the seed ({recipe.seed}), the model's and the tensor's name")
        if "density" in set(_values(recipe, "rescale_by")):
            there = "what is kept is scaled to the L1 norm of the whole"
            yield Difference("rescale", there, "by 1 / keep probability; `rescale_by: l1` is mergekit's")
    if (method in SELECTING and sparse) or (method == "sce" and any(k < 1 for k in _values(recipe, "select_topk"))):
        yield Difference("equal magnitudes at a threshold", "any of them are kept", "the first ones are")
    if method == "arcee_fusion":
        there = "of a random million entries where a tensor has more, from divergences in the arithmetic's dtype"
        yield Difference("quartiles", there, "exact, from divergences in float64")


def _inputs(recipe: Recipe) -> Iterator[Difference]:
    if recipe.base_model is None and len(recipe.references()) > 1:
        yield Difference("config.json and tokenizer", "those of any input", f"those of {recipe.config_source}")
    if any(r.adapter is not None for r in recipe.references()):
        there = "the adapter is merged by PEFT in the model's dtype and cached"
        yield Difference("adapters", there, "applied in float32 while the model is read, not rounded in between")


def _values(recipe: Recipe, name: str) -> Iterator[Any]:
    """Every value that a parameter takes anywhere in a recipe, defaults included."""
    for group in recipe.groups:
        tables: list[tuple[type[Parameters], Mapping[str, Chain]]] = [(recipe.method.Merge, group.table.merge)]
        tables += [(recipe.method.PerModel, chains) for _, chains in group.table.models]
        for model, table in tables:
            info = next((f for n, f in model.model_fields.items() if (f.alias or n) == name), None)
            if info is None:
                continue
            chain = table.get(name, ())
            for rule in chain:
                yield from rule.value.values if isinstance(rule.value, Gradient) else (rule.value,)
            if not any(rule.filter is None for rule in chain):
                yield info.default


def normalised(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML, under comments that tell the differences. Itself a recipe."""
    found = differences(recipe)
    head = ["# Nothing in this recipe has another meaning here than in mergekit 0.1.5."]
    if found:
        head = [f"# Different from mergekit 0.1.5 ({PAGE}):", *(f"#  - {d}" for d in found)]
    text = yaml.safe_dump(recipe.canonical(), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    return "\n".join(head) + "\n" + text
