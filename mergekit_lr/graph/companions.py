"""Looks up what a method reads beside each model's weights, and says what is missing and how to make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergekit_lr.arch.tied import config_ties, tied_source
from mergekit_lr.checkpoint.companion import CompanionFile, open_companion
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.nodes import Source
from mergekit_lr.method import Call, Companion, Method
from mergekit_lr.recipe import Recipe
from mergekit_lr.recipe.parameters import Gradient

SHOWN = 5


def label(companion: Companion, path: str) -> str:
    """What a companion file is called among the inputs: no model can have this name and be in the recipe too."""
    return f"{companion.parameter}: {path}"


def companion_of(recipe: Recipe) -> Companion | None:
    """What the recipe's method reads beside each model, if anything."""
    return recipe.method.companion if isinstance(recipe.method, Method) else None


def companion_paths(recipe: Recipe) -> tuple[str, ...]:
    """Every companion file that the recipe names, once each, in the order of the models."""
    companion = companion_of(recipe)
    if companion is None:
        return ()
    found: list[str] = []
    for group in recipe.groups:
        for _, table in group.table.models:
            for rule in table.get(companion.parameter, ()):
                found += rule.value.values if isinstance(rule.value, Gradient) else [rule.value]
    return tuple(dict.fromkeys(str(p) for p in found if p is not None))


def open_companions(recipe: Recipe) -> dict[str, Checkpoint]:
    """Those files, opened, by their `label`."""
    companion = companion_of(recipe)
    if companion is None:
        return {}
    opened: dict[str, Checkpoint] = {}
    try:
        for path in companion_paths(recipe):
            opened[label(companion, path)] = open_companion(
                path,
                companion.suffixes,
                what=companion.parameter,
                make=companion.make,
                factored=companion.layout == "same",
            )
    except BaseException:
        for checkpoint in opened.values():
            checkpoint.close()
        raise
    return opened


@dataclass
class Beside:
    """What one tensor's merge reads beside the models. ``rule``: why it reads nothing although it should."""

    call: Call
    sources: tuple[Source, ...] = ()
    whole: int = 0
    rule: str | None = None


@dataclass
class Lookup:
    """Finds companions among the opened inputs; ``missing`` collects, for each file, what it lacks."""

    companion: Companion
    inputs: Mapping[str, Checkpoint]
    models: tuple[str, ...]
    files: tuple[str, ...]
    missing: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def find(self, call: Call, models: Sequence[str], names: Sequence[str]) -> Beside | None:
        """The companions of one tensor, of each of ``models`` by its own name; None after a misfit, which is noted."""
        paths = [str(getattr(m, self.companion.parameter)) for m in call.models]
        sources = [self._source(p, m, n) for p, m, n in zip(paths, models, names, strict=True)]
        lacking = [i for i, s in enumerate(sources) if s is None]
        rule = getattr(call.merge, "missing", "error")
        if len(lacking) == len(sources) and rule != "error":
            return Beside(call, rule=rule)
        for i in lacking:
            self.missing.setdefault(paths[i], []).append(names[i])
        found = [s for s in sources if s is not None]
        fit = [self._fits(call, s) for s in found]
        if lacking or not all(fit):
            return None
        facts = tuple(self._file(p).facts for p in paths)
        whole = sum(self._info(s).numel for s in found) if self.companion.layout != "same" else 0
        return Beside(replace(call, facts=facts), tuple(found), whole)

    def _file(self, path: str) -> CompanionFile:
        opened = self.inputs[label(self.companion, path)]
        assert isinstance(opened, CompanionFile)
        return opened

    def _source(self, path: str, model: str, name: str) -> Source | None:
        present = self._file(path).tensors
        at = len(self.models) + self.files.index(label(self.companion, path))
        if name in present:
            return Source(at, name)
        stand_in = tied_source(name, present) if config_ties(self.inputs[model].config) else None
        return Source(at, stand_in) if stand_in else None

    def _info(self, source: Source) -> TensorInfo:
        return self.inputs[self.files[source.model - len(self.models)]].tensors[source.tensor]

    def _fits(self, call: Call, source: Source) -> bool:
        file = self.files[source.model - len(self.models)]
        found = self._info(source).shape
        wanted = self.companion.shape(call.shape)
        if found == wanted:
            return True
        hint = "make the file again from this very model"
        if "embed" in call.name or "lm_head" in call.name or "wte" in call.name:
            hint = "the vocabulary was resized after training; estimate it again from text, or leave the tensor out"
        self.problems.append(
            f"{file}: the entry of {source.tensor!r} has shape {list(found)} where {list(wanted)} is needed; {hint}"
        )
        return False

    def complaints(self) -> list[str]:
        """Every misfit noted so far, in words."""
        told = list(self.problems)
        for path, names in self.missing.items():
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            told.append(
                f"{self.companion.parameter} {path}: no entry for {len(names)} tensors: {shown}; "
                f"{self.companion.make}, or choose a rule with `missing: mean` or `missing: base` if no model has them"
            )
        return told
