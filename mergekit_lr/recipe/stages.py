"""Recipes of several stages: what one document makes, another may name as a model.

A file may hold several YAML documents, each a recipe, with a ``name:`` that the others use as a model reference (as
mergekit-multi reads them), in any order. The one without a name is the output; where all have one, it is the only one
that no other uses. The same may be written as one document with a mapping ``stages:`` from names to recipes. Either way
there is one `Recipe`, whose ``stages`` are those that it needs, each after those that it needs itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe.problems import Mark, Problems, shown
from mergekit_lr.recipe.schema import Recipe
from mergekit_lr.recipe.walk import read_recipe
from mergekit_lr.recipe.yaml import Document, Node, Scalar, said
from mergekit_lr.recipe.yaml import Mapping as MappingNode

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
MAX_STAGES = 100


@dataclass
class _Written:
    """One recipe as it is written: its name if it has one, its nodes without that, its text, where it begins."""

    name: str | None
    root: MappingNode
    text: str
    mark: Mark | None


def read_documents(
    documents: Sequence[Document], problems: Problems, text: str, origin: Path | None, output: str | None = None
) -> Recipe:
    """One recipe out of all documents of a file. ``output``: the stage to make, where it is not the file's own.

    Raises:
        RecipeError: with all problems of all documents.
    """
    written: list[_Written] = []
    for document in documents:
        written += _stages_of(document, problems, text)
    if len(written) == 1 and output is None:
        only = written[0]
        if only.name is not None:
            what = "has no effect in a file of one recipe: no other could refer to it"
            problems.warn(only.mark, "name", what, "remove it")
        return read_recipe(only.root, problems, text, origin)
    if len(written) > MAX_STAGES:
        problems.fail(written[MAX_STAGES].mark, "", f"more than {MAX_STAGES} recipes in one file", "split the file")
    _distinct(written, problems)
    recipes: list[Recipe | None] = []
    for one in written:
        try:
            recipes.append(read_recipe(one.root, problems, one.text, origin))
        except RecipeError:  # noted; the other documents are looked at too
            recipes.append(None)
    problems.raise_if_any()
    read = [r for r in recipes if r is not None]
    return _Chain(written, read, problems, text).output(output)


def _stages_of(document: Document, problems: Problems, text: str) -> list[_Written]:
    """A document, and before it the recipes of its ``stages``."""
    root = document.root
    assert root is not None
    if not isinstance(root, MappingNode):
        problems.fail(root.mark, "", "a recipe is a mapping", "start with `merge_method: ...`")
    lines = text.splitlines(keepends=True)
    own = "".join(lines[document.first - 1 : None if document.end is None else document.end - 1])
    found: list[_Written] = []
    nested = root.entries.get("stages")
    if nested is not None and not _null(nested.value):
        if not isinstance(nested.value, MappingNode):
            problems.fail(nested.value.mark, "stages", "must be a mapping", "write `NAME: {merge_method: ...}`")
        for name, entry in nested.value.entries.items():
            if not isinstance(entry.value, MappingNode):
                problems.fail(entry.value.mark, f"stages.{name[:60]}", "must be a recipe", "give it a merge_method")
            for key in {"name", "stages"} & entry.value.entries.keys():
                mark = entry.value.entries[key].key_mark
                problems.add(mark, f"stages.{name[:60]}.{key}", "unknown key", "stages stand beside each other")
            found.append(_Written(name, entry.value, own, entry.key_mark))
    rest = {key: entry for key, entry in root.entries.items() if key not in ("name", "stages")}
    mark = root.entries["name"].value.mark if "name" in root.entries else root.mark
    found.append(_Written(_name(root, problems), MappingNode(rest, root.mark), own, mark))
    for one in found[:-1]:
        if not STAGE_NAME.fullmatch(str(one.name)):
            problems.add(one.mark, f"stages.{str(one.name)[:60]}", *_BAD_NAME)
    return found


_BAD_NAME = ("is no name for a stage", "use letters, digits, dots, underscores, hyphens and slashes")


def _name(root: MappingNode, problems: Problems) -> str | None:
    entry = root.entries.get("name")
    if entry is None or _null(entry.value):
        return None
    value = entry.value.value if isinstance(entry.value, Scalar) else None
    if not isinstance(value, str) or not STAGE_NAME.fullmatch(value):
        problems.add(entry.value.mark, "name", f"{said(entry.value)} {_BAD_NAME[0]}", _BAD_NAME[1])
        return None
    return value


def _null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _distinct(written: Sequence[_Written], problems: Problems) -> None:
    """Every recipe is told apart by its name; at most one has none."""
    seen: dict[str | None, _Written] = {}
    for one in written:
        if one.name not in seen:
            seen[one.name] = one
        elif one.name is None:
            what = "is the second recipe without a name; one of them is the output, what is the other?"
            problems.add(one.mark, "name", what, "give all recipes but the last a `name:`")
        else:
            problems.add(one.mark, "name", f"{one.name!r} is the name of another recipe too", "rename one of them")


@dataclass(frozen=True)
class _Chain:
    """Recipes that may use each other."""

    written: Sequence[_Written]
    recipes: Sequence[Recipe]
    problems: Problems
    text: str

    def output(self, wanted: str | None) -> Recipe:
        """The recipe of the output, with the stages that it needs."""
        uses = [self._uses(i) for i in range(len(self.recipes))]
        self._refuse_circles(uses)
        self.problems.raise_if_any()
        last = self._last(uses, wanted)
        needed = self._closure(last, uses)
        for i in range(len(self.recipes)):
            if i not in (*needed, last):
                what = f"{self.written[i].name!r} is not used by the output, and is not made"
                self.problems.warn(self.written[i].mark, "name", what, "ask for it with --stage, or remove it")
        complete: dict[int, Recipe] = {}
        for i in needed:
            inner = self._closure(i, uses)
            complete[i] = replace(self.recipes[i], stages=tuple((self._named(k), complete[k]) for k in inner))
        stages = tuple((self._named(i), complete[i]) for i in needed)
        recipe = replace(self.recipes[last], stages=stages, text=self.text)
        return replace(recipe, warnings=self.problems.warnings())

    def _named(self, i: int) -> str:
        name = self.written[i].name
        assert name is not None
        return name

    def _uses(self, i: int) -> list[int]:
        """The recipes that recipe ``i`` names as models."""
        names = {one.name: k for k, one in enumerate(self.written) if one.name is not None}
        found = []
        for reference in named_models(self.recipes[i]):
            path = reference.path
            if path in names:
                found.append(names[path])
                if reference.revision is not None:
                    what = f"{str(reference)!r} asks for a revision of a stage, and a stage has none"
                    self.problems.add(self.written[i].mark, "", what, f"write {path}")
            elif "/" not in path and not os.path.exists(os.path.expanduser(path)):  # noqa: PTH110, PTH111
                near = get_close_matches(path, [str(n) for n in names], n=1, cutoff=0.75)
                if near:
                    what = f"there is no recipe and no folder {path!r}"
                    self.problems.add(self.written[i].mark, "", what, f"did you mean {near[0]!r}?")
        return list(dict.fromkeys(found))

    def _refuse_circles(self, uses: Sequence[Sequence[int]]) -> None:
        done: set[int] = set()
        for start in range(len(uses)):
            path: list[int] = []
            self._walk(start, uses, path, done)

    def _walk(self, i: int, uses: Sequence[Sequence[int]], path: list[int], done: set[int]) -> None:
        if i in path:
            circle = [str(self.written[k].name) for k in (*path[path.index(i) :], i)]
            what = f"the recipes wait for each other: {' needs '.join(circle)}"
            self.problems.add(self.written[i].mark, "", what, "break the circle")
            return
        if i in done:
            return
        path.append(i)
        for k in uses[i]:
            self._walk(k, uses, path, done)
        path.pop()
        done.add(i)

    def _last(self, uses: Sequence[Sequence[int]], wanted: str | None) -> int:
        """Which recipe makes the output."""
        names = [one.name for one in self.written]
        if wanted is not None:
            if wanted in names:
                return names.index(wanted)
            known = ", ".join(sorted(n for n in names if n))
            fix = f"known here: {known or 'none'}"
            return self.problems.fail(None, "", f"there is no stage {shown(wanted)}", fix)
        if None in names:
            return names.index(None)
        used = {k for users in uses for k in users}
        unused = [i for i in range(len(names)) if i not in used]
        if len(unused) == 1:
            return unused[0]
        ends = " and ".join(repr(names[i]) for i in unused[:3])
        what = f"the file has more than one output: {ends} are used by no other recipe"
        fix = "remove the name of one, or choose with --stage"
        return self.problems.fail(self.written[unused[1]].mark, "name", what, fix)

    def _closure(self, i: int, uses: Sequence[Sequence[int]]) -> list[int]:
        """What recipe ``i`` needs, each after its own needs."""
        order: list[int] = []

        def visit(k: int) -> None:
            for inner in uses[k]:
                if inner not in order:
                    visit(inner)
                    order.append(inner)

        visit(i)
        return order


def named_models(recipe: Recipe) -> Iterable[ModelReference]:
    """Every model that a recipe names, the tokenizer's too."""
    extra = (recipe.tokenizer_source,) if recipe.tokenizer_source else ()
    return dict.fromkeys((*recipe.references(), *extra))


def stage_of(recipe: Recipe, reference: ModelReference) -> tuple[str, Recipe] | None:
    """The stage that a reference of ``recipe`` means, with or without an adapter on it."""
    stages: Mapping[str, Recipe] = dict(recipe.stages)
    return (reference.path, stages[reference.path]) if reference.path in stages else None
