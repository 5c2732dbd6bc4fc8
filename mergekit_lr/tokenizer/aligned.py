"""A model seen with the output's tokens: every tensor over the vocabulary reads with its rows in the output's order.

Nothing is copied ahead. A read gathers the rows of its range, in runs that lie close on disk, and makes what a model
does not have (a row of another model, a mean of several, zeros, the mean of all) on the fly. So every method, slice
and budget works on models with different vocabularies as on others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.lazy import torch
from mergekit_lr.tokenizer.rows import Ids, RowTable

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 1 << 16  # bytes between two wanted rows below which reading on is cheaper than a second call
MOST = 1 << 22  # bytes of one read; rows wanted from all over a tensor do not bring it into memory
BLOCK = 1 << 18  # elements of a block of the mean's sum: a function of the tensor's width alone


@dataclass(frozen=True)
class Origin:
    """A tensor of a model, unmoved, and which of its rows stands at each row of the output (-1: none)."""

    checkpoint: Checkpoint
    tensor: str
    rows: Ids

    @cached_property
    def dtype(self) -> torch.dtype:
        """What it reads as: for a tensor that an adapter changes, not what is stored."""
        return self.checkpoint.read(self.tensor, 0, 0).dtype


@dataclass(frozen=True)
class Move:
    """How one tensor is made: its own rows, else the mean of those given, else the mean of all of its tokens."""

    width: int
    own: Origin
    given: tuple[Origin, ...]


@dataclass
class AlignedCheckpoint(Checkpoint):
    """``inner`` with the tensors in ``moves`` laid out by ``table``; a tensor that needs sums reads as float32."""

    inner: Checkpoint = field(kw_only=True, repr=False)
    table: RowTable = field(kw_only=True, repr=False)
    moves: dict[str, Move] = field(kw_only=True, repr=False)
    _means: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _exact: dict[str, torch.dtype | None] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Elements ``start .. stop`` of the flattened tensor."""
        move = self.moves.get(name)
        if move is None:
            return self.inner.read(name, start, stop, buffer)
        dtype = self._read_dtype(name, move)
        if start == stop:
            return torch.empty(0, dtype=dtype)
        first, last = start // move.width, -(-stop // move.width)
        shape = ((last - first), move.width)
        nbytes = shape[0] * shape[1] * dtype.itemsize
        whole = start == first * move.width and stop == last * move.width
        if whole and buffer is not None and buffer.numel() >= nbytes:
            out = buffer[:nbytes].view(dtype).view(shape)
        else:
            out = torch.empty(shape, dtype=dtype)
        self._fill(name, move, first, last, out)
        return out.view(-1)[start - first * move.width : stop - first * move.width]

    def _read_dtype(self, name: str, move: Move) -> torch.dtype:
        """The stored dtype where rows are only picked, from models that store alike; else float32."""
        if name not in self._exact:
            found = {move.own.dtype, *(o.dtype for o in move.given)}
            lacking = move.own.rows < 0
            sums = sum(((o.rows >= 0) & lacking).astype(np.int64) for o in move.given) if move.given else np.zeros(1)
            plain = len(found) == 1 and int(np.max(sums, initial=0)) <= 1 and not bool(self.table.mean.any())
            self._exact[name] = found.pop() if plain else None
        return self._exact[name] or torch.float32

    def _fill(self, name: str, move: Move, first: int, last: int, out: Tensor, *, means: bool = True) -> None:
        """Rows ``first .. last`` of the output."""
        own = move.own.rows[first:last]
        if bool((own < 0).any()):
            out.zero_()
            lacking = own < 0
            count = np.zeros(last - first, dtype=np.int64)
            for origin in move.given:
                rows = np.where(lacking, origin.rows[first:last], -1)
                count += rows >= 0
                _gather(origin, rows, move.width, out, add=True)
            if int(count.max()) > 1:
                out.div_(torch.from_numpy(np.maximum(count, 1))[:, None])
            mean = self.table.mean[first:last]
            if means and bool(mean.any()):
                out[torch.from_numpy(np.flatnonzero(mean))] = self._mean(name, move)
        _gather(move.own, own, move.width, out, add=False)

    def _mean(self, name: str, move: Move) -> Tensor:
        """The mean of the rows below ``table.tokens`` that are no padding, over this model; summed in fp64 once."""
        with self._lock:
            if name not in self._means:
                total = torch.zeros(move.width, dtype=torch.float64)
                step = max(1, BLOCK // move.width)
                end = self.table.tokens
                for first in range(0, end, step):
                    last = min(first + step, end)
                    block = torch.empty((last - first, move.width))
                    self._fill(name, move, first, last, block, means=False)
                    counted = torch.from_numpy(np.flatnonzero(~self.table.padding[first:last]))
                    total += block[counted].double().sum(0)
                tokens = max(1, int((~self.table.padding).sum()))
                self._means[name] = (total / tokens).float()
            return self._means[name]

    def reads(self, name: str) -> tuple[Path, ...]:
        """Files of every model that rows of the tensor come from."""
        move = self.moves.get(name)
        if move is None:
            return self.inner.reads(name)
        return tuple(path for o in (move.own, *move.given) for path in o.checkpoint.reads(o.tensor))

    def file_position(self, name: str) -> tuple[str, int]:
        """Sort key that follows the bytes on disk."""
        move = self.moves.get(name)
        return self.inner.file_position(name if move is None else move.own.tensor)

    @property
    def beneath(self) -> tuple[Checkpoint, ...]:
        return (self.inner,)

    def identity(self) -> list[list[Any]]:
        """The model's, and what its rows are: another map gives other bytes."""
        digest = hashlib.sha256()
        for name, move in self.moves.items():
            digest.update(name.encode())
            for origin in (move.own, *move.given):
                digest.update(f"{origin.checkpoint.reference}\0{origin.tensor}\0".encode() + origin.rows.tobytes())
        digest.update(self.table.mean.tobytes())
        return [*self.inner.identity(), ["rows by token", self.table.rows, 0, digest.hexdigest()]]

    def close(self) -> None:
        self._means.clear()
        self.inner.close()


def _gather(origin: Origin, rows: Ids, width: int, out: Tensor, *, add: bool) -> None:
    """Bring the rows of a tensor that are asked for (those from 0 on) to their places in ``out``, or add them there."""
    places = np.flatnonzero(rows >= 0)
    dtype = origin.dtype
    for order, starts, stops in _spans(rows[places], width * dtype.itemsize):
        lengths = stops - starts
        offsets = np.cumsum(lengths) - lengths
        room = torch.empty(int(lengths.sum()) * width * dtype.itemsize, dtype=torch.uint8)
        for low, high, at in zip(starts.tolist(), stops.tolist(), offsets.tolist(), strict=True):
            part = room[at * width * dtype.itemsize : (at + high - low) * width * dtype.itemsize]
            found = origin.checkpoint.read(origin.tensor, low * width, high * width, part)
            if found.data_ptr() != part.data_ptr():
                part.view(dtype).copy_(found)
        read = room.view(dtype).view(-1, width)
        into, wanted = places[order], rows[places[order]]
        of_span = np.searchsorted(starts, wanted, side="right") - 1
        staged = wanted - starts[of_span] + offsets[of_span]
        as_read = len(staged) == len(read) and bool((np.diff(staged) == 1).all())
        if as_read and bool((np.diff(into) == 1).all()):
            target = out[int(into[0]) : int(into[-1]) + 1]
            target.add_(read) if add else target.copy_(read)
            continue
        picked = (read if as_read else read[torch.from_numpy(staged)]).to(out.dtype)
        index = torch.from_numpy(into)
        if add:
            out.index_add_(0, index, picked)
        else:
            out.index_copy_(0, index, picked)


def _spans(rows: Ids, row_bytes: int) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Runs of rows that are read together: (indices of rows in ascending order of the rows; starts and stops of runs).

    Rows that lie near each other are one run, and one item has runs of about `MOST` bytes in all.
    """
    order = np.argsort(rows, kind="stable")
    wanted = rows[order]
    near, most = max(1, NEAR // row_bytes), max(1, MOST // row_bytes)
    begin = 0
    while begin < len(wanted):
        # No more rows than `most`, with what lies between near ones.
        end = min(begin + most, len(wanted))
        part = wanted[begin:end]
        gaps = np.diff(part, prepend=part[:1])
        gaps[gaps > near] = 1
        end = begin + max(1, int(np.searchsorted(np.cumsum(gaps), most, side="left")))
        part = wanted[begin:end]
        breaks = np.flatnonzero(np.diff(part) > near)
        starts = part[np.concatenate([[0], breaks + 1])]
        stops = part[np.concatenate([breaks, [len(part) - 1]])] + 1
        yield order[begin:end], starts, stops
        begin = end
