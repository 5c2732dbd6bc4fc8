"""Writes one safetensors file, tensor by tensor; it has its name only when it is complete and durable.

For what is not a model: statistics, permutations, adapters, anything prepared for a later step. Models are written
by the engine, which fills many shards from many workers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import dtype_code, torch_dtype
from mergekit_lr.checkpoint.layout import Described, lay_out_file
from mergekit_lr.errors import ResourceError, UsageError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that will be written: its name, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class FileWriter:
    """A safetensors file in the making. As a context manager it commits at the end, and removes itself on an error.

    The whole layout is fixed by ``entries``; tensors may come in any order and each exactly once.

    Raises:
        ValueError: a tensor is unknown, comes twice, has another shape or dtype, or is missing at the end.
        ResourceError: the file system refuses.
        UsageError: another process is writing the file.
    """

    def __init__(self, path: Path, entries: Sequence[Described], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._layout = lay_out_file(path.name, entries, metadata or {})
        self._left = {e.name: e for e in entries}
        [shard] = self._layout.shards
        # The lock is held until the file has its name: nobody renames what another has half written.
        fd = fs.try_lock(self.partial)
        if fd is None:
            raise UsageError("another run is writing this file", where=str(path), fix="wait for it, or name another")
        self._fd = fd
        try:
            fs.truncate(fd, 0, self.partial)
            fs.preallocate(self.partial, shard.size)
            fs.pwrite(fd, memoryview(shard.header), 0, self.partial)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor whole, in the dtype that was announced."""
        entry = self._left.pop(name, None)
        if entry is None:
            raise ValueError(f"{name!r} is not to be written, or was")
        if tuple(tensor.shape) != tuple(entry.shape) or tensor.dtype != torch_dtype(entry.dtype):
            raise ValueError(f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {entry.shape}")
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            fs.pwrite(self._fd, flat.numpy().data, self._layout.places[name].offset, self.partial)

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, {min(self._left)!r} among them")
        fs.fsync(self.partial)
        fs.rename(self.partial, self.path)
        self._close()

    def discard(self) -> None:
        """Remove what was written, unless it has its name."""
        if self._fd >= 0:
            with suppress(ResourceError):  # what was wrong before is what matters; the next run removes it
                if fs.is_at(self._fd, self.partial):
                    fs.remove_file(self.partial)
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self.commit()
        finally:
            self.discard()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory to one file, atomically; sorted by name, so the bytes do not depend on order."""
    names = sorted(tensors)
    entries = [Entry(n, dtype_code(tensors[n].dtype), tuple(tensors[n].shape)) for n in names]
    with FileWriter(path, entries, metadata) as writer:
        for n in names:
            writer.write(n, tensors[n])
