"""Workers as processes, for merges that are large enough to pay for them.

A piece takes tens of microseconds an operation, and Python threads pass one lock around between any two of them:
measured, two threads were no faster than one. Forked workers share nothing but a counter: the next unit to do. The
journal, appended to by all, is how the parent learns what was done.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from mergekit_lr.engine.execute import Worker
from mergekit_lr.engine.job import Job, Stopped
from mergekit_lr.engine.units import Unit
from mergekit_lr.errors import MergekitLrError, ResourceError
from mergekit_lr.lazy import torch

FORK_FROM = 256 << 20  # bytes to deal with; below this a merge is over before processes pay
TICK = 0.1  # seconds between looks at the workers
_PR_SET_PDEATHSIG = 1


def worth_it(device: str, workers: int, nbytes: int) -> bool:
    """Whether to fork: several workers, enough to do, the CPU (a GPU's context does not survive a fork)."""
    return workers > 1 and nbytes >= FORK_FROM and device == "cpu" and sys.platform == "linux"


@dataclass
class _Shared:
    """What parent and workers have in common."""

    next: Synchronized[int]
    done_bytes: Synchronized[int]
    stop: Any  # multiprocessing.Event


def drain(job: Job, todo: Sequence[Unit], workers: int, tick: Callable[[int], None]) -> None:
    """Do all of ``todo`` with forked workers; ``tick`` is told the bytes dealt with, a few times a second.

    Raises:
        the first error of a worker; ResourceError if one was killed.
    """
    context = multiprocessing.get_context("fork")
    shared = _Shared(context.Value("q", 0), context.Value("q", 0), context.Event())
    crew: list[tuple[ForkProcess, Connection]] = []
    outcomes: list[tuple[BaseException | None, list[str]]] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(job, todo, shared, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            crew.append((process, ours))
        while any(process.is_alive() for process, _ in crew):
            wait([process.sentinel for process, _ in crew if process.is_alive()], timeout=TICK)
            tick(shared.done_bytes.value)
    finally:
        shared.stop.set()
        for process, ours in crew:
            process.join()
            outcomes.append(_outcome(process, ours))
        job.journal.reload()
    for error, warnings in outcomes:
        for text in warnings:
            job.warn(text)
        if error is not None:
            raise error


def in_order(job: Job, count: int, one: Callable[[Worker, int], Any], workers: int) -> Iterator[Any]:
    """``one(worker, i)`` for i below ``count``, each done in a forked worker; results come in the order of i.

    Raises:
        the first error of a worker; ResourceError if one was killed.
    """
    context = multiprocessing.get_context("fork")
    shared = _Shared(context.Value("q", 0), context.Value("q", 0), context.Event())
    crew: dict[Connection, ForkProcess] = {}
    ready: dict[int, Any] = {}
    due = 0
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            inherited = (*crew, ours)
            arguments = (job, count, one, shared, theirs, inherited, os.getpid())
            process = context.Process(target=_compute, args=arguments, daemon=True)
            process.start()
            theirs.close()
            crew[ours] = process
        working = set(crew)
        while working:
            for connection in wait(list(working)):
                assert isinstance(connection, Connection)
                try:
                    i, result, warnings = connection.recv()
                except EOFError:
                    crew[connection].join()
                    raise _lost(crew[connection]) from None
                for text in warnings:
                    job.warn(text)
                if i is None:
                    working.remove(connection)
                    if result is not None:
                        raise result
                else:
                    ready[i] = result
            while due in ready:
                yield ready.pop(due)
                due += 1
    finally:
        shared.stop.set()
        for connection, process in crew.items():
            connection.close()  # a worker that is still sending gets a broken pipe
            process.join()


def _compute(
    job: Job,
    count: int,
    one: Callable[[Worker, int], Any],
    shared: _Shared,
    theirs: Connection,
    inherited: Sequence[Connection],
    parent: int,
) -> None:
    """A worker process of `in_order`: sends ``(i, result, [])`` each time, ``(None, error, warnings)`` at the end.

    ``inherited``: the parent's ends of the pipes, copied by the fork; while one is open here, nobody that sends into it
    learns that the parent has gone.
    """
    for connection in inherited:
        connection.close()
    _begin(job, shared, parent)
    error: BaseException | None = None
    try:
        with torch.inference_mode():
            worker = Worker(job)
            for i in _turns(shared, count):
                theirs.send((i, one(worker, i), []))
    except Stopped:
        pass
    except BrokenPipeError:  # the parent gave up
        return
    except BaseException as e:  # handed to the parent, which raises it
        shared.stop.set()
        error = e
    with suppress(BrokenPipeError):
        theirs.send((None, portable(error), job.warnings))
    theirs.close()


def _turns(shared: _Shared, count: int) -> Iterator[int]:
    """Numbers below ``count`` that no other worker has taken, until there are none or all must stop."""
    while not shared.stop.is_set():
        with shared.next.get_lock():
            i = shared.next.value
            shared.next.value += 1
        if i >= count:
            return
        yield i


def _begin(job: Job, shared: _Shared, parent: int) -> None:
    """What every worker process does first."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and stops us
    job.forked(shared.stop)
    torch.set_num_threads(1)


def _outcome(process: ForkProcess, ours: Connection) -> tuple[BaseException | None, list[str]]:
    try:
        error, warnings = ours.recv()
    except EOFError:
        error, warnings = _lost(process), []
    ours.close()
    return error, warnings


def _lost(process: ForkProcess) -> ResourceError:
    """Why a joined worker that said nothing is gone."""
    code = process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return ResourceError(
        "a worker process ended before its work",
        why=how,
        fix="if it ran out of memory allow less with --max-memory; run the same command again: it resumes",
    )


def _main(job: Job, todo: Sequence[Unit], shared: _Shared, theirs: Connection, parent: int) -> None:
    """A worker process: take units until there are none, or until something failed anywhere."""
    _begin(job, shared, parent)
    error: BaseException | None = None
    try:
        with torch.inference_mode():
            worker = Worker(job)
            for i in _turns(shared, len(todo)):
                before = job.done_bytes
                worker.run(todo[i])
                with shared.done_bytes.get_lock():
                    shared.done_bytes.value += job.done_bytes - before
    except Stopped:
        pass
    except BaseException as e:  # handed to the parent, which raises it
        shared.stop.set()
        error = e
    theirs.send((portable(error), job.warnings))
    theirs.close()


def portable(error: BaseException | None) -> BaseException | None:
    """The error itself where it survives the way to another process, else one that says the same."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception as e:  # whatever an exception's own pickling does wrong
        return RuntimeError(f"{type(error).__name__}: {error} (not picklable: {e})")
    same = isinstance(error, MergekitLrError) or str(copy) == str(error)
    return copy if same else RuntimeError(f"{type(error).__name__}: {error}")


def _die_with(parent: int) -> None:
    """Leave no worker behind that writes to an output whose run was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
