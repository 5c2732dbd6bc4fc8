"""Which units are done together: parts of a run on machines that share nothing but a folder, and tasks of a cluster.

Units are taken in the order of the output's bytes, so that a share lies in as few files as it can, and are cut where
the bytes that they read and write are even. The same plan is cut in the same way everywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.engine.plan import Plan
from mergekit_lr.engine.portion import byte_range
from mergekit_lr.engine.units import Unit
from mergekit_lr.graph.nodes import Result

BLOCK = 64 << 10
"""Two machines may damage each other's bytes within a page: a client of a network file system can write back a whole
one where it changed a few bytes. No page is larger than this."""


@dataclass(frozen=True)
class Load:
    """Units that only one worker can do: a single one, or all results of a task. ``cost``: bytes read and written."""

    units: tuple[Unit, ...]
    cost: int


def loads_of(plan: Plan) -> list[Load]:
    """All units in the order of the output's bytes; a task stands where its first result does."""
    ordered = sorted(plan.units, key=lambda u: byte_range(plan, u)[0])
    found: list[list[Unit]] = []
    tasks: dict[int, list[Unit]] = {}
    for unit in ordered:
        value = plan.graph.sinks[unit.sink].value
        if isinstance(value, Result):
            if value.task in tasks:
                tasks[value.task].append(unit)
                continue
            found.append(tasks.setdefault(value.task, [unit]))
        else:
            found.append([unit])
    return [Load(tuple(units), _cost(plan, units)) for units in found]


def _cost(plan: Plan, units: Sequence[Unit]) -> int:
    """Bytes written, and read: of a slice the same share of every input as of the output."""
    sink = plan.graph.sinks[units[0].sink]
    sources = plan.graph.sources(sink)
    tensors = [plan.inputs[plan.graph.files[s.model]].tensors[s.tensor] for s in sources]
    written = sum(byte_range(plan, u)[1] for u in units)
    if isinstance(sink.value, Result):
        return written + sum(t.nbytes for t in tensors)
    elements = units[0].stop - units[0].start
    return written + sum(min(t.nbytes, elements * ITEM_BYTES[t.dtype]) for t in tensors)


def cut(plan: Plan, count: int) -> list[list[Unit]]:
    """All units in ``count`` runs whose costs are as even as single units let them be; a run may be empty.

    A load belongs to the run in whose share of the total cost its middle lies.
    """
    loads = loads_of(plan)
    total = sum(b.cost for b in loads) or 1
    shares: list[list[Unit]] = [[] for _ in range(count)]
    for load, end in zip(loads, accumulate(b.cost for b in loads), strict=True):
        middle = end - load.cost / 2
        shares[min(count - 1, int(middle * count / total))] += load.units
    return shares


def groups_of(plan: Plan, count: int, least: int, most: int) -> list[list[Unit]]:
    """All units in runs of about a ``count``-th of the total cost, within ``least .. most``, each in one file.

    A tensor that is larger than that is in several runs, where its method can cut it.
    """
    loads = loads_of(plan)
    target = min(most, max(least, sum(load.cost for load in loads) // max(1, count)))
    groups: list[list[Unit]] = []
    room, shard = 0, -1
    for load in loads:
        at = byte_range(plan, load.units[0])[0][0]
        if not groups or room < load.cost or at != shard:
            groups.append([])
            room, shard = target, at
        groups[-1] += load.units
        room -= load.cost
    return groups


def touching(plan: Plan, shares: Sequence[Sequence[Unit]]) -> list[Unit]:
    """Units that lie in one `BLOCK` of a file with a unit of another share, in the order of the output's bytes."""
    everything = [(*byte_range(plan, u), i, u) for i, share in enumerate(shares) for u in share]
    placed = sorted((p for p in everything if p[1]), key=lambda p: (p[0], p[1]))
    starts = [(place[0], place[1]) for place, *_ in placed]
    found: dict[Unit, None] = {}
    for (place, _, owner, _), (following, _, other, _) in pairwise(placed):
        if following[0] != place[0] or other == owner or following[1] % BLOCK == 0:
            continue
        block = following[1] // BLOCK * BLOCK
        first = bisect_right(starts, (place[0], block)) - 1
        last = bisect_right(starts, (place[0], block + BLOCK - 1))
        found.update((placed[i][3], None) for i in range(max(first, 0), last) if placed[i][0][0] == place[0])
    return list(found)
