"""A strict subset of YAML 1.2, with a position for every node.

PyYAML's scanner and parser are used; its composer and constructor are not, for what they let pass: duplicate
keys vanish, ``1e-3`` is a string, ``no`` is false, a few hundred bytes of aliases expand to millions of nodes, and
deep nesting ends in a RecursionError after seconds. Here events become nodes under fixed limits, without
recursion, and everything but the scalars of YAML 1.2's core schema is refused.

Source: YAML 1.2.2, chapter 10.3 (core schema), https://yaml.org/spec/1.2.2/
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from mergekit_lr.recipe.problems import Mark, Problems, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000
MAX_INTEGER = 2**63

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,400}")
_OCT = re.compile(r"0o[0-7]{1,400}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")

Value = None | bool | int | float | str


@dataclass(slots=True)
class Scalar:
    """One value of the core schema."""

    value: Value
    mark: Mark | None


@dataclass(slots=True)
class Sequence:
    """A list of nodes."""

    items: list[Node]
    mark: Mark | None


@dataclass(slots=True)
class Entry:
    """A key of a mapping with its own position, and the node under it."""

    key_mark: Mark | None
    value: Node


@dataclass(slots=True)
class Mapping:
    """Entries by key, in the order of the text."""

    entries: dict[str, Entry]
    mark: Mark | None


Node = Scalar | Sequence | Mapping


def said(node: Node) -> str:
    """What a message calls a value that is not what it should be."""
    if isinstance(node, Scalar):
        return shown(node.value)
    return "a list" if isinstance(node, Sequence) else "a mapping"


def scalar(text: str) -> Value:
    """The value of a plain scalar by the core schema: null, bool, int, float, otherwise the string itself."""
    if len(text) > 400:
        return text
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _OCT.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if m := _INF.fullmatch(text):
        return float(m[1] + "inf")
    return float("nan") if _NAN.fullmatch(text) else text


@dataclass(slots=True)
class _Open:
    """A collection that is being filled. ``size`` counts nodes after aliases are expanded, ``height`` levels."""

    node: Sequence | Mapping
    anchor: str | None
    size: int = 1
    height: int = 0
    key: str | None = None
    key_mark: Mark | None = None
    expects_key: bool = True


@dataclass(slots=True)
class _Known:
    """A finished node that an alias may repeat."""

    node: Node
    size: int
    height: int


class _Stop(Exception):
    """Reading on makes no sense; the problem is already noted."""


@dataclass(slots=True)
class Document:
    """One document of a file: its root, and the lines of the text that it takes (from 1, the last not included)."""

    root: Node | None
    first: int
    end: int | None = None


@dataclass
class _Composer:
    problems: Problems
    many: bool = False
    documents: list[Document] = field(default_factory=list)
    anchors: dict[str, _Known] = field(default_factory=dict)
    stack: list[_Open] = field(default_factory=list)
    nodes: int = 0

    def feed(self, event: Event) -> None:
        mark = _mark(event)
        if isinstance(event, DocumentStartEvent):
            if self.documents and not self.many:
                self._stop(mark, "a second YAML document starts here", "give each recipe its own file")
            if self.documents:
                self.documents[-1].end = mark.line
            self.documents.append(Document(None, mark.line))
            self.anchors = {}  # an alias reaches no further than its document
        elif isinstance(event, AliasEvent):
            self._alias(event, mark)
        elif isinstance(event, ScalarEvent):
            self._refuse_tag(event.tag, mark)
            value: Value = scalar(event.value) if event.implicit[0] else event.value
            if type(value) is int and abs(value) >= MAX_INTEGER:
                self.problems.add(mark, "", f"{shown(value)} is too large a number", "use one below 2^63")
                value = 0
            self._place(Scalar(value, mark), event.anchor, 1, 0, event.value)
        elif isinstance(event, SequenceStartEvent | MappingStartEvent):
            self._open(event, mark)
        elif isinstance(event, SequenceEndEvent | MappingEndEvent):
            done = self.stack.pop()
            self._place(done.node, done.anchor, done.size, done.height + 1, None)

    def _open(self, event: SequenceStartEvent | MappingStartEvent, mark: Mark) -> None:
        self._refuse_tag(event.tag, mark)
        if len(self.stack) >= MAX_DEPTH:
            self._stop(mark, f"nested deeper than {MAX_DEPTH} levels", "a recipe needs no more than eight")
        if self._at_key():
            self._stop(mark, "a key must be a plain word, not a list or a mapping", "quote it if it is text")
        node: Sequence | Mapping = Mapping({}, mark) if isinstance(event, MappingStartEvent) else Sequence([], mark)
        self.stack.append(_Open(node, event.anchor))

    def _at_key(self) -> bool:
        """The next node is a key of a mapping."""
        return bool(self.stack) and isinstance(self.stack[-1].node, Mapping) and self.stack[-1].expects_key

    def _alias(self, event: AliasEvent, mark: Mark) -> None:
        anchor = event.anchor or ""
        known = self.anchors.get(anchor)
        if known is None:
            inside = any(o.anchor == anchor for o in self.stack)
            what = "refers to the value that it is part of" if inside else "has no anchor above it"
            self._stop(mark, f"alias *{anchor[:40]} {what}", "write the value out")
        text = str(known.node.value) if isinstance(known.node, Scalar) else None
        if text is None and self._at_key():
            self._stop(mark, "a key must be a plain word, not an alias", "write the key out")
        self._place(known.node, None, known.size, known.height, text, mark)

    def _place(
        self, node: Node, anchor: str | None, size: int, height: int, key: str | None, mark: Mark | None = None
    ) -> None:
        """Put a finished node where it belongs. ``key`` is its text if it may be a mapping's key."""
        mark = mark or node.mark
        if anchor is not None:
            self.anchors[anchor] = _Known(node, size, height)
        # Collections were counted entry by entry; an alias adds all that it repeats.
        self.nodes += size if anchor is None and mark is not node.mark else 1
        if self.nodes > MAX_NODES or size > MAX_NODES:
            self._stop(mark, f"more than {MAX_NODES:,} values once aliases are expanded", "split the recipe")
        if len(self.stack) + height > MAX_DEPTH:
            self._stop(mark, f"nested deeper than {MAX_DEPTH} levels", "a recipe needs no more than eight")
        if not self.stack:
            self.documents[-1].root = node
            return
        parent = self.stack[-1]
        parent.size += size
        parent.height = max(parent.height, height)
        if isinstance(parent.node, Sequence):
            parent.node.items.append(node)
        elif parent.expects_key:
            parent.key, parent.key_mark, parent.expects_key = key, mark, False
        else:
            self._enter(parent, parent.node, node)

    def _enter(self, parent: _Open, mapping: Mapping, node: Node) -> None:
        key = parent.key
        assert key is not None
        parent.expects_key = True
        first = mapping.entries.get(key)
        if key == "<<":
            self.problems.add(parent.key_mark, "", "merge keys (<<) are not part of YAML 1.2", "write the keys out")
        elif first is not None:
            at = f"line {first.key_mark.line}" if first.key_mark else "above"
            self.problems.add(
                parent.key_mark, "", f"the key {shown(key)} is given twice", f"remove one; the first is on {at}"
            )
        else:
            mapping.entries[key] = Entry(parent.key_mark, node)

    def _refuse_tag(self, tag: str | None, mark: Mark) -> None:
        if tag is not None:
            self.problems.add(mark, "", f"the tag {shown(tag)} is not allowed", "remove the tag")

    def _stop(self, mark: Mark | None, what: str, fix: str) -> NoReturn:
        self.problems.add(mark, "", what, fix)
        raise _Stop


def _mark(event: Event) -> Mark:
    at = event.start_mark
    return Mark(at.line + 1, at.column + 1) if at else Mark(1, 1)


def _events(text: str, problems: Problems) -> Iterator[Event]:
    """PyYAML's events; a syntax error ends them and becomes a problem."""
    try:
        yield from yaml.parse(text, Loader=LOADER)
    except yaml.MarkedYAMLError as e:
        at = e.problem_mark or e.context_mark
        mark = Mark(at.line + 1, at.column + 1) if at else None
        what = " ".join(str(e.problem or e.context or "cannot be read").split())
        problems.add(mark, "", f"not valid YAML: {what}", "check indentation, quotes and brackets here")
    except yaml.YAMLError as e:
        problems.add(None, "", f"not valid YAML: {' '.join(str(e).split())[:200]}", "remove that character")


def decode(data: bytes, problems: Problems) -> str:
    """UTF-8 text of at most `MAX_BYTES`; otherwise a problem and an empty string."""
    if len(data) > MAX_BYTES:
        problems.add(None, "", f"larger than {MAX_BYTES:,} bytes", "a recipe is a small text file; is this one?")
        return ""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        column = e.start - (data.rfind(b"\n", 0, e.start) + 1) + 1
        problems.add(Mark(line, column), "", f"byte 0x{data[e.start]:02x} is not UTF-8", "save the file as UTF-8")
        return ""


def parse(text: str, problems: Problems) -> Node | None:
    """The single document in ``text`` as nodes; what is wrong with it goes to ``problems``.

    None if there is no document, or if reading had to stop. Time and memory are bounded by the length of the
    text and by `MAX_NODES`, whatever the text holds.
    """
    found = _compose(text, problems, many=False)
    return found[0].root if found else None


def parse_documents(text: str, problems: Problems) -> list[Document]:
    """Every document in ``text``; those without content are left out. Bounded as in `parse`, all together."""
    return [d for d in _compose(text, problems, many=True) if not _empty(d.root)]


def _empty(root: Node | None) -> bool:
    return root is None or (isinstance(root, Scalar) and root.value is None)


def _compose(text: str, problems: Problems, *, many: bool) -> list[Document]:
    composer = _Composer(problems, many)
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as e:
        before = text[: e.start]
        mark = Mark(before.count("\n") + 1, e.start - before.rfind("\n"))
        problems.add(mark, "", "half of a surrogate pair is not a character", "remove it")
        return []
    if size > MAX_BYTES:
        problems.add(None, "", f"larger than {MAX_BYTES:,} bytes", "a recipe is a small text; is this one?")
        return []
    try:
        for event in _events(text, problems):
            composer.feed(event)
    except _Stop:
        return []
    return composer.documents
