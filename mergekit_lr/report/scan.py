"""One pass over all weights: values that are not finite, and the digest of every tensor.

Reads with pread into one buffer: a file that shrinks meanwhile is an error, where a mapping would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.engine.digest import ChunkDigests, combine
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 20
"""Bytes looked at at once: they stay in cache, and are a multiple of every element size."""

# An IEEE value is not finite if its bits, less the sign, are at least those of infinity (of NaN for F8_E4M3, which
# has no infinity). Integer operations are several times faster than isfinite on 16-bit floats.
_NOT_FINITE_FROM = {
    "F8_E4M3": ("uint8", 0x7F),
    "F8_E5M2": ("uint8", 0x7C),
    "F16": ("int16", 0x7C00),
    "BF16": ("int16", 0x7F80),
    "F32": ("int32", 0x7F80_0000),
    "C64": ("int32", 0x7F80_0000),
    "F64": ("int64", 0x7FF0_0000_0000_0000),
}


def scan(folder: Path, tensors: Mapping[str, tuple[TensorInfo, str]]) -> tuple[dict[str, str], list[str]]:
    """Digest of each tensor as `mergekit_lr.engine.digest` defines it, and the problems met.

    ``tensors`` maps a name to its header entry and the file in ``folder`` that holds it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a piece is too small to share: waking the others costs more than the work
    try:
        return _scan(folder, tensors)
    finally:
        torch.set_num_threads(before)


def _scan(folder: Path, tensors: Mapping[str, tuple[TensorInfo, str]]) -> tuple[dict[str, str], list[str]]:
    digests: dict[str, str] = {}
    problems: list[str] = []
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    scratch = torch.empty_like(buffer)
    for info, file in sorted(tensors.values(), key=lambda t: (t[1], t[0].offset)):
        running = ChunkDigests()
        bad, first, seen = 0, -1, 0
        try:
            for piece in pieces(folder / file, info, buffer):
                running.update(piece.numpy().data)
                if spoilt(piece, info.dtype, scratch):
                    values = piece.view(torch_dtype(info.dtype))
                    wrong = ~torch.isfinite(values if values.dtype.itemsize > 1 else values.float())
                    first = first if bad else seen + int(wrong.to(torch.uint8).argmax())
                    bad += int(wrong.sum())
                seen += piece.numel() // ITEM_BYTES[info.dtype]
        except CheckpointError as e:
            problems.append(str(e))
            continue
        if bad:
            problems.append(f"{info.name!r} holds {bad} values that are NaN or infinite, the first at {first}")
        digests[info.name] = combine(running.finish())
    return digests, problems


def spoilt(piece: Tensor, dtype: str, scratch: Tensor) -> bool:
    """Whether any of the values in ``piece`` (bytes of one dtype) is NaN or infinite; ``scratch`` is as long."""
    if dtype not in _NOT_FINITE_FROM:
        return False
    kind, limit = _NOT_FINITE_FROM[dtype]
    whole = getattr(torch, kind)
    sign = (1 << (8 * whole.itemsize - 1)) - 1
    bits = torch.bitwise_and(piece.view(whole), sign, out=scratch[: piece.numel()].view(whole))
    return int(bits.amax()) >= limit


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
