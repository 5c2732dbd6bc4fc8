"""What a recipe says, as plain data, and what follows from it: inputs in order, parameters, a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.method import Declared, Parameters
from mergekit_lr.recipe.calibration import Calibration
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.groups import Group, ModelEntry, Module, Slice, build_groups
from mergekit_lr.recipe.parameters import Chain, Rule, Scope, plain_chain
from mergekit_lr.recipe.tokens import TokenizerSection

Nonfinite = Literal["error", "warn", "allow"]

DTYPES = ("float32", "float16", "bfloat16")
NONFINITE: tuple[Nonfinite, ...] = ("error", "warn", "allow")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Made by `mergekit_lr.recipe.load.load_recipe`; frozen.

    It lists whole ``models``, or has ``slices``, or ``modules`` with either; the others are empty, and ``groups`` is
    the view that all have.
    ``dtype`` and ``out_dtype`` are names of torch dtypes or None; ``tokenizer`` says which tokens the output knows
    (None: those that all inputs share), ``chat_template`` how it puts a conversation; ``calibration`` and
    ``permutations`` are for the methods that use them (`Declared.settings`); ``stages`` are recipes whose output this
    one names as a model, each after those that it needs itself; ``text`` is the exact YAML, ``origin`` the file it came
    from; ``warnings`` are lines about what is legal but probably not meant.
    """

    merge_method: str
    method: Declared = field(repr=False, compare=False)
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()
    base_model: ModelReference | None = None
    parameters: Scope = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerSection | None = None
    chat_template: str | None = None
    seed: int = 0
    nonfinite: Nonfinite = "error"
    calibration: Calibration | None = None
    permutations: str | None = None
    stages: tuple[tuple[str, Recipe], ...] = ()
    text: str = field(default="", repr=False, compare=False)
    origin: Path | None = field(default=None, compare=False)
    warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)
    _groups: tuple[Group, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        origin = str(self.origin or "recipe")
        groups = build_groups(
            self.method, self.models, self.slices, self.base_model, self.parameters, origin, self.modules
        )
        object.__setattr__(self, "_groups", groups)

    @property
    def output_dtype(self) -> str | None:
        """Name of the dtype to write: ``out_dtype``, else ``dtype``, else None for each tensor's own."""
        return self.out_dtype or self.dtype

    @property
    def config_source(self) -> ModelReference:
        """The model whose config the output gets: the base, else the first one listed."""
        if self.base_model:
            return self.base_model
        if self.modules:
            first = self.modules[0]
            return first.base_model or _first(first.models, first.slices)
        return _first(self.models, self.slices)

    @property
    def tokenizer_source(self) -> ModelReference:
        """The model whose tokenizer the output's is, or is made from."""
        source = self.tokenizer.source if self.tokenizer else "base"
        return source if isinstance(source, ModelReference) else self.config_source

    @property
    def groups(self) -> tuple[Group, ...]:
        """What is merged with what: one group for ``models``, one for each of ``slices``, in output order.

        With ``modules``, the groups of one module after those of another.
        """
        return self._groups

    def references(self) -> tuple[ModelReference, ...]:
        """Every model that the recipe names, once each: the base first, then in order."""
        base = (self.base_model,) if self.base_model else ()
        found = [*base]
        for module in self.modules or (Module("", self.models, self.slices),):
            found += [module.base_model] if module.base_model else []
            found += [m.reference for m in module.models]
            found += [s.reference for part in module.slices for s in part.sources]
        return tuple(dict.fromkeys(found))

    def leaves(self) -> tuple[ModelReference, ...]:
        """Every model on disk or on the Hub that goes into the output, through stages too; the recipe's own first."""
        names = {name for name, _ in self.stages}
        found = list(self.references())
        for _, recipe in self.stages:
            found += recipe.references()
        return tuple(r for r in dict.fromkeys(found) if r.path not in names)

    def input_models(self) -> tuple[ModelEntry, ...]:
        """The models that are merged, in the order the method sees them; with ``slices`` or ``modules``, each once.

        Without the base where it is only a reference (`Base.REQUIRED`, `Base.OPTIONAL`); with the base first,
        listed or not, where it is an operand; as listed otherwise, with a base that is not listed at the end.
        """
        if self.models:
            return self._groups[0].inputs
        first: dict[ModelReference, ModelEntry] = {}
        for entry in (e for group in self._groups for e in group.inputs):
            first.setdefault(entry.reference, entry)
        return tuple(first.values())

    def resolve(self, tensor_name: str, t: float) -> tuple[Parameters, tuple[Parameters, ...]]:
        """The method's `Merge` parameters and one `PerModel` for each input, for one tensor of the first group.

        ``t`` in [0, 1]: layer i of n has i / (n - 1), the only layer of a one-layer model 1, a tensor outside
        the layers 0. A model's own parameter goes before its slice's, that before the recipe's, and that before
        the default.

        Raises:
            RecipeError: a required parameter has no value for this tensor, or values make no sense together.
        """
        return self._groups[0].resolve(tensor_name, t)

    def canonical(self) -> dict[str, Any]:
        """The recipe with every default written out, itself a valid recipe; JSON-able.

        Two recipes that ask for the same merge have the same canonical form, however they say it.
        """
        head: dict[str, Any] = {"merge_method": self.merge_method}
        shared: dict[str, Any] = {}
        if self.modules:
            head["modules"] = {m.name: self._plain_module(m) for m in self.modules}
        elif self.slices:
            head["slices"] = [_plain_slice(self.method, group) for group in self._groups]
        else:
            [group] = self._groups
            head["models"] = [_plain_entry(self.method, group, i) for i in range(len(group.inputs))]
            shared = _plain(group.table.merge, parameter_fields(self.method.Merge))
        return head | {
            "base_model": str(self.base_model) if self.base_model else None,
            "parameters": shared,
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "seed": self.seed,
            "nonfinite": self.nonfinite,
            **({"tokenizer": self.tokenizer.plain()} if self.tokenizer else {}),
            **({"chat_template": self.chat_template} if self.chat_template else {}),
            **({"calibration": self.calibration.plain()} if self.calibration else {}),
            **({"permutations": self.permutations} if self.permutations else {}),
            **({"stages": self._plain_stages()} if self.stages else {}),
        }

    def _plain_module(self, module: Module) -> dict[str, Any]:
        groups = [g for g in self._groups if g.module == module.name]
        base = module.base(self.base_model)
        found: dict[str, Any] = {"base_model": str(base) if base else None}
        if module.slices:
            return found | {"slices": [_plain_slice(self.method, g) for g in groups]}
        [group] = groups
        return found | {
            "models": [_plain_entry(self.method, group, i) for i in range(len(group.inputs))],
            "parameters": _plain(group.table.merge, parameter_fields(self.method.Merge)),
        }

    def _plain_stages(self) -> dict[str, Any]:
        """The canonical form of every stage by its name; a stage's own stages stand beside it."""
        plain = {name: recipe.canonical() for name, recipe in self.stages}
        return {name: {k: v for k, v in found.items() if k != "stages"} for name, found in plain.items()}

    def digest(self) -> str:
        """sha256 of the canonical form, in hex: decides whether an interrupted run may be resumed."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _first(models: tuple[ModelEntry, ...], slices: tuple[Slice, ...]) -> ModelReference:
    """The model that the layout comes from where no base is named."""
    return models[0].reference if models else slices[0].base_model or slices[0].sources[0].reference


def _plain_entry(method: Declared, group: Group, index: int) -> dict[str, Any]:
    """One input of a group with all of its parameters."""
    label, own = group.table.models[index]
    parameters = _plain(own, parameter_fields(method.PerModel))
    layers, name = group.inputs[index].layers, group.inputs[index].name
    return (
        {"model": label}
        | ({"name": name} if name else {})
        | ({"layer_range": list(layers)} if layers else {})
        | ({"parameters": parameters} if parameters else {})
    )


def _plain_slice(method: Declared, group: Group) -> dict[str, Any]:
    sources = [_plain_entry(method, group, i) for i in range(len(group.inputs))]
    base = group.base
    if base is not None and base not in group.inputs:
        assert base.layers is not None
        sources.insert(0, {"model": str(base.reference), "layer_range": list(base.layers)})
    found: dict[str, Any] = {"sources": sources}
    if base is not None:
        found["base_model"] = str(base.reference)
    return found | {"parameters": _plain(group.table.merge, parameter_fields(method.Merge))}


def _plain(table: Mapping[str, Chain], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Chains as a recipe writes them, ended by the default where they may run out."""
    result: dict[str, Any] = {}
    for name, info in fields.items():
        chain = table.get(name, ())
        if not info.required and not any(r.filter is None for r in chain):
            chain = (*chain, Rule(info.coerce(info.default)))
        if chain and not (len(chain) == 1 and chain[0].value is None):
            result[name] = plain_chain(chain)
    return result
