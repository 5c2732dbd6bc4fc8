"""How much memory a run may take, and what a piece costs."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from mergekit_lr.errors import ResourceError
from mergekit_lr.graph.nodes import MergeGraph, Sink, operation_of, sources_of
from mergekit_lr.method import GRID, Slicing
from mergekit_lr.pieces import element_count

PIECE = 1 << 18  # elements: a working set that stays near the cores' caches
DEVICE_PIECE = 1 << 23  # on a GPU pieces are large enough to fill it
TEMPORARIES = 6  # fp32 tensors of a piece's size that a method may hold beside its inputs
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's mallopt parameters


@dataclass(frozen=True)
class Budget:
    """Bytes for tensor data over all workers, the workers, and the elements of a piece that follow from it."""

    limit: int
    threads: int
    piece: int

    def peak(self, graph: MergeGraph, slicing: dict[int, Slicing]) -> int:
        """Bytes that the workers hold at most: their pieces, or the largest tensor that cannot be cut."""
        cost = max((piece_cost(s) for s in graph.sinks), default=0)
        uncut = max((uncut_bytes(graph.sinks[i]) for i, how in slicing.items() if how is Slicing.NONE), default=0)
        return max(self.threads * self.piece * cost, uncut)


def piece_cost(sink: Sink) -> int:
    """Bytes per element of one piece in work: each input raw and in fp32, temporaries, the output."""
    operation = operation_of(sink.value)
    if operation is None:
        return 8
    inputs = len(sources_of(sink.value))
    return inputs * 8 + (len(operation.inputs) + TEMPORARIES) * 4 + 8


def uncut_bytes(sink: Sink) -> int:
    return element_count(sink.shape) * piece_cost(sink)


def default_limit() -> int:
    """Half of what the machine has free, at most 8 GiB."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 8 << 30
    return max(256 << 20, min(8 << 30, free // 2))


def make_budget(
    graph: MergeGraph, slicing: dict[int, Slicing], limit: int | None, threads: int | None, device: str
) -> Budget:
    """Choose workers and piece size so that a run keeps to ``limit`` bytes.

    Raises:
        ResourceError: a tensor that its method cannot cut does not fit; the message says what would.
    """
    limit = limit or default_limit()
    largest = DEVICE_PIECE if device != "cpu" else PIECE
    cost = max((piece_cost(s) for s in graph.sinks), default=8)
    workers = threads or available_cpus()
    while workers > 1 and workers * GRID * cost > limit:
        workers -= 1
    piece = min(largest, limit // (workers * cost) // GRID * GRID)
    uncut = [(uncut_bytes(graph.sinks[i]), i) for i, how in slicing.items() if how is Slicing.NONE]
    needed, at = max(uncut, default=(0, -1))
    if piece < GRID:
        needed, at = GRID * cost, -1
    if needed > limit or piece < GRID:
        name = graph.sinks[at].name if at >= 0 else "the smallest piece"
        raise ResourceError(
            f"{name!r} needs {needed / 2**20:.0f} MiB",
            where="memory budget",
            why=f"{limit / 2**20:.0f} MiB are allowed",
            fix=f"allow at least --max-memory {-(-needed // 2**20)}MiB",
        )
    return Budget(limit, workers, piece)


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks instead of returning each to the kernel.

    Every temporary of a piece would otherwise be a fresh mapping, and its page faults cost more than the
    arithmetic. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, 256 << 20)
    mallopt(_TRIM_THRESHOLD, 256 << 20)
