"""What a recipe says of the output's tokens: ``tokenizer_source``, ``tokenizer``, ``chat_template``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.recipe.problems import Problems, nearest, shown
from mergekit_lr.recipe.references import read_reference
from mergekit_lr.recipe.yaml import Entry, Mapping, Node, Scalar, said

SECTION_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "force")
SOURCE_KEYS = ("kind", "model", "token", "token_id")
KINDS = ("model_token", "zero")
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Chat templates that come with this package."""
MAX_PAD = 1 << 20
MAX_ID = 1 << 31
EXAMPLE = "write `source: MODEL`, `source: {kind: model_token, model: MODEL, token: TOKEN}` or `source: {kind: zero}`"

Kind = Literal["model", "model_token", "zero"]


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of a token comes from: ``model``'s own row of it, its row of another token, or zeros."""

    kind: Kind
    model: ModelReference | None = None
    token: str | None = None
    token_id: int | None = None

    def plain(self) -> Any:
        if self.kind == "model":
            return str(self.model)
        found = {"kind": self.kind, "model": self.model and str(self.model), "token": self.token}
        return {k: v for k, v in (found | {"token_id": self.token_id}).items() if v is not None}


@dataclass(frozen=True)
class TokenRule:
    """What a recipe says of one token. ``force``: also where a model has a row of its own for it."""

    token: str
    source: TokenSource | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSection:
    """``source``: ``union``, ``base`` or a model; ``tokens``: rules for single tokens; ``pad_to_multiple_of``: rows."""

    source: ModelReference | Literal["union", "base"] = "union"
    tokens: tuple[TokenRule, ...] = ()
    pad_to_multiple_of: int | None = None

    def plain(self) -> dict[str, Any]:
        """As a recipe writes it."""
        found: dict[str, Any] = {"source": str(self.source)}
        if self.tokens:
            found["tokens"] = {
                r.token: ({"source": r.source.plain()} if r.source else {}) | ({"force": True} if r.force else {})
                for r in sorted(self.tokens, key=lambda r: r.token)
            }
        if self.pad_to_multiple_of is not None:
            found["pad_to_multiple_of"] = self.pad_to_multiple_of
        return found


@dataclass(frozen=True)
class TokenReader:
    """Reads the three keys; ``known`` are the recipe's models, whose rows a token may be given."""

    problems: Problems
    known: tuple[ModelReference, ...]

    def section(self, entries: dict[str, Entry]) -> TokenizerSection | None:
        """What the recipe says of its tokenizer; None where it says nothing, or something wrong, which is noted."""
        short, full = (entry if entry and not _is_null(entry.value) else None for entry in map(entries.get, KEYS))
        if short and full:
            self.problems.add(short.key_mark, "tokenizer_source", "cannot stand beside tokenizer", "keep one of them")
            return None
        if short:
            source = self._source(short.value, "tokenizer_source")
            return TokenizerSection(source) if source is not None else None
        return self._full(full.value) if full else None

    def _source(self, node: Node, path: str) -> ModelReference | Literal["union", "base"] | None:
        if isinstance(node, Mapping):
            return read_reference(node, path, self.problems)
        if isinstance(node, Scalar) and isinstance(node.value, str) and node.value:
            if node.value == "union" or node.value == "base":
                return "union" if node.value == "union" else "base"
            same = (r for r in self.known if str(r) == node.value)
            return next(same, None) or read_reference(node, path, self.problems)
        self.problems.add(node.mark, path, "must be `union`, `base` or a model", "write one of them")
        return None

    def _full(self, node: Node) -> TokenizerSection | None:
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, "tokenizer", "must be a mapping", "write `tokenizer: {source: union}`")
            return None
        before = self.problems.count
        self._unknown(node, "tokenizer", SECTION_KEYS)
        source = node.entries.get("source")
        found = self._source(source.value, "tokenizer.source") if source and not _is_null(source.value) else "union"
        tokens = node.entries.get("tokens")
        rules = self._rules(tokens.value) if tokens and not _is_null(tokens.value) else ()
        pad = node.entries.get("pad_to_multiple_of")
        multiple = self._pad(pad.value) if pad and not _is_null(pad.value) else None
        if found is None or self.problems.count > before:
            return None
        return TokenizerSection(found, rules, multiple)

    def _unknown(self, node: Mapping, path: str, known: tuple[str, ...]) -> None:
        for key, item in node.entries.items():
            if key not in known:
                self.problems.add(item.key_mark, f"{path}.{key[:60]}", "unknown key", nearest(key, known))

    def _pad(self, node: Node) -> int | None:
        if isinstance(node, Scalar) and type(node.value) is int and 1 <= node.value <= MAX_PAD:
            return node.value
        what = f"{shown(node.value)} is no count of rows" if isinstance(node, Scalar) else "must be a number"
        fix = f"write a whole number from 1 to {MAX_PAD:,}"
        self.problems.add(node.mark, "tokenizer.pad_to_multiple_of", what, fix)
        return None

    def _rules(self, node: Node) -> tuple[TokenRule, ...]:
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, "tokenizer.tokens", "must map tokens to their sources", EXAMPLE)
            return ()
        return tuple(r for token, entry in node.entries.items() if (r := self._rule(token, entry.value)) is not None)

    def _rule(self, token: str, node: Node) -> TokenRule | None:
        path = f"tokenizer.tokens.{token[:60]}"
        if not token:
            self.problems.add(node.mark, path, "is no token", "name one")
            return None
        if _is_null(node):
            return TokenRule(token)
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, path, "must be a mapping", EXAMPLE)
            return None
        self._unknown(node, path, TOKEN_KEYS)
        entry, force = node.entries.get("source"), node.entries.get("force")
        forced = force is not None and not _is_null(force.value)
        if forced and force is not None:
            value = force.value.value if isinstance(force.value, Scalar) else None
            if type(value) is not bool:
                self.problems.add(force.value.mark, f"{path}.force", "must be true or false", "write one of them")
            forced = value is True
        source = self._token_source(entry.value, f"{path}.source") if entry and not _is_null(entry.value) else None
        if forced and source is None and (entry is None or _is_null(entry.value)):
            self.problems.add(node.mark, path, "force has nothing to force", EXAMPLE)
        return TokenRule(token, source, forced)

    def _token_source(self, node: Node, path: str) -> TokenSource | None:
        if isinstance(node, Scalar):
            model = self._listed(node, path)
            return TokenSource("model", model) if model else None
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, path, "must be a model or a mapping", EXAMPLE)
            return None
        if "kind" not in node.entries and ("path" in node.entries or isinstance(_value(node, "model"), Mapping)):
            return self._model(read_reference(node, path, self.problems), node, path)
        self._unknown(node, path, SOURCE_KEYS)
        values = {k: e.value for k, e in node.entries.items() if not _is_null(e.value)}
        kind = values.get("kind")
        name = kind.value if isinstance(kind, Scalar) else None
        if name not in KINDS:
            what = "kind is missing" if kind is None else f"unknown kind {said(kind)}"
            self.problems.add(kind.mark if kind else node.mark, f"{path}.kind", what, nearest(str(name), KINDS))
            return None
        if name == "zero":
            for key, given in node.entries.items():
                if key in SOURCE_KEYS and key != "kind" and key in values:
                    self.problems.add(given.key_mark, f"{path}.{key}", "has no meaning for kind zero", "remove it")
            return TokenSource("zero")
        return self._model_token(node, values, path)

    def _model_token(self, node: Mapping, values: dict[str, Node], path: str) -> TokenSource | None:
        model = values.get("model")
        reference = None
        if isinstance(model, Scalar):
            reference = self._listed(model, f"{path}.model")
        elif model is not None:
            reference = self._known(read_reference(model, f"{path}.model", self.problems), model, f"{path}.model")
        else:
            self.problems.add(node.mark, path, "model is missing", EXAMPLE)
        given = [k for k in ("token", "token_id") if k in values]
        if len(given) != 1:
            what = "names no token" if not given else "names the token twice"
            self.problems.add(node.mark, path, what, "give one of token and token_id")
            return None
        value = values[given[0]]
        content = value.value if isinstance(value, Scalar) else None
        good = isinstance(content, str) and content if given[0] == "token" else type(content) is int
        if not good or (isinstance(content, int) and not 0 <= content < MAX_ID):
            self.problems.add(value.mark, f"{path}.{given[0]}", f"{said(value)} is no {given[0]}", "write one")
            return None
        if reference is None:
            return None
        if isinstance(content, int):
            return TokenSource("model_token", reference, token_id=content)
        return TokenSource("model_token", reference, token=str(content))

    def _model(self, reference: ModelReference | None, node: Node, path: str) -> TokenSource | None:
        known = self._known(reference, node, path)
        return TokenSource("model", known) if known else None

    def _known(self, reference: ModelReference | None, node: Node, path: str) -> ModelReference | None:
        if reference is None or reference in self.known:
            return reference
        what = f"{shown(str(reference))} is no model of this recipe"
        self.problems.add(node.mark, path, what, "write a model exactly as the recipe names it")
        return None

    def _listed(self, node: Scalar, path: str) -> ModelReference | None:
        for reference in self.known:
            if str(reference) == node.value:
                return reference
        what = f"{shown(node.value)} is no model of this recipe"
        self.problems.add(node.mark, path, what, "write a model exactly as the recipe names it")
        return None

    def chat_template(self, node: Scalar | None) -> str | None:
        """``auto``, one of `TEMPLATES`, or a template in Jinja itself."""
        if node is None:
            return None
        value = node.value
        if isinstance(value, str) and (value in ("auto", *TEMPLATES) or "{{" in value or "{%" in value):
            return value
        fix = nearest(str(value), ("auto", *TEMPLATES)) + "; or write a template in Jinja"
        self.problems.add(node.mark, "chat_template", f"{shown(value)} is no chat template", fix)
        return None


KEYS = ("tokenizer_source", "tokenizer")


def _value(node: Mapping, key: str) -> Node | None:
    entry = node.entries.get(key)
    return entry.value if entry else None


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None
