"""Units of work: an output tensor, or a run of whole chunks of one where the method lets parts stand alone."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.checkpoint.layout import nbytes_of
from mergekit_lr.engine.digest import CHUNK
from mergekit_lr.graph.nodes import MergeGraph, Result, Sink, operation_of
from mergekit_lr.method import Slicing
from mergekit_lr.pieces import element_count
from mergekit_lr.registry import tensor_method


@dataclass(frozen=True, slots=True)
class Unit:
    """Elements ``start .. stop`` of sink number ``sink``. Whoever does one result of a task does all of them."""

    sink: int
    start: int
    stop: int

    def key(self, graph: MergeGraph) -> str:
        return f"{graph.sinks[self.sink].name}@{self.start}"


def slicing_of(sink: Sink) -> Slicing:
    operation = operation_of(sink.value)
    if operation is None:
        return Slicing.ELEMENTWISE
    return tensor_method(operation.method).slicing(operation.call.merge)


def stands_alone(sink: Sink) -> bool:
    """Whether parts of the tensor can be merged without having looked at the rest."""
    operation = operation_of(sink.value)
    if operation is None:
        return not isinstance(sink.value, Result)
    if slicing_of(sink) is not Slicing.ELEMENTWISE:
        return False
    statistics = tensor_method(operation.method).statistics(operation.call, None)
    if statistics is not None:
        statistics.close()
    return statistics is None


def units_of(graph: MergeGraph, threads: int, searched: Container[int] = ()) -> list[Unit]:
    """All units, in an order that follows the reference's bytes on disk, large ones first.

    ``searched``: models (by index) of which every reader must first look at the whole tensor, so that it is better
    read by one.

    A tensor that is a sizeable part of a worker's share goes first, so that no worker is left with it at the end.
    """
    units: list[Unit] = []
    total = sum(nbytes_of(s) for s in graph.sinks)
    for i, sink in enumerate(graph.sinks):
        n = element_count(sink.shape)
        step = CHUNK // ITEM_BYTES[sink.dtype]
        whole = any(s.model in searched for s in graph.sources(sink)) if searched else False
        if n > step and not whole and stands_alone(sink):
            units += [Unit(i, a, min(n, a + step)) for a in range(0, n, step)]
        else:
            units.append(Unit(i, 0, n))
    return largest_first(units, graph.sinks, total // max(1, 16 * threads))


def pending(units: Sequence[Unit], graph: MergeGraph, done: Container[str]) -> list[Unit]:
    """Units that are not done, one for each task of which any result is not."""
    found: list[Unit] = []
    tasks: set[int] = set()
    for unit in units:
        if unit.key(graph) in done:
            continue
        value = graph.sinks[unit.sink].value
        if isinstance(value, Result):
            if value.task in tasks:
                continue
            tasks.add(value.task)
        found.append(unit)
    return found


def largest_first(units: Sequence[Unit], sinks: Sequence[Sink], threshold: int) -> list[Unit]:
    def size(u: Unit) -> int:
        return (u.stop - u.start) * ITEM_BYTES[sinks[u.sink].dtype]

    large = [u for u in units if size(u) > threshold]
    return sorted(large, key=lambda u: -size(u)) + [u for u in units if size(u) <= threshold]
