"""A file of statistics as a checkpoint under the weights' own names: second moments, Fisher diagonals, Grams.

An entry is called by its weight plus a suffix. Second moments may be stored as row and column sums; they are read
as the matrix ``V_ij = row_i col_j / sum(row)``, which has those sums, without ever holding it whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.header import TensorInfo, read_header
from mergekit_lr.checkpoint.model import Checkpoint, open_file, open_folder
from mergekit_lr.checkpoint.open import local
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ROW, COLUMN = ".row", ".col"
PICKLED = (".pt", ".bin", ".pth")


@dataclass
class CompanionFile(Checkpoint):
    """``tensors`` are called as the weights are; ``facts`` is the metadata, without the format mark."""

    facts: tuple[tuple[str, str], ...] = ()
    entries: dict[str, str] = field(default_factory=dict, repr=False)
    inner: Checkpoint = field(default=None, repr=False)  # type: ignore[assignment]
    _sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        entry = self.entries[name]
        if not entry.endswith(ROW):
            return self.inner.read(entry, start, stop, buffer)
        return self._outer(name, entry, start, stop)

    def _outer(self, name: str, entry: str, start: int, stop: int) -> Tensor:
        """Elements ``start .. stop`` of ``row_i col_j / sum(row)``: fp32, zero where the sum is."""
        if start == stop:  # and for a weight without elements there is nothing to divide by
            return torch.empty(0)
        rows, columns = self._factors(name, entry)
        width = columns.shape[-1]
        first, last = start // width, (stop - 1) // width
        per_matrix = rows.numel() // columns.shape[0]
        which = torch.arange(first, last + 1) // per_matrix
        block = rows[first : last + 1, None] * columns[which]
        return block.reshape(-1)[start - first * width : stop - first * width]

    def _factors(self, name: str, entry: str) -> tuple[Tensor, Tensor]:
        """Shares of each row ``[rows]`` and sums of each column ``[matrices, columns]``, kept after the first use."""
        known = self._sums.get(name)
        if known is None:
            shape = self.tensors[name].shape
            other = entry.removesuffix(ROW) + COLUMN
            found = [self.inner.read(e, 0, self.inner.tensors[e].numel).double() for e in (entry, other)]
            rows, columns = found[0].reshape(-1, shape[-2]), found[1].reshape(-1, shape[-1])
            totals = rows.sum(1, keepdim=True)
            shares = torch.where(totals > 0, rows / totals.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
            known = self._sums[name] = shares.reshape(-1).float(), columns.float()
        return known

    def close(self) -> None:
        self.inner.close()


def open_companion(path: str, suffixes: Sequence[str], *, what: str, make: str, factored: bool) -> CompanionFile:
    """Open a statistics file (or a folder of safetensors) by its local path; headers only.

    ``suffixes`` are tried in order for every weight; with ``factored`` row and column sums count as well.

    Raises:
        CheckpointError: there is no such file, it is pickled, damaged, or holds nothing of the kind.
    """
    place = local(Place(path))
    if not place.exists():
        raise CheckpointError(f"no such {what} file", where=path, fix=make)
    if place.suffix in PICKLED:
        why = "it is an optimizer state or another pickle, which is never loaded in a merge"
        raise CheckpointError(f"cannot read {what} from this file", where=path, why=why, fix=make)
    inner = open_folder(place, path) if place.is_dir() else open_file(place, path)
    facts = _facts(list(dict.fromkeys(inner.files.values())))
    opened = CompanionFile(path, None, None, {}, {}, inner.stamps, list(inner.warnings), facts=facts, inner=inner)
    trained_on = next((n for n in inner.tensors if ".lora_A" in n or ".lora_B" in n), None)
    if trained_on is not None:
        inner.close()
        why = f"{trained_on!r}: the optimizer saw the adapter's factors, not the weights"
        fix = "estimate the curvature of the adapted model from text: mergekit-lr curvature MODEL OUT --text FILE"
        raise CheckpointError(f"holds {what} of a LoRA, not of weights", where=path, why=why, fix=fix)
    named = tuple(s for s in suffixes if s)
    marked = (*named, *(s + part for s in named for part in (ROW, COLUMN)))
    for suffix in suffixes:
        for entry in inner.tensors:
            if suffix or not entry.endswith(marked):
                _enter(opened, entry, suffix, factored)
    if not opened.entries:
        inner.close()
        raise CheckpointError(f"holds no {what}", where=path, why="no entry has a name that fits", fix=make)
    return opened


def _facts(files: Sequence[Path]) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for path in files:
        found |= read_header(path).metadata
    return tuple(sorted((k, v) for k, v in found.items() if k != "format"))


def _enter(opened: CompanionFile, entry: str, suffix: str, factored: bool) -> None:
    """Note under its weight's name an entry that ends in ``suffix``, or in its row sums."""
    info = opened.inner.tensors[entry]
    if factored and entry.endswith(suffix + ROW):
        name = entry.removesuffix(suffix + ROW)
        columns = opened.inner.tensors.get(name + suffix + COLUMN)
        if columns is None or name in opened.entries:
            return
        if not info.shape or not columns.shape or info.shape[:-1] != columns.shape[:-1]:
            why = f"rows {list(info.shape)}, columns {list(columns.shape)}"
            raise CheckpointError(f"the sums of {name!r} do not fit each other", where=opened.reference, why=why)
        numel, shape = info.numel * columns.shape[-1], (*info.shape, columns.shape[-1])
        opened.tensors[name] = TensorInfo(name, "F32", shape, info.offset, numel * 4)
    elif entry.endswith(suffix) and entry != suffix and info.dtype in AVERAGED:
        name = entry[: len(entry) - len(suffix)]
        if name in opened.entries or (factored and name.endswith((ROW, COLUMN))):
            return
        opened.tensors[name] = info._replace(name=name)
    else:
        return
    opened.entries[name], opened.files[name] = entry, opened.inner.files[entry]
