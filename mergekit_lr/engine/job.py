"""What the workers of one run share."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine.journal import Journal
from mergekit_lr.graph.nodes import MergeGraph


class Stopped(Exception):
    """Another worker failed, or the user interrupted: leave quietly."""


@dataclass(kw_only=True)
class Inputs:
    """What is read and how: enough to compute any output of a graph, wherever it then goes.

    ``told``: whoever gets the warnings instead, where this is a stage of another run.
    """

    graph: MergeGraph
    inputs: Mapping[str, Checkpoint]
    device: str
    piece: int
    read: int
    nonfinite: str
    artifacts: dict[str, Any] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    warnings: list[str] = field(default_factory=list)
    told: Inputs | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.checkpoints = [self.inputs[m] for m in self.graph.files]

    def warn(self, text: str) -> None:
        if self.told is not None:
            self.told.warn(text)
            return
        with self._lock:
            if text not in self.warnings:
                self.warnings.append(text)


@dataclass(kw_only=True)
class Job(Inputs):
    """What all workers of a run share."""

    layout: Layout
    folder: Path
    journal: Journal
    done_bytes: int = 0
    _descriptors: dict[int, int] = field(default_factory=dict)

    def shard(self, number: int) -> tuple[int, Path]:
        """Descriptor and path of an output shard."""
        path = self.folder / self.layout.shards[number].file
        with self._lock:
            if number not in self._descriptors:
                self._descriptors[number] = fs.open_for_writing(path)
            return self._descriptors[number], path

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.done_bytes += nbytes

    def forked(self, stop: Any) -> None:
        """Begin anew in a worker process: locks of its own, files of its own, the parent's word to stop."""
        self._lock = threading.Lock()
        self._descriptors = {}
        self.journal.unlock()
        self.stop = stop
        self.warnings = []
