"""Reads one ``parameters:`` mapping: every name, type and range, with filters and gradients."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass
from typing import Any

from mergekit_lr.recipe.fields import ParameterField
from mergekit_lr.recipe.foreign import Hint
from mergekit_lr.recipe.parameters import Chain, Gradient, Rule, Scope
from mergekit_lr.recipe.problems import Problems, nearest
from mergekit_lr.recipe.yaml import Entry, Mapping, Node, Scalar, Sequence

RULE_KEYS = ("filter", "value")
MAX_RULES = 1_000

_ABSENT = object()

Misplaced = Callable[[str, Node], Hint | None]
"""What to say of a name that is unknown at its place, given its value."""


@dataclass(frozen=True)
class ScopeReader:
    """Turns nodes into chains of rules and notes what is wrong with them."""

    problems: Problems

    def read(
        self,
        node: Node,
        fields: AbstractMapping[str, ParameterField],
        path: str,
        misplaced: Misplaced,
    ) -> tuple[Scope, set[str]]:
        """The scope, and the names that it gives or tries to give.

        ``misplaced`` says where a name that is unknown here belongs. A name in the second result with no entry
        in the first was given wrongly; that it has no value is not a second problem.
        """
        if isinstance(node, Scalar) and node.value is None:
            return {}, set()
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, path, "must be a mapping", "write `name: value` lines under it")
            return {}, set(fields)
        scope: dict[str, Chain] = {}
        tried: set[str] = set()
        for key, entry in node.entries.items():
            field = fields.get(key)
            if field is None:
                tried.update(self._unknown(key, entry, fields, path, misplaced))
                continue
            tried.add(key)
            chain = self._chain(entry.value, field, f"{path}.{key}")
            if chain:
                scope[key] = chain
        return scope, tried

    def _unknown(
        self,
        key: str,
        entry: Entry,
        fields: AbstractMapping[str, ParameterField],
        path: str,
        misplaced: Misplaced,
    ) -> list[str]:
        """Note an unknown name; returns the name that was probably meant."""
        belongs = misplaced(key, entry.value)
        if belongs is not None and belongs.harmless:
            self.problems.warn(entry.key_mark, f"{path}.{key}", belongs.text, "remove it")
            return []
        hint = belongs.text if belongs else nearest(key, fields)
        self.problems.add(entry.key_mark, f"{path}.{key[:60]}", "unknown parameter", hint)
        return [name for name in fields if not belongs and hint == f"did you mean {name!r}?"]

    def _chain(self, node: Node, field: ParameterField, path: str) -> Chain:
        if isinstance(node, Mapping):
            return self._rules([node], field, path, single=True)
        if isinstance(node, Sequence) and node.items and all(isinstance(i, Mapping) for i in node.items):
            return self._rules(node.items, field, path, single=False)
        value = self._value(node, field, path)
        if value is _ABSENT or value is None:
            return ()
        return (Rule(value, None, self.problems.where(node.mark)),)

    def _rules(self, nodes: list[Node], field: ParameterField, path: str, single: bool) -> Chain:
        """Entries of ``filter`` and ``value``; one that an earlier entry hides is worth a warning."""
        rules: list[Rule] = []
        if len(nodes) > MAX_RULES:
            what = f"has {len(nodes)} entries, more than {MAX_RULES:,}"
            self.problems.add(nodes[MAX_RULES].mark, path, what, "use filters that match more tensors each")
            return ()
        for i, node in enumerate(nodes):
            assert isinstance(node, Mapping)
            at = path if single else f"{path}[{i}]"
            rule = self._rule(node, field, at)
            if rule is None:
                continue
            hides = next((r for r in rules if r.filter is None or (rule.filter and r.filter in rule.filter)), None)
            if hides is not None:
                what = "an entry above it applies to every tensor"
                if hides.filter is not None:
                    what = f"the filter {hides.filter!r} above it matches first"
                self.problems.warn(node.mark, at, f"is never reached: {what}", "put it above that entry")
            rules.append(rule)
        return tuple(rules)

    def _rule(self, node: Mapping, field: ParameterField, path: str) -> Rule | None:
        known = True
        for key, entry in node.entries.items():
            if key not in RULE_KEYS:
                known = False
                self.problems.add(entry.key_mark, f"{path}.{key[:60]}", "unknown key", nearest(key, RULE_KEYS))
        value = node.entries.get("value")
        text = self._filter(node, path)
        if value is None:
            if known:
                self.problems.add(node.mark, path, "has no value", "add `value: ...`")
            return None
        found = self._value(value.value, field, f"{path}.value")
        if found is _ABSENT or text is _ABSENT:
            return None
        return Rule(found, None if text in (None, "", "*") else str(text), self.problems.where(value.value.mark))

    def _filter(self, node: Mapping, path: str) -> object:
        entry = node.entries.get("filter")
        if entry is None:
            return None
        if isinstance(entry.value, Scalar) and (entry.value.value is None or isinstance(entry.value.value, str)):
            return entry.value.value
        self.problems.add(
            entry.value.mark, f"{path}.filter", "must be text", "write a part of a tensor's name, in quotes if needed"
        )
        return _ABSENT

    def _value(self, node: Node, field: ParameterField, path: str) -> Any:
        """One value or one gradient; `_ABSENT` if it is wrong."""
        if isinstance(node, Scalar):
            return self._leaf(node, field, path)
        if isinstance(node, Mapping) or any(not isinstance(i, Scalar) for i in node.items):
            what, fix = "must be a value, a list of values, or a list of filters", "see `mergekit-lr methods`"
            self.problems.add(node.mark, path, what, fix)
            return _ABSENT
        if field.takes_lists:
            return self._coerced([i.value for i in node.items if isinstance(i, Scalar)], node, field, path)
        if not node.items:
            self.problems.add(node.mark, path, "is an empty list", "give it a value or remove it")
            return _ABSENT
        values = [self._leaf(i, field, f"{path}[{n}]") for n, i in enumerate(node.items) if isinstance(i, Scalar)]
        if any(v is _ABSENT for v in values):
            return _ABSENT
        if len(values) == 1:
            return values[0]
        return Gradient(tuple(values), field.interpolates(tuple(values)))

    def _leaf(self, node: Scalar, field: ParameterField, path: str) -> Any:
        if node.value is None and type(None) not in field.admits:
            self.problems.add(node.mark, path, "has no value", f"write {field.kind()} or remove it")
            return _ABSENT
        return self._coerced(node.value, node, field, path)

    def _coerced(self, value: Any, node: Node, field: ParameterField, path: str) -> Any:
        try:
            result = field.coerce(value)
        except ValueError as e:
            what, _, fix = str(e).partition("; ")
            self.problems.add(node.mark, path, what, fix)
            return _ABSENT
        return tuple(result) if isinstance(result, list) else result
