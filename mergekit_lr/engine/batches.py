"""Units of work in an order that needs few shards at a time, cut where a disk budget would be passed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lr.engine.plan import Plan
from mergekit_lr.engine.units import Unit
from mergekit_lr.errors import ResourceError
from mergekit_lr.graph.nodes import Result
from mergekit_lr.sizes import format_size


@dataclass(frozen=True)
class Batch:
    """Units done together. ``needs``: input files that must be there; ``shards``: output files that are written to."""

    units: tuple[Unit, ...]
    needs: frozenset[Path]
    shards: frozenset[int]


class Needs:
    """What each unit of a plan reads of ``files``, and which output shards it writes to; looked up once a sink."""

    def __init__(self, plan: Plan, files: Collection[Path]) -> None:
        self.plan = plan
        self.checkpoints = [plan.inputs[name] for name in plan.graph.files]
        self._files = frozenset(files)
        self._inputs: dict[int, frozenset[Path]] = {}
        self._outputs: dict[int, frozenset[int]] = {}

    def inputs(self, unit: Unit) -> frozenset[Path]:
        known = self._inputs.get(unit.sink)
        if known is None:
            graph = self.plan.graph
            sources = graph.sources(graph.sinks[unit.sink])
            read = {path for m, name in sources for path in self.checkpoints[m].reads(name)}
            known = self._inputs[unit.sink] = self._files & read
        return known

    def outputs(self, unit: Unit) -> frozenset[int]:
        known = self._outputs.get(unit.sink)
        if known is None:
            graph, places = self.plan.graph, self.plan.layout.places
            value = graph.sinks[unit.sink].value
            sinks = graph.results[value.task] if isinstance(value, Result) else (unit.sink,)
            known = frozenset(places[graph.sinks[s].name].shard for s in sinks)
            self._outputs[unit.sink] = known
        return known


def in_file_order(plan: Plan, units: Sequence[Unit]) -> list[Unit]:
    """Output shard by output shard, which follows the files of the model whose layout the output has."""
    graph, places = plan.graph, plan.layout.places
    return sorted(units, key=lambda u: (places[graph.sinks[u.sink].name].shard, u.sink, u.start))


def make_batches(
    units: Sequence[Unit], needs: Needs, size: Mapping[Path, int], room: int | None, *, by_shard: bool
) -> list[Batch]:
    """Consecutive units together as long as the files that they read fit ``room``; every unit must, by itself.

    With ``by_shard`` a batch also ends where the next unit writes to another output file.
    """
    batches: list[Batch] = []
    taken: list[Unit] = []
    files: frozenset[Path] = frozenset()
    shards: frozenset[int] = frozenset()
    for unit in units:
        reads, writes = needs.inputs(unit), needs.outputs(unit)
        more = files if reads <= files else files | reads
        full = room is not None and more is not files and sum(size[p] for p in more) > room
        if taken and (full or (by_shard and not writes <= shards)):
            batches.append(Batch(tuple(taken), files, shards))
            taken, more, shards = [], reads, frozenset()
        taken.append(unit)
        files, shards = more, shards | writes
    if taken:
        batches.append(Batch(tuple(taken), files, shards))
    return batches


def live_bytes(units: Sequence[Unit], outputs: Callable[[Unit], frozenset[int]], size: Sequence[int]) -> int:
    """Most bytes of output files that are begun and not finished at once, when units are done in this order."""
    last = {shard: i for i, unit in enumerate(units) for shard in outputs(unit)}
    live: set[int] = set()
    most = 0
    for i, unit in enumerate(units):
        live |= outputs(unit)
        most = max(most, sum(size[s] for s in live))
        live -= {s for s in outputs(unit) if last[s] == i}
    return most


@dataclass(frozen=True)
class Room:
    """How a disk budget is divided: bytes for fetched inputs (None: no bound), and for output files."""

    inputs: int | None
    outputs: int
    background: bool  # whether a finished output may still be there while the next one is made


def least(plan: Plan, needs: Needs, size: Mapping[Path, int], *, releases: bool) -> tuple[int, int]:
    """Bytes of output files, and of input files of one unit, that must be on disk at once in any case."""
    shards = [s.size for s in plan.layout.shards]
    outputs = live_bytes(in_file_order(plan, plan.units), needs.outputs, shards) if releases else sum(shards)
    return outputs, max((sum(size[p] for p in needs.inputs(u)) for u in plan.units), default=0)


def divide(plan: Plan, needs: Needs, size: Mapping[Path, int], budget: int | None, *, releases: bool) -> Room:
    """Split the budget. With ``releases`` finished output files leave the disk; without, all of them stay.

    Raises:
        ResourceError: it is too small; the message says how much is needed.
    """
    outputs, inputs = least(plan, needs, size, releases=releases)
    if budget is None:
        return Room(None, outputs, True)
    if outputs + inputs > budget:
        kept = "the output files that are open at once" if releases else "the output"
        raise ResourceError(
            "the disk budget is too small",
            where=f"--disk-budget {format_size(budget)}",
            why=f"{format_size(outputs)} for {kept} and {format_size(inputs)} for the inputs of one unit of work",
            fix=f"allow at least --disk-budget {outputs + inputs}"
            + ("" if releases else ", or --push the output so that finished files can be released"),
        )
    spare = max((s.size for s in plan.layout.shards), default=0) if releases else 0
    if budget >= outputs + inputs + spare:
        return Room(budget - outputs - spare, outputs + spare, True)
    return Room(budget - outputs, outputs, False)
