"""Where every output byte goes, before any is computed: shards, their headers, each tensor's offset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES


class Described(Protocol):
    """What a layout needs to know of an output tensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor's byte range: ``offset`` counts from the start of the shard file."""

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file: its name, the exact bytes of its header (length prefix included), its full size."""

    file: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """All shards and the place of every tensor by name. ``stem``: what the files' names begin with."""

    shards: tuple[Shard, ...]
    places: dict[str, Place]
    stem: str = "model"

    @property
    def index_file(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(p.nbytes for p in self.places.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(s.size for s in self.shards)

    def index(self, parameters: int) -> bytes | None:
        """What `index_file` holds, or None for a single file."""
        if len(self.shards) == 1:
            return None
        names = {name: self.shards[p.shard].file for name, p in self.places.items()}
        content = {
            "metadata": {"total_parameters": parameters, "total_size": self.total_bytes},
            "weight_map": dict(sorted(names.items())),
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def nbytes_of(tensor: Described) -> int:
    n = ITEM_BYTES[tensor.dtype]
    for d in tensor.shape:
        n *= d
    return n


def lay_out(tensors: Sequence[Described], shard_size: int, stem: str = "model") -> Layout:
    """Fill shards of at most ``shard_size`` bytes of data, in the given order; a larger tensor has its own.

    Within a shard wider dtypes come first, so that every tensor is aligned to its own element.
    """
    groups: list[list[Described]] = [[]]
    used = 0
    for t in tensors:
        size = nbytes_of(t)
        if groups[-1] and used + size > shard_size:
            groups.append([])
            used = 0
        groups[-1].append(t)
        used += size
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    for i, group in enumerate(groups):
        part = "" if len(groups) == 1 else f"-{i + 1:05d}-of-{len(groups):05d}"
        file = f"{stem}{part}.safetensors"
        shards.append(_shard(file, i, group, places))
    return Layout(tuple(shards), places, stem)


def lay_out_file(file: str, tensors: Sequence[Described], metadata: Mapping[str, str]) -> Layout:
    """All tensors in one file of that name, ``metadata`` in its header beside the usual format mark."""
    places: dict[str, Place] = {}
    return Layout((_shard(file, 0, tensors, places, metadata),), places)


def _shard(
    file: str,
    number: int,
    group: Sequence[Described],
    places: dict[str, Place],
    metadata: Mapping[str, str] | None = None,
) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    ordered = sorted(group, key=lambda t: -ITEM_BYTES[t.dtype])
    for t in ordered:
        size = nbytes_of(t)
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + size]}
        places[t.name] = Place(number, end, size)
        end += size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    for t in ordered:
        p = places[t.name]
        places[t.name] = Place(number, p.offset + len(header), p.nbytes)
    return Shard(file, header, len(header) + end)
