"""One pass over all weights: values that are not finite, and the digest of every tensor.

Reads with pread into one buffer: a file that shrinks meanwhile is an error, where a mapping would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.engine.digest import ChunkDigests, combine
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FLOATING = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "C64"})
PIECE = 4 << 20
"""Bytes looked at at once: a multiple of every element size."""


def scan(folder: Path, tensors: Mapping[str, tuple[TensorInfo, str]]) -> tuple[dict[str, str], list[str]]:
    """Digest of each tensor as `mergekit_lr.engine.digest` defines it, and the problems met.

    ``tensors`` maps a name to its header entry and the file in ``folder`` that holds it.
    """
    digests: dict[str, str] = {}
    problems: list[str] = []
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    for info, file in sorted(tensors.values(), key=lambda t: (t[1], t[0].offset)):
        running = ChunkDigests()
        bad, first, seen = 0, -1, 0
        try:
            for piece in pieces(folder / file, info, buffer):
                running.update(piece.numpy().data)
                if info.dtype not in FLOATING:
                    continue
                values = piece.view(torch_dtype(info.dtype))
                wrong = ~torch.isfinite(values if values.dtype.itemsize > 1 else values.float())
                here = int(wrong.sum())
                if here and not bad:
                    first = seen + int(wrong.to(torch.uint8).argmax())
                bad += here
                seen += values.numel()
        except CheckpointError as e:
            problems.append(str(e))
            continue
        if bad:
            problems.append(f"{info.name!r} holds {bad} values that are NaN or infinite, the first at {first}")
        digests[info.name] = combine(running.finish())
    return digests, problems


def pieces(path: Path, info: TensorInfo, buffer: Tensor) -> Iterator[Tensor]:
    """The tensor's bytes in order, in views of ``buffer`` that hold whole elements.

    Raises:
        CheckpointError: the file cannot be read, or ends inside the tensor.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        raise CheckpointError("cannot open the file", where=str(path), why=e.strerror or str(e)) from e
    try:
        for start in range(0, info.nbytes, buffer.numel()):
            piece = buffer[: min(buffer.numel(), info.nbytes - start)]
            _fill(fd, memoryview(piece.numpy().data), info.offset + start, path, info.name)
            yield piece
    finally:
        os.close(fd)


def _fill(fd: int, view: memoryview, offset: int, path: Path, name: str) -> None:
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as e:
            raise CheckpointError(f"cannot read tensor {name!r}", where=str(path), why=e.strerror or str(e)) from e
        if got == 0:
            raise CheckpointError(f"the file ends inside tensor {name!r}", where=str(path))
        done += got
