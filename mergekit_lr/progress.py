"""Shows how far a run is: a bar on a terminal, a plain line every few seconds elsewhere. Counts bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from mergekit_lr.sizes import format_size

if TYPE_CHECKING:
    from mergekit_lr.engine.progress import ProgressEvent

LINE_EVERY = 5.0
"""Seconds between lines where there is no terminal."""


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Lines:
    """Plain lines: stage, share, bytes, rate over the whole run so far, time left at that rate."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.began = self.last = clock()
        self.first_bytes: int | None = None
        self.stage = ""

    def __call__(self, event: ProgressEvent) -> None:
        if self.first_bytes is None:
            self.first_bytes = event.done_bytes  # a resumed run starts with bytes that cost it nothing
        now = self.clock()
        if now - self.last >= LINE_EVERY or event.stage != self.stage:
            self.last, self.stage = now, event.stage
            print(self.line(event, now), file=self.stream, flush=True)

    def line(self, event: ProgressEvent, now: float) -> str:
        """One line, as in ``merging: 40 % of 1.3 GB, 210 MB/s, 4 s left``."""
        share = event.done_bytes / event.total_bytes if event.total_bytes else 1.0
        text = f"{event.stage}: {share:.0%} of {format_size(event.total_bytes)}"
        seconds, done = now - self.began, event.done_bytes - (self.first_bytes or 0)
        if seconds > 0 and done > 0:
            rate = done / seconds
            text += f", {format_size(int(rate))}/s"
            if event.done_bytes < event.total_bytes:
                text += f", {format_seconds((event.total_bytes - event.done_bytes) / rate)} left"
        return text


@contextmanager
def show_progress(quiet: bool, stream: TextIO | None = None) -> Iterator[Callable[[ProgressEvent], None] | None]:
    """A callback for the engine that draws on ``stream`` (standard error); None if ``quiet``."""
    stream = stream or sys.stderr
    if quiet:
        yield None
    elif stream.isatty():
        with _bar(stream) as update:
            yield update
    else:
        yield Lines(stream)


@contextmanager
def _bar(stream: TextIO) -> Iterator[Callable[[ProgressEvent], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(event: ProgressEvent) -> None:
            bar.update(task, description=event.stage, completed=event.done_bytes, total=event.total_bytes)

        yield update
