"""How much memory a run may take, and what a piece costs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from mergekit_lr.engine.machine import free_memory, usable_cpus
from mergekit_lr.errors import ResourceError
from mergekit_lr.graph.nodes import MergeGraph, Operation, Result, Sink, operation_of, sources_of
from mergekit_lr.method import GRID, Slicing
from mergekit_lr.pieces import element_count

PIECE = 2 * GRID  # elements that a method sees at once: what it works on stays in the core's caches
READ = 1 << 19  # elements read and written by one system call
DEVICE_PIECE = 1 << 23  # on a GPU pieces are large enough to fill it
TEMPORARIES = 6  # fp32 tensors of a piece's size that a method may hold beside its inputs
SYSTEM = 6  # fp64 matrices of a Gram's size: the sum, its eigenvectors, products, LAPACK's own room
LEAST_LIMIT, MOST_LIMIT = 256 << 20, 8 << 30  # bytes between which the default budget lies
SURPLUS = 24 << 20  # bytes of freed blocks that a process may keep from one unit to the next
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's mallopt parameters


class _Blocks(ctypes.Structure):
    """glibc's ``struct mallinfo2``; ``fordblks`` are bytes in free blocks."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


@dataclass(frozen=True)
class Budget:
    """Bytes for tensor data over all workers, and what follows: workers, elements of a piece and of a read."""

    limit: int
    threads: int
    piece: int
    read: int
    peak: int


def worker_bytes(graph: MergeGraph, sink: Sink, piece: int, read: int) -> int:
    """What one worker holds for pieces of ``sink``: inputs as read, inputs in fp32, temporaries, the output.

    For a result of a task: what the task says of itself.
    """
    if isinstance(sink.value, Result):
        task = graph.tasks[sink.value.task]
        return task.fixed + task.held * 4 * read
    operation = operation_of(sink.value)
    inputs = len(sources_of(sink.value))
    widened = 0 if operation is None else (inputs + len(operation.inputs) + TEMPORARIES) * 4 * piece
    return (inputs * 4 + 4) * read + widened + (_whole_bytes(operation) if operation else 0)


def _whole_bytes(operation: Operation) -> int:
    """Companions that are held whole: as read, and the fp64 system that is made of them and solved."""
    if not operation.whole:
        return 0
    return 4 * operation.whole + SYSTEM * 8 * operation.whole // len(operation.companions)


def default_limit() -> int:
    """Half of what this process can still have, at most 8 GiB, at least 256 MiB; see `free_memory`."""
    return max(LEAST_LIMIT, min(MOST_LIMIT, free_memory().amount // 2))


def make_budget(
    graph: MergeGraph,
    slicing: Mapping[int, Slicing],
    limit: int | None,
    threads: int | None,
    device: str,
    beside: Callable[[int, int], int] = lambda piece, read: 0,
) -> Budget:
    """Choose workers, piece and read sizes so that a run keeps to ``limit`` bytes.

    ``beside``: what each worker holds beside its own outputs, for pieces and reads of so many elements.

    Raises:
        ResourceError: a tensor or a row that its method cannot cut does not fit; the message says what would.
    """
    limit = limit or default_limit()
    piece = DEVICE_PIECE if device != "cpu" else PIECE
    read = max(piece, READ)
    workers = threads or available_cpus()
    heaviest = max(graph.sinks, key=lambda s: worker_bytes(graph, s, piece, read))

    def peak() -> int:
        usual = worker_bytes(graph, heaviest, piece, read)
        most = max([usual, *(worker_bytes(graph, graph.sinks[i], n, n) for i, n in whole)])
        return workers * (most + beside(piece, read))

    whole = [(i, uncut) for i, how in slicing.items() if (uncut := _uncut(graph.sinks[i], how)) > piece]
    while peak() > limit and read > piece:
        read = max(piece, read // 2)
    while peak() > limit and piece > GRID:
        piece = read = max(GRID, piece // 2)
    while peak() > limit and workers > 1:
        workers -= 1
    if peak() > limit:
        at = max(whole, key=lambda w: worker_bytes(graph, graph.sinks[w[0]], w[1], w[1]), default=None)
        name = graph.sinks[at[0]].name if at else _largest_task(graph)
        raise ResourceError(
            f"{name!r} must be held whole" if name else "the smallest pieces do not fit",
            where="memory budget",
            why=f"{peak() / 2**20:.0f} MiB are needed and {limit / 2**20:.0f} MiB allowed",
            fix=f"allow at least --max-memory {-(-peak() // 2**20)}MiB",
        )
    return Budget(limit, workers, piece, read, peak())


def _largest_task(graph: MergeGraph) -> str | None:
    """The task that holds most whatever the size of its steps, if any holds anything."""
    task = max(graph.tasks, key=lambda t: t.fixed, default=None)
    return task.key if task is not None and task.fixed else None


def _uncut(sink: Sink, how: Slicing) -> int:
    """Elements that cannot be cut further: of the tensor, of a row, or of nothing."""
    if how is Slicing.NONE:
        return element_count(sink.shape)
    return sink.shape[-1] if how is Slicing.ROWWISE and sink.shape else 0


def available_cpus() -> int:
    """CPUs that this process may use; see `usable_cpus`."""
    return usable_cpus().amount


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


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it can say what is free and give it back: glibc from 2.33 on."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Blocks
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return library


def return_surplus(most: int = SURPLUS) -> None:
    """Give freed memory back to the kernel where it is more than ``most`` bytes.

    What `keep_freed_memory` keeps is found again by blocks of the same size; where sizes vary, as those of what a
    search collects do, holes grow with the number of tensors (measured: by 1.2 MB with each one of 219).
    """
    library = _glibc()
    if library is not None and library.mallinfo2().fordblks > most:
        library.malloc_trim(0)
