"""Hidden states between two layers, batch by batch: in memory, or in files that a later run can go on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from mergekit_lr.calibration.text import Batch
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import dtype_code
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.writer import Entry, FileWriter
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class States(Protocol):
    """Holds what enters one layer while what enters the next is written."""

    def read(self, batch: int) -> Tensor:
        """Hidden states ``[B, L, H]`` that enter the current layer, in the compute dtype."""

    def write(self, batch: int, states: Tensor) -> None:
        """Hidden states that leave the current layer."""

    def finish(self) -> None:
        """Make durable what was written."""

    def advance(self) -> None:
        """What was written becomes what is read; what was read goes."""

    def close(self) -> None:
        """Let go of everything."""


class MemoryStates:
    """Hidden states in memory; what is read is replaced as it is written."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._states: list[Tensor | None] = [None] * len(batches)
        self._next: list[Tensor | None] = [None] * len(batches)

    def read(self, batch: int) -> Tensor:
        states = self._states[batch]
        assert states is not None
        return states

    def write(self, batch: int, states: Tensor) -> None:
        self._next[batch] = states.cpu()

    def finish(self) -> None:
        """Nothing to do in memory."""

    def advance(self) -> None:
        self._states, self._next = self._next, [None] * len(self._next)

    def close(self) -> None:
        self._states, self._next = [], []


class DiskStates:
    """Hidden states in ``folder/states-NNNNN.safetensors``, one file for each layer, atomic and durable."""

    def __init__(self, folder: Path, batches: Sequence[Batch], hidden: int, dtype: torch.dtype, layer: int) -> None:
        self.folder, self.layer = folder, layer
        code = dtype_code(dtype)
        self._entries = [Entry(_name(b.number), code, (*b.ids.shape, hidden)) for b in batches]
        self._writer: FileWriter | None = None
        self._reader: Checkpoint | None = None
        self._opening = Lock()

    def path(self, layer: int) -> Path:
        """The file of what enters ``layer``."""
        return states_path(self.folder, layer)

    def read(self, batch: int) -> Tensor:
        with self._opening:  # batches are read by several threads
            if self._reader is None:
                self._reader = open_file(self.path(self.layer), str(self.path(self.layer)))
        info = self._reader.tensors[_name(batch)]
        return self._reader.read(info.name, 0, info.numel).view(info.shape)

    def write(self, batch: int, states: Tensor) -> None:
        if self._writer is None:
            self._writer = FileWriter(self.path(self.layer + 1), self._entries)
        self._writer.write(_name(batch), states)

    def finish(self) -> None:
        assert self._writer is not None
        self._writer.commit()
        self._writer = None

    def advance(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self.layer >= 0:
            fs.remove_file(self.path(self.layer))
        self.layer += 1

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            self._writer.discard()
        self._reader = self._writer = None


def states_path(folder: Path, layer: int) -> Path:
    """Where the hidden states that enter ``layer`` are kept."""
    return folder / f"states-{layer:05d}.safetensors"


def states_bytes(batches: Sequence[Batch], hidden: int, dtype: torch.dtype) -> int:
    """Bytes of all hidden states between two layers."""
    return sum(b.ids.numel() for b in batches) * hidden * dtype.itemsize


def _name(batch: int) -> str:
    return f"batch.{batch:05d}"
