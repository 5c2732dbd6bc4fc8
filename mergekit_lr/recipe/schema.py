"""What a recipe says, as plain data, and what follows from it: inputs in order, parameters, a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.method import Base, Method, Parameters
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.parameters import Chain, ParameterTable, Rule, Scope, chains, plain_chain

Nonfinite = Literal["error", "warn", "allow"]

DTYPES = ("float32", "float16", "bfloat16")
NONFINITE: tuple[Nonfinite, ...] = ("error", "warn", "allow")


@dataclass(frozen=True)
class ModelEntry:
    """One item of ``models``: the model and the parameters given to it there."""

    reference: ModelReference
    parameters: Scope = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Made by `mergekit_lr.recipe.load.load_recipe`; frozen.

    ``dtype`` and ``out_dtype`` are names of torch dtypes or None; ``tokenizer_source`` is the model whose tokenizer
    the output gets (None: that of `config_source`); ``text`` is the exact YAML, ``origin`` the file
    it came from; ``warnings`` are lines about what is legal but probably not meant.
    """

    merge_method: str
    method: Method = field(repr=False, compare=False)
    models: tuple[ModelEntry, ...]
    base_model: ModelReference | None = None
    parameters: Scope = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: ModelReference | None = None
    seed: int = 0
    nonfinite: Nonfinite = "error"
    text: str = field(default="", repr=False, compare=False)
    origin: Path | None = field(default=None, compare=False)
    warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)
    _inputs: tuple[ModelEntry, ...] = field(init=False, repr=False, compare=False)
    _table: ParameterTable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inputs = ordered_inputs(self.method, self.models, self.base_model)
        object.__setattr__(self, "_inputs", inputs)
        object.__setattr__(self, "_table", self._build_table(inputs))

    def _build_table(self, inputs: tuple[ModelEntry, ...]) -> ParameterTable:
        per_model = parameter_fields(self.method.PerModel)
        return ParameterTable(
            method=self.method,
            merge=chains(parameter_fields(self.method.Merge), self.parameters),
            models=tuple(
                (str(entry.reference), chains(per_model, entry.parameters, self.parameters)) for entry in inputs
            ),
            origin=str(self.origin or "recipe"),
        )

    @property
    def output_dtype(self) -> str | None:
        """Name of the dtype to write: ``out_dtype``, else ``dtype``, else None for each tensor's own."""
        return self.out_dtype or self.dtype

    @property
    def config_source(self) -> ModelReference:
        """The model whose config the output gets: the base, else the first one listed."""
        return self.base_model or self.models[0].reference

    @property
    def table(self) -> ParameterTable:
        """Every parameter of every input, ready to be resolved."""
        return self._table

    def references(self) -> tuple[ModelReference, ...]:
        """Every model that the recipe names, once each: the base first, then in order."""
        base = (self.base_model,) if self.base_model else ()
        return tuple(dict.fromkeys((*base, *(m.reference for m in self.models))))

    def input_models(self) -> tuple[ModelEntry, ...]:
        """The models in the order the method sees them.

        Without the base where it is only a reference (`Base.REQUIRED`, `Base.OPTIONAL`); with the base first,
        listed or not, where it is an operand; as listed otherwise.
        """
        return self._inputs

    def resolve(self, tensor_name: str, t: float) -> tuple[Parameters, tuple[Parameters, ...]]:
        """The method's `Merge` parameters and one `PerModel` for each input, for one tensor.

        ``t`` in [0, 1]: layer i of n has i / (n - 1), the only layer of a one-layer model 1, a tensor outside
        the layers 0. A model's own parameter goes before the recipe's, the recipe's before the default.

        Raises:
            RecipeError: a required parameter has no value for this tensor, or values make no sense together.
        """
        return self._table.resolve(tensor_name, t)

    def canonical(self) -> dict[str, Any]:
        """The recipe with every default written out, itself a valid recipe; JSON-able.

        Two recipes that ask for the same merge have the same canonical form, however they say it.
        """
        table = self._table
        models = [
            {"model": label, "parameters": _plain(own, parameter_fields(self.method.PerModel))}
            for label, own in table.models
        ]
        return {
            "merge_method": self.merge_method,
            "models": [m if m["parameters"] else {"model": m["model"]} for m in models],
            "base_model": str(self.base_model) if self.base_model else None,
            "parameters": _plain(table.merge, parameter_fields(self.method.Merge)),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "tokenizer_source": str(self.tokenizer_source or self.config_source),
            "seed": self.seed,
            "nonfinite": self.nonfinite,
        }

    def digest(self) -> str:
        """sha256 of the canonical form, in hex: decides whether an interrupted run may be resumed."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def ordered_inputs(
    method: Method, models: tuple[ModelEntry, ...], base: ModelReference | None
) -> tuple[ModelEntry, ...]:
    """`Recipe.input_models` before there is a recipe. Models are the same if their references are."""
    if base is None or method.base is Base.UNUSED:
        return models
    others = tuple(m for m in models if m.reference != base)
    if method.base is not Base.OPERAND:
        return others
    return (next((m for m in models if m.reference == base), ModelEntry(base)), *others)


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
