"""Parameter values that depend on the tensor: filters, gradients over layers, precedence of scopes.

A *rule* is a value with an optional filter; a *chain* is the rules of one parameter in the order in which they are
asked: the model's own, then its slice's, then the recipe's. The first rule whose filter is a substring of the
tensor's name decides; a rule without a filter always does; where none does, the default holds. A list is a
*gradient*: with m values v and the tensor at t in [0, 1],

    s = t (m - 1),  i = int(s),  f = s - i,  value = (1 - f) v[i] + f v[min(m - 1, i + 1)]

in float64 for numbers, and ``v[int(s)]`` for anything else. These are mergekit's rules (0.1.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import ValidationError

from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Declared, Parameters
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.problems import shown

MAX_SAMPLING = 50_000
"""Rules looked at while a recipe is checked: bounds the time that a hostile one costs."""


@dataclass(frozen=True)
class Gradient:
    """Values over the layers. ``smooth``: interpolate; otherwise choose."""

    values: tuple[Any, ...]
    smooth: bool

    def at(self, t: float) -> Any:
        """The value at ``t`` in [0, 1]."""
        s = t * (len(self.values) - 1)
        i = int(s)
        if not self.smooth:
            return self.values[i]
        f = s - i
        return (1 - f) * self.values[i] + f * self.values[min(len(self.values) - 1, i + 1)]


@dataclass(frozen=True)
class Rule:
    """A value for the tensors whose name contains ``filter`` (None: for all). ``where`` is its place."""

    value: Any
    filter: str | None = None
    where: str = field(default="", compare=False)

    def applies(self, tensor_name: str) -> bool:
        return self.filter is None or self.filter in tensor_name

    def plain(self) -> Any:
        """The value as a recipe writes it."""
        value = self.value
        if isinstance(value, Gradient):
            return list(value.values)
        return list(value) if isinstance(value, tuple) else value


Chain = tuple[Rule, ...]
Scope = Mapping[str, Chain]


def chains(names: Iterable[str], *scopes: Scope) -> dict[str, Chain]:
    """One chain for each name, the first scope asked first, cut after the first rule that always applies."""
    result = {}
    for name in names:
        chain: list[Rule] = []
        for rule in (r for scope in scopes for r in scope.get(name, ())):
            chain.append(rule)
            if rule.filter is None:
                break
        result[name] = tuple(chain)
    return result


def beneath(names: Iterable[str], own: Scope, below: dict[str, Chain]) -> dict[str, Chain]:
    """`chains` of a scope over chains that are made already; those themselves where the scope is empty."""
    return chains(names, own, below) if own else below


def plain_chain(chain: Chain) -> Any:
    """A chain as a recipe writes it: a bare value if it is unconditional, else a list of filters."""
    if len(chain) == 1 and chain[0].filter is None:
        return chain[0].plain()
    return [{"filter": r.filter or "*", "value": r.plain()} for r in chain]


Resolved = tuple[Parameters, tuple[Parameters, ...]]
Key = tuple[int, tuple[int, ...], float]


@dataclass
class ParameterTable:
    """All chains of one recipe, or of one of its slices; `resolve` gives the parameters of one tensor.

    ``models`` pairs each input (as the recipe writes it) with its chains. Results are kept by what can matter,
    the filters that match and ``t``, so that a hundred thousand tensors cost a few hundred validations.
    """

    method: Declared
    merge: Mapping[str, Chain]
    models: tuple[tuple[str, Mapping[str, Chain]], ...]
    origin: str
    _filters: tuple[str, ...] = field(init=False, repr=False)
    _graded: bool = field(init=False, repr=False)
    _cache: dict[Key, Resolved] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        rules = list(self._rules())
        self._filters = tuple(dict.fromkeys(r.filter for r in rules if r.filter is not None))
        self._graded = any(isinstance(r.value, Gradient) for r in rules)

    def _rules(self) -> Iterable[Rule]:
        for table in (self.merge, *(chains for _, chains in self.models)):
            for chain in table.values():
                yield from chain

    def resolve(self, tensor_name: str, t: float, input_names: Sequence[str] | None = None) -> Resolved:
        """Validated parameters of the merge and of each input, for one tensor.

        ``t`` in [0, 1] is the tensor's place between the first layer and the last. ``input_names`` is what each
        input calls the tensor, where that is not its name in the output: filters of an input's parameters look
        at the input's name, those of the merge's at the output's.

        Raises:
            RecipeError: a required parameter has no value here, or the values make no sense together.
            ValueError: ``t`` is not in [0, 1].
        """
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"t must be in [0, 1], not {t!r}")
        own = () if input_names is None else tuple(self._matches(name) for name in input_names)
        key = (self._matches(tensor_name), own, t if self._graded else 0.0)
        known = self._cache.get(key)
        if known is None:
            names = input_names or (tensor_name,) * len(self.models)
            known = self._cache[key] = self._resolve(tensor_name, t, names)
        return known

    def _matches(self, tensor_name: str) -> int:
        """One bit for each filter that applies."""
        matches = 0
        for f in self._filters:
            matches = matches << 1 | (f in tensor_name)
        return matches

    def _resolve(self, tensor_name: str, t: float, input_names: Sequence[str]) -> Resolved:
        where = f"{self.origin}: tensor {tensor_name!r}"
        merge = self._build(self.method.Merge, self.merge, tensor_name, t, where)
        models = tuple(
            self._build(self.method.PerModel, chains, name, t, f"{where}: model {label}")
            for (label, chains), name in zip(self.models, input_names, strict=True)
        )
        wrong = self.method.problems(merge, models)
        if wrong:
            raise RecipeError(wrong[0], where=where, problems=tuple(f"{where}: {w}" for w in wrong))
        return merge, models

    def _build(
        self, model: type[Parameters], table: Mapping[str, Chain], tensor_name: str, t: float, where: str
    ) -> Parameters:
        values: dict[str, Any] = {}
        for name, info in parameter_fields(model).items():
            chain = table.get(name, ())
            rule = next((r for r in chain if r.applies(tensor_name)), None)
            if rule is not None:
                values[name] = rule.value.at(t) if isinstance(rule.value, Gradient) else rule.value
            elif info.required:
                raise RecipeError(
                    f"{name} is required and no filter gives it a value here",
                    where=where,
                    why=f"filters: {', '.join(shown(r.filter) for r in chain)}" if chain else "",
                    fix="end the list with an entry without a filter",
                )
        try:
            return model.model_validate(values)
        except ValidationError as e:
            error = e.errors()[0]
            path = ".".join(map(str, error["loc"]))
            raise RecipeError(f"{path}: {error['msg']}" if path else error["msg"], where=where) from None

    def samples(self, tables: int = 1) -> Iterable[tuple[str, float]]:
        """Tensor names and places that between them reach every filter and every value of every gradient.

        At most this table's share of `MAX_SAMPLING`, of ``tables`` in all.
        """
        knots = {0.0, 1.0}
        rules = list(self._rules())
        for rule in rules:
            if isinstance(rule.value, Gradient):
                knots.update(i / (len(rule.value.values) - 1) for i in range(len(rule.value.values)))
        places = sorted(knots)
        # What is left out here is checked when the real tensors are resolved.
        most = MAX_SAMPLING // ((len(rules) + len(self.models) + 1) * tables)
        yield from islice(((name, t) for name in ("", *self._filters) for t in places), most)

    def complete_at(self, tensor_name: str) -> bool:
        """Every required parameter has a value for a tensor of this name."""
        tables = [(self.method.Merge, self.merge), *((self.method.PerModel, c) for _, c in self.models)]
        return all(
            any(r.applies(tensor_name) for r in table.get(name, ()))
            for model, table in tables
            for name, info in parameter_fields(model).items()
            if info.required
        )
