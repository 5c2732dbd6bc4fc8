"""A graph of a hundred thousand tensors in a page: layers that are made alike as one block, experts as one row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_lr.arch.layers import layer_of
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.layout import nbytes_of
from mergekit_lr.graph.nodes import Delta, MergeGraph, Operation, Restore, Result, Sink, operation_of

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Row:
    """Tensors of one layer that differ only in a number in their names; bytes are those of one layer.

    ``action``: what makes them, with the space of what goes in; for a dropped tensor the rule.
    """

    kind: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    action: str
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Block:
    """Consecutive layers whose rows are the same. ``models``: bytes read of each file of the graph, over all layers."""

    title: str
    layers: int
    rows: tuple[Row, ...]
    models: tuple[int, ...]

    @property
    def bytes_in(self) -> int:
        return self.layers * sum(r.bytes_in for r in self.rows)

    @property
    def bytes_out(self) -> int:
        return self.layers * sum(r.bytes_out for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``plan --json`` prints it."""
        return {
            "title": self.title,
            "layers": self.layers,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "tensors": [
                {
                    "kind": r.kind,
                    "count": r.count,
                    "shape": list(r.shape),
                    "dtype": r.dtype,
                    "action": r.action,
                    "bytes_in": r.bytes_in,
                    "bytes_out": r.bytes_out,
                }
                for r in self.rows
            ],
        }


_Key = tuple[str, tuple[int, ...], str, str]


@dataclass
class _Layer:
    """Rows of one layer while they are counted: [count, bytes in, bytes out] by what is alike."""

    rows: dict[_Key, list[int]] = field(default_factory=dict)
    models: dict[int, int] = field(default_factory=dict)

    def add(self, key: _Key, bytes_in: int, bytes_out: int) -> None:
        row = self.rows.setdefault(key, [0, 0, 0])
        row[0] += 1
        row[1] += bytes_in
        row[2] += bytes_out

    def finished(self) -> tuple[Row, ...]:
        return tuple(Row(k[0], n, k[1], k[2], k[3], a, b) for k, (n, a, b) in sorted(self.rows.items()))


def summarise(graph: MergeGraph, tensors: Sequence[Mapping[str, TensorInfo]]) -> list[Block]:
    """The blocks of a graph, in the order of the layers; ``tensors`` holds those of each of the graph's files."""
    layers: dict[tuple[str, int], _Layer] = {}
    number = {name: i for i, name in enumerate(graph.files)}
    for sink in graph.sinks:
        place, kind = _placed(sink.name)
        layer = layers.setdefault(place, _Layer())
        read = 0
        if not isinstance(sink.value, Result) or sink.value.index == 0:
            for model, name in graph.sources(sink):
                nbytes = tensors[model][name].nbytes
                read += nbytes
                layer.models[model] = layer.models.get(model, 0) + nbytes
        layer.add((kind, sink.shape, sink.dtype, action_of(graph, sink)), read, nbytes_of(sink))
    for reference, name, rule in graph.dropped:
        place, kind = _placed(name)
        info = tensors[number[reference]].get(name) if reference in number else None
        shape, dtype = (info.shape, info.dtype) if info is not None else ((), "")
        layers.setdefault(place, _Layer()).add((kind, shape, dtype, f"dropped: {rule}"), 0, 0)
    return _blocks(layers, len(graph.files))


def _placed(name: str) -> tuple[tuple[str, int], str]:
    place = layer_of(name)
    if place is None:
        return ("", -1), name
    return place, _NUMBER.sub("*", name[len(f"{place[0]}.{place[1]}.") - 1 :])[1:]


def _blocks(layers: Mapping[tuple[str, int], _Layer], models: int) -> list[Block]:
    runs: list[tuple[str, int, int, tuple[Row, ...], list[int]]] = []
    for (stack, index), layer in sorted(layers.items()):
        rows = layer.finished()
        if runs and runs[-1][0] == stack and runs[-1][2] + 1 == index and runs[-1][3] == rows:
            read = runs.pop()
            first, total = read[1], read[4]
        else:
            first, total = index, [0] * models
        for model, nbytes in layer.models.items():
            total[model] += nbytes
        runs.append((stack, first, index, rows, total))
    return [Block(_title(s, a, b), b - a + 1, rows, tuple(total)) for s, a, b, rows, total in runs]


def _title(stack: str, first: int, last: int) -> str:
    if first < 0:
        return OUTSIDE
    return f"{stack}.{first}" if first == last else f"{stack}.{first} to {last}"


def action_of(graph: MergeGraph, sink: Sink) -> str:
    """What makes an output tensor, in words: the method, the spaces of its inputs, or the rule of a copy."""
    value = sink.value
    if isinstance(value, Result):
        task = graph.tasks[value.task]
        return f"{task.method}: {sink.rule.removeprefix('copied: ')}"
    operation = operation_of(value)
    if operation is None:
        return sink.rule
    return ("base + " if isinstance(value, Restore) else "") + _called(operation)


def _called(operation: Operation) -> str:
    deltas = sum(isinstance(i, Delta) for i in operation.inputs)
    weights = len(operation.inputs) - deltas
    parts = [f"{n} {what}{'s' if n > 1 else ''}" for n, what in ((deltas, "delta"), (weights, "weight")) if n]
    if operation.companions:
        parts.append(f"{len(operation.companions)} beside")
    first = ", statistics of all tensors first" if operation.artifact is not None else ""
    return f"{operation.method}({', '.join(parts)}){first}"
