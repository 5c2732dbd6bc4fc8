"""From nodes to a `Recipe`: keys, types, models, counts. Notes every problem and goes on."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Declared, Method
from mergekit_lr.recipe.calibration import Calibration, read_calibration
from mergekit_lr.recipe.entries import (
    EntryReader,
    ListedModel,
    ListedModule,
    ListedSlice,
    model_entry,
    module_entry,
    slice_entry,
)
from mergekit_lr.recipe.fields import ParameterField, parameter_fields
from mergekit_lr.recipe.followed import with_followers
from mergekit_lr.recipe.foreign import Hint, outside, repeats, unused
from mergekit_lr.recipe.parameters import Scope
from mergekit_lr.recipe.problems import Problems, nearest, shown
from mergekit_lr.recipe.schema import DTYPES, NONFINITE, Recipe
from mergekit_lr.recipe.scope import ScopeReader
from mergekit_lr.recipe.tokens import TokenReader
from mergekit_lr.recipe.whole import ModuleCheck, SliceCheck, WholeCheck, check_combinations
from mergekit_lr.recipe.yaml import Entry, Mapping, Node, Scalar
from mergekit_lr.registry import get_method, method_names

ROOT_KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "seed",
    "nonfinite",
    "calibration",
    "permutations",
    "name",
    "stages",
)
SYNONYMS = {"random_seed": "seed"}
LAYOUTS = ("models", "slices", "modules")
NEEDED = {"calibration": "add `calibration: {text: [FILE]}`", "permutations": "add `permutations: auto`"}
MAX_SEED = 2**63
PLUGIN_FAILURES = (ImportError, AttributeError, NameError, SyntaxError, TypeError, ValueError)
"""What importing another distribution's broken method may raise."""


def read_recipe(root: Mapping, problems: Problems, text: str, origin: Path | None) -> Recipe:
    """Check the whole document.

    Raises:
        RecipeError: with all problems.
    """
    return _Walk(root, problems, text, origin).run()


class _Walk:
    def __init__(self, root: Mapping, problems: Problems, text: str, origin: Path | None) -> None:
        self.root, self.problems, self.text, self.origin = root, problems, text, origin
        self.entries = self._known_entries()
        self.method = self._method()
        self.merge_fields = parameter_fields(self.method.Merge) if self.method else {}
        self.model_fields = parameter_fields(self.method.PerModel) if self.method else {}
        self.reader = EntryReader(
            problems,
            self.merge_fields,
            self.model_fields,
            self._misplaced,
            self.method is not None,
            self.method is None or "names" in self.method.settings,
        )

    def run(self) -> Recipe:
        base = self._base()
        shared, tried = self._shared_parameters()
        models, slices, modules = self._listed()
        listed = [*models, *(s for part in slices for s in part.sources)]
        for module in modules:
            listed += [*module.models, *(s for part in module.slices for s in part.sources)]
        tokens = TokenReader(self.problems, _distinct_references(base, listed))
        settings: dict[str, Any] = {
            "dtype": self._choice("dtype", DTYPES),
            "out_dtype": self._choice("out_dtype", DTYPES),
            "nonfinite": self._choice("nonfinite", NONFINITE) or "error",
            "seed": self._seed(),
            "tokenizer": tokens.section(self.entries),
            "chat_template": tokens.chat_template(self._scalar("chat_template")),
            "calibration": self._calibration(),
            "permutations": self._permutations(),
        }
        self._distinct(models)
        if self.method is not None:
            whole = WholeCheck(self.problems, self.method, self.entries)
            if modules or "modules" in self.entries:
                ModuleCheck(whole, base, tried).run(modules)
            elif slices or "slices" in self.entries:
                SliceCheck(whole, base, tried).run(slices)
            else:
                whole.models(models, base, tried)
        self.problems.raise_if_any()
        assert self.method is not None
        fields: dict[str, Any] = {
            "merge_method": self.method.name,
            "method": self.method,
            "models": tuple(model_entry(m) for m in models),
            "slices": tuple(slice_entry(s) for s in slices),
            "modules": tuple(module_entry(m) for m in modules),
            "base_model": base,
            "parameters": shared,
            "text": self.text,
            "origin": self.origin,
            **settings,
        }
        recipe = Recipe(**fields)
        check_combinations(recipe, self.problems, self.entries["merge_method"].value.mark)
        self.problems.raise_if_any()
        return Recipe(**fields, warnings=self.problems.warnings())

    # Keys of the document

    def _known_entries(self) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for key, entry in self.root.entries.items():
            name = SYNONYMS.get(key, key)
            if name not in ROOT_KEYS:
                self._unknown(key, entry)
            elif name in found:
                self.problems.add(entry.key_mark, key, f"says the same as {name}", "keep one of them")
            else:
                found[name] = entry
        return found

    def _unknown(self, key: str, entry: Entry) -> None:
        """Note a key that a recipe does not have, with what was probably meant."""
        hint = Hint(nearest(key, ROOT_KEYS))
        named = self.root.entries.get("merge_method")
        name = named.value.value if named and isinstance(named.value, Scalar) else None
        if isinstance(name, str):
            with suppress(RecipeError, *PLUGIN_FAILURES):
                hint = outside(key, entry.value, get_method(name)) or hint
        if hint.harmless:
            self.problems.warn(entry.key_mark, key, hint.text, "remove it")
        else:
            self.problems.add(entry.key_mark, key[:60], "unknown key", hint.text)

    def _scalar(self, key: str) -> Scalar | None:
        """The scalar under an optional key; None if it is absent or null."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        if not isinstance(entry.value, Scalar):
            self.problems.add(entry.value.mark, key, "must be a single value", "write one word or number")
            return None
        return entry.value if entry.value.value is not None else None

    def _choice(self, key: str, known: Collection[str]) -> str | None:
        node = self._scalar(key)
        value = None if node is None else str(node.value).removeprefix("torch.")
        if node is None or value in known:
            return value
        self.problems.add(node.mark, key, f"unknown value {shown(node.value)}", nearest(str(node.value), known))
        return None

    def _used(self, key: str) -> Entry | None:
        """The entry of a key that only some methods use; noted as a problem where this one does not."""
        entry = self.entries.get(key)
        if entry is None or (isinstance(entry.value, Scalar) and entry.value.value is None):
            if self.method is not None and key in self.method.required_settings:
                mark = self.entries["merge_method"].value.mark
                self.problems.add(mark, key, f"is missing, and {self.method.name} needs it", NEEDED[key])
            return None
        if self.method is not None and key not in self.method.settings:
            self.problems.add(entry.key_mark, key, f"is not used by {self.method.name}", "remove it")
            return None
        return entry

    def _calibration(self) -> Calibration | None:
        entry = self._used("calibration")
        return read_calibration(entry, self.problems) if entry else None

    def _permutations(self) -> str | None:
        entry = self._used("permutations")
        if entry is None:
            return None
        if isinstance(entry.value, Scalar) and isinstance(entry.value.value, str) and entry.value.value:
            return entry.value.value
        fix = "write `auto`, the name of a family, or a file"
        self.problems.add(entry.value.mark, "permutations", "must be one line of text", fix)
        return None

    def _distinct(self, models: list[ListedModel]) -> None:
        """Two models of one name could not be told apart later."""
        seen: dict[str, ListedModel] = {}
        for model in models:
            if model.name is not None and seen.setdefault(model.name, model) is not model:
                what = f"{model.name!r} is the name of {seen[model.name].path} too"
                self.problems.add(model.mark, f"{model.path}.name", what, "give each model its own name")

    def _seed(self) -> int:
        node = self._scalar("seed")
        if node is None:
            return 0
        if type(node.value) is int and 0 <= node.value < MAX_SEED:
            return node.value
        self.problems.add(node.mark, "seed", f"{shown(node.value)} is not a seed", "write a whole number from 0")
        return 0

    def _method(self) -> Declared | None:
        entry = self.entries.get("merge_method")
        known = self._method_hint
        if entry is None:
            self.problems.add(self.root.mark, "merge_method", "is missing", "say how to merge: `merge_method: linear`")
            return None
        node = entry.value
        if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
            self.problems.add(node.mark, "merge_method", "must be the name of a method", known(""))
            return None
        try:
            parameters = self.entries.get("parameters")
            return with_followers(get_method(node.value), parameters.value if parameters else None)
        except RecipeError as e:
            what = f"there is no method {shown(node.value)}" if e.what.startswith("there is no") else str(e)
            self.problems.add(node.mark, "merge_method", what, known(node.value))
        except PLUGIN_FAILURES as e:
            self.problems.add(
                node.mark, "merge_method", f"the plug-in for {shown(node.value)} fails: {e}", "mend or uninstall it"
            )
        return None

    @staticmethod
    def _method_hint(name: str) -> str:
        return nearest(name, method_names())

    # Models

    def _base(self) -> ModelReference | None:
        entry = self.entries.get("base_model")
        if entry is None or (isinstance(entry.value, Scalar) and entry.value.value is None):
            return None
        return self.reader.reference(entry.value, "base_model")

    def _listed(self) -> tuple[list[ListedModel], list[ListedSlice], list[ListedModule]]:
        """The entries of ``models``, of ``slices`` or of ``modules``; a recipe has one of the three."""
        given = [k for k in LAYOUTS if k in self.entries]
        models, slices, modules = (self.entries.get(k) for k in LAYOUTS)
        if not given:
            fix = "list the models to merge under `models:`, or runs of their layers under `slices:`"
            self.problems.add(self.root.mark, "models", "is missing", fix)
        for other in given[1:]:
            what = f"cannot stand beside {given[0]}"
            self.problems.add(self.entries[other].key_mark, other, what, "keep one of them")
        if modules is not None and self.method is not None and not isinstance(self.method, Method):
            what = f"is not used by {self.method.name}, which lays out its own output"
            self.problems.add(modules.key_mark, "modules", what, "list whole models under `models`")
        return (
            self.reader.models(models.value) if models else [],
            self.reader.slices(slices.value) if slices else [],
            self.reader.modules(modules.value) if modules else [],
        )

    # Parameters

    def _shared_parameters(self) -> tuple[Scope, set[str]]:
        entry = self.entries.get("parameters")
        if entry is None or self.method is None:
            return {}, set()
        fields: dict[str, ParameterField] = {**self.model_fields, **self.merge_fields}
        return ScopeReader(self.problems).read(entry.value, fields, "parameters", self._misplaced)

    def _misplaced(self, key: str, node: Node) -> Hint | None:
        """What to say of a parameter that is unknown where it stands."""
        assert self.method is not None
        if key in self.merge_fields:
            shared = self.entries.get("parameters")
            used = shared.value.entries.get(key) if shared and isinstance(shared.value, Mapping) else None
            if key == "int8_mask" or repeats(self.merge_fields[key], node, used.value if used else None):
                text = f"{key} of {self.method.name} is one for all models; here it has no effect, and repeats that one"
                return Hint(text, harmless=True)
            where = "the recipe's or the slice's" if "slices" in self.entries else "the recipe's"
            return Hint(f"{key} of {self.method.name} is one for all models: put it under {where} `parameters`")
        if SYNONYMS.get(key, key) in ROOT_KEYS:
            return Hint(f"{key} is a key of the recipe itself, not a parameter")
        return unused(key, self.method.name)


def _distinct_references(base: ModelReference | None, listed: list[ListedModel]) -> tuple[ModelReference, ...]:
    every = (base, *(m.reference for m in listed))
    return tuple(dict.fromkeys(r for r in every if r is not None))
