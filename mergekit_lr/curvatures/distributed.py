"""torch.distributed.checkpoint folders (FSDP), read without torch's own unpickling of ``.metadata``.

``.metadata`` is a pickle of a few dataclasses. `_Inert` makes each of them a bag of attributes and refuses every other
name, so nothing that a hostile file names is ever imported. The shards hold each tensor piece as a file of torch.save
at an offset; those are loaded with ``weights_only``. Runs in the confined process of `mergekit_lr.curvatures.state`.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.pickle import confine, plain_header
from mergekit_lr.checkpoint.small_files import inside, read_plain
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_METADATA = 1 << 30
MAX_VALUE = 1 << 20
KEPT = ("exp_avg_sq",)
_META = "torch.distributed.checkpoint.metadata"
_BAGS = {
    *((_META, n) for n in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *((_META, n) for n in ("TensorProperties", "MetadataIndex", "StorageMeta")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


class Bag:
    """Stands in for a dataclass of torch: attributes, or the tuple it was pickled as."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _size(*arguments: Any) -> tuple[int, ...]:
    return tuple(arguments[0]) if arguments else ()


def _inert_value(*arguments: Any) -> Any:
    """Stands in for enumerations and layouts, which are not looked at."""
    return arguments


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BAGS:
            return Bag
        if module == "torch":
            if name == "Size":
                return _size
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype):
                return found
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in {
            (_META, "_MEM_FORMAT_ENCODING"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
            ("pathlib._local", "PosixPath"),
        }:
            return _inert_value
        raise pickle.UnpicklingError(f"its metadata names {module[:60]}.{name[:60]}, which no checkpoint needs")


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor: where it lies in the tensor, and in which bytes of which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """One entry: a tensor in pieces, or (``dtype`` None) a plain value in one."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(folder: Path) -> dict[str, Stored]:
    """Every entry of the folder by its key.

    Raises:
        CheckpointError: not a metadata file, or one that does not fit itself.
    """
    raw = read_plain(folder, ".metadata", most=MAX_METADATA)
    loaded = _Inert(io.BytesIO(raw)).load()
    try:
        infos: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in loaded.storage_data.items():
            offset = getattr(index, "offset", None)
            infos[str(index.fqn), None if offset is None else tuple(offset)] = info
        return {str(key): _stored(str(key), what, infos) for key, what in loaded.state_dict_metadata.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"its metadata do not fit together ({type(e).__name__}: {str(e)[:80]})") from e


def _stored(key: str, what: Any, infos: dict[tuple[str, tuple[int, ...] | None], Any]) -> Stored:
    if not hasattr(what, "chunks"):
        info = infos.get((key, None))
        return Stored(None, (), () if info is None else (_chunk((), (), info),))
    dtype = what.properties.dtype if hasattr(what.properties, "dtype") else what.properties.values[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{key[:80]!r} has no dtype")
    shape = tuple(int(n) for n in what.size)
    chunks = []
    for c in what.chunks:
        offsets, sizes = tuple(map(int, c.offsets)), tuple(map(int, c.sizes))
        info = infos.get((key, offsets)) or (infos[key, None] if len(what.chunks) == 1 else None)
        if info is None:
            raise CheckpointError(f"a piece of {key[:80]!r} is in no file")
        chunks.append(_chunk(offsets, sizes, info))
    filled = sum(math.prod(c.sizes) for c in chunks)
    inside_it = all(o >= 0 and o + n <= d for c in chunks for o, n, d in zip(c.offsets, c.sizes, shape, strict=True))
    if not inside_it or filled != math.prod(shape):
        raise CheckpointError(f"the pieces of {key[:80]!r} do not tile it")
    return Stored(dtype, shape, tuple(chunks))


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> Chunk:
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError("its shards are compressed, which is not read")
    return Chunk(offsets, sizes, str(info.relative_path), int(info.offset), int(info.length))


def _load(folder: Path, chunk: Chunk) -> Any:
    """What a chunk holds, by torch's own loader with ``weights_only``."""
    path = inside(folder, chunk.file)
    if not path.is_file():
        raise CheckpointError(f"{chunk.file[:80]!r} is missing, or no plain file")
    if chunk.start < 0 or chunk.length < 0 or chunk.start + chunk.length > path.stat().st_size:
        raise CheckpointError(f"a piece lies outside of {chunk.file[:80]}")
    with path.open("rb") as f:
        f.seek(chunk.start)
        return torch.load(io.BytesIO(f.read(chunk.length)), map_location="cpu", weights_only=True)


def _assembled(folder: Path, key: str, stored: Stored) -> Tensor:
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    for chunk in stored.chunks:
        part = _load(folder, chunk)
        if not isinstance(part, torch.Tensor) or tuple(part.shape) != chunk.sizes or part.dtype != stored.dtype:
            raise CheckpointError(f"a piece of {key[:80]!r} is not what the metadata say")
        whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
    return whole


def convert_folder(folder: Path, target: Path) -> None:
    """Write the second moments of a folder to ``target``, one tensor in memory at a time."""
    confine(sum(p.stat().st_size for p in folder.iterdir() if p.is_file()))
    entries = read_metadata(folder)
    wanted = {k: s for k, s in sorted(entries.items()) if s.dtype is not None and k.endswith(KEPT)}
    plain = json.dumps(dict(_plain(folder, entries)))
    described = {k: (s.dtype, s.shape) for k, s in wanted.items() if s.dtype is not None}
    with target.open("wb") as f:
        f.write(plain_header(described, {"plain": plain}))
        for key, stored in wanted.items():
            data = _assembled(folder, key, stored).contiguous().reshape(-1)
            f.write(data.view(torch.uint8).numpy().data if data.numel() else b"")


def _plain(folder: Path, entries: dict[str, Stored]) -> Iterator[tuple[str, Any]]:
    """Steps, and the betas of the parameter groups where they are stored as plain values."""
    for key, stored in entries.items():
        small = sum(c.length for c in stored.chunks) <= MAX_VALUE
        if not stored.chunks or not small or not (key.endswith((".step", ".betas")) or "param_groups" in key):
            continue
        value = _load(folder, stored.chunks[0])
        if isinstance(value, io.BytesIO):
            value = torch.load(value, map_location="cpu", weights_only=True)
        if isinstance(value, torch.Tensor):
            value = value.item() if value.numel() == 1 else None
        if isinstance(value, int | float | str) or (
            isinstance(value, list | tuple) and all(isinstance(v, int | float | str) for v in value)
        ):
            yield key, list(value) if isinstance(value, list | tuple) else value
