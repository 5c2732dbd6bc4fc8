"""The merge graph: what is computed from what, as plain data.

Expressions are nested and immutable; equal ones are one node. Three kinds: *sources* (`Source`), *operations*
(`Operation`, with the conversions `Delta` and `Restore`, and `Artifact` for what must be known of the whole
model first; `Task`, whose outputs are `Result`s) and *sinks* (`Sink`: a named place in the output).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from mergekit_lr.method import Call, Space


class Source(NamedTuple):
    """Tensor ``tensor`` of input ``model`` (its index among the graph's `files`)."""

    model: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Delta:
    """``value - base``: a task vector."""

    value: Source
    base: Source


@dataclass(frozen=True, slots=True)
class Artifact:
    """Statistics of a method over all tensors it merges; computed before any of them is written."""

    method: str


@dataclass(frozen=True, slots=True)
class Operation:
    """A method applied to its inputs, in the space that it declares.

    ``companions``: what is read beside each input, in their order, or nothing. ``whole``: elements of those that
    are not cut with the tensor.
    """

    method: str
    call: Call
    inputs: tuple[Source | Delta, ...]
    base: Source | None
    space: Space
    artifact: Artifact | None = None
    companions: tuple[Source, ...] = ()
    whole: int = 0


@dataclass(frozen=True, slots=True)
class Restore:
    """``base + value``: back from a task vector to weights."""

    value: Operation
    base: Source


@dataclass(frozen=True, slots=True)
class Task:
    """One computation over whole tensors with one or more outputs, by a method that lays out its own output.

    ``key`` is unique in the graph. ``call`` is plain, hashable data: whatever the method must know beside its
    inputs. A worker holds about ``fixed`` bytes for it, and ``held`` fp32 tensors of `Desk.step` elements.
    """

    method: str
    key: str
    inputs: tuple[Source, ...]
    call: Any
    fixed: int = 0
    held: int = 4


@dataclass(frozen=True, slots=True)
class Result:
    """Output ``index`` of the graph's task number ``task``."""

    task: int
    index: int


Expression: TypeAlias = Source | Delta | Operation | Restore | Result


@dataclass(frozen=True, slots=True)
class Sink:
    """One output tensor. ``rule`` names how it came about: ``merged``, or ``copied: <why>``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: Expression
    rule: str


OUTSIDE_SLICES = "outside the slices"
OUTSIDE_MODULES = "outside the modules"
LEFT_OUT = (OUTSIDE_SLICES, OUTSIDE_MODULES)
"""Rules of input tensors that the recipe leaves out on purpose."""


@dataclass(frozen=True)
class MergeGraph:
    """Everything that will be written, and everything that will not and why.

    ``models``: references of the inputs, by index. ``dropped``: (model, tensor, rule) of every input tensor that
    no output takes. ``layers``: for each part whose layers were picked anew, and each of its output layers, the model
    (its index) and the layer that names and config come from. ``tasks``: computations that several outputs are
    `Result`s of.
    """

    models: tuple[str, ...]
    sinks: tuple[Sink, ...]
    dropped: tuple[tuple[str, str, str], ...] = ()
    layers: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    tasks: tuple[Task, ...] = ()
    companions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for sink in self.sinks:
            if isinstance(sink.value, Result) and not 0 <= sink.value.task < len(self.tasks):
                raise ValueError(f"{sink.name!r} is a result of no task of this graph")
        keys = [t.key for t in self.tasks]
        if len(set(keys)) < len(keys):
            raise ValueError("two tasks have one key")

    @property
    def files(self) -> tuple[str, ...]:
        """Everything that is read: the models, then the companions."""
        return self.models + self.companions

    def sources(self, sink: Sink) -> list[Source]:
        """Every tensor that is read for an output, each once, in order; for a result, those of the whole task."""
        if isinstance(sink.value, Result):
            return list(dict.fromkeys(self.tasks[sink.value.task].inputs))
        return sources_of(sink.value)

    @cached_property
    def results(self) -> Mapping[int, tuple[int, ...]]:
        """The sinks of each task, in the order of its outputs."""
        found: dict[int, list[tuple[int, int]]] = {}
        for number, sink in enumerate(self.sinks):
            if isinstance(sink.value, Result):
                found.setdefault(sink.value.task, []).append((sink.value.index, number))
        return {task: tuple(n for _, n in sorted(places)) for task, places in found.items()}

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """Every operation, in output order."""
        found = (operation_of(s.value) for s in self.sinks)
        return tuple(o for o in found if o is not None)

    @cached_property
    def artifacts(self) -> tuple[Artifact, ...]:
        return tuple(sorted({o.artifact for o in self.operations if o.artifact}, key=lambda a: a.method))

    @cached_property
    def digest(self) -> str:
        """sha256 over the whole graph: two graphs with one digest do the same."""
        h = hashlib.sha256()
        for sink in self.sinks:
            h.update(repr(sink).encode())
        for task in self.tasks:
            h.update(repr(task).encode())
        h.update(json.dumps([self.files, self.dropped, self.layers]).encode())
        return h.hexdigest()

    def rules(self) -> dict[str, int]:
        """How many tensors each rule accounts for."""
        out: dict[str, int] = {}
        for rule in [s.rule for s in self.sinks] + [f"dropped: {d[2]}" for d in self.dropped]:
            out[rule] = out.get(rule, 0) + 1
        return out

    def lines(self) -> Iterator[str]:
        """The graph in words, one output tensor a line."""
        for s in self.sinks:
            yield f"{s.name} [{'x'.join(map(str, s.shape))}] {s.dtype} = {self.show(s.value)}"

    def show(self, node: Expression) -> str:
        if isinstance(node, Source):
            return f"{self.files[node.model]}:{node.tensor}"
        if isinstance(node, Delta):
            return f"({self.show(node.value)} - {self.show(node.base)})"
        if isinstance(node, Result):
            task = self.tasks[node.task]
            return f"{task.method}[{node.index}]({', '.join(self.show(i) for i in task.inputs)})"
        if isinstance(node, Restore):
            return f"{self.show(node.base)} + {self.show(node.value)}"
        return f"{node.method}({', '.join(self.show(i) for i in (*node.inputs, *node.companions))})"


def operation_of(node: Expression) -> Operation | None:
    """The operation in an output's expression, if it has one."""
    if isinstance(node, Restore):
        return node.value
    return node if isinstance(node, Operation) else None


def sources_of(node: Expression) -> list[Source]:
    """Every tensor that an expression reads, each once, in order; a `Result` must be asked of its graph."""
    assert not isinstance(node, Result), "see MergeGraph.sources"
    if isinstance(node, Source):
        return [node]
    if isinstance(node, Delta):
        return list(dict.fromkeys((node.value, node.base)))
    found = []
    if isinstance(node, Restore):
        found.append(node.base)
        node = node.value
    if node.base:
        found.append(node.base)
    for i in node.inputs:
        if isinstance(i, Delta):
            found.append(i.value)
            if i.base is not found[0]:
                found.append(i.base)
        else:
            found.append(i)
    found += node.companions
    return list(dict.fromkeys(found))


def space_of(node: Expression) -> Space:
    """What numbers a node gives."""
    if isinstance(node, Delta):
        return Space.DELTA
    if isinstance(node, Operation):
        return node.space
    return Space.WEIGHT
