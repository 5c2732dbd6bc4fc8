"""Reads a safetensors header, strictly: nothing is trusted, nothing is allocated before it is checked.

Layout: 8 bytes little-endian header length, that many bytes of JSON, then the data, which the tensors'
offsets must tile exactly. Stricter than the reference parser where that one lets ambiguity pass: duplicate
keys, names with control characters, ranks and sizes that no model has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.errors import CheckpointError

MAX_HEADER = 100_000_000
MAX_RANK = 16
MAX_DIMENSION = 1 << 48
MAX_ELEMENTS = 1 << 56
MAX_NAME = 512
MAX_TENSORS = 2_000_000
_LAST = 1 << 62


class TensorInfo(NamedTuple):
    """One tensor as its header describes it. ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return self.nbytes // ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in offset order, free-form metadata, and a digest of its exact bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    digest: str
    file_size: int


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        CheckpointError: for anything that is not a well-formed safetensors file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would otherwise wait for ever
    except OSError as e:
        raise CheckpointError(
            "cannot open the file", where=str(path), why=e.strerror or str(e), fix="check the path"
        ) from e
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _bad(path, "it is not a regular file")
        size = status.st_size
        prefix = os.pread(fd, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 2 or length > min(MAX_HEADER, size - 8):
            raise _bad(path, f"the header length {length} does not fit a file of {size} bytes")
        raw = os.pread(fd, length, 8)
    except OSError as e:
        raise CheckpointError("cannot read the file", where=str(path), why=e.strerror or str(e)) from e
    finally:
        os.close(fd)
    if len(raw) != length:
        raise _bad(path, "the file ends inside its header")
    return parse_header(raw, size, path)


def parse_header(raw: bytes, file_size: int, path: Path) -> Header:
    """Check header bytes against the size of the file that holds them."""
    if not raw.startswith(b"{"):
        raise _bad(path, "the header does not begin with '{'")
    try:
        # A minus before a value is rare; only then each number is looked at as text.
        entries = json.loads(raw.decode("utf-8"), **(_STRICT if _MINUS.search(raw) else _PLAIN))
    except (ValueError, RecursionError) as e:
        raise _bad(path, f"the header is not valid JSON: {e}") from e
    if not isinstance(entries, dict):
        raise _bad(path, "the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ must map strings to strings")
    if len(entries) > MAX_TENSORS:
        raise _bad(path, f"it lists {len(entries)} tensors; at most {MAX_TENSORS} are read")
    data_start = 8 + len(raw)
    tensors = [_tensor(name, entry, data_start, path) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = data_start
    for t in tensors:
        if t.offset != end:
            raise _bad(path, f"tensor {t.name!r} leaves a hole or overlaps its neighbour")
        end += t.nbytes
    if end != file_size:
        raise _bad(path, f"its tensors end at byte {end}, the file at {file_size}")
    return Header({t.name: t for t in tensors}, metadata, hashlib.sha256(raw).hexdigest(), file_size)


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "not a sound safetensors file", where=str(path), why=why, fix="download or write the file again"
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; ValueError where a key appears twice, which parsers resolve differently."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return out


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int:
    if text.startswith("-"):  # nothing in a header is negative, and "-0" would pass for 0
        raise ValueError(f"negative number {text[:40]}")
    return int(text)


_MINUS = re.compile(rb"[\[:,]\s*-")
_PLAIN: dict[str, Any] = {"object_pairs_hook": unique_keys, "parse_constant": _no_constant}
_STRICT: dict[str, Any] = {**_PLAIN, "parse_int": _integer}
_ENTRY = {"dtype", "shape", "data_offsets"}


def _tensor(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    # Written for speed: a header of a large mixture of experts holds tens of thousands of these.
    shown = name[:80]
    if not name or (len(name) > MAX_NAME // 4 and _utf8_length(name) > MAX_NAME) or not name.isprintable():
        raise _bad(path, f"tensor name {shown!r} is empty, too long or holds control characters")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise _bad(path, f"tensor {shown!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _bad(path, f"tensor {shown!r} has dtype {str(dtype)[:40]!r}, which is not read")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise _bad(path, f"tensor {shown!r} has no shape of at most {MAX_RANK} dimensions")
    numel, spread = 1, 1
    for d in shape:
        if type(d) is not int or not 0 <= d <= MAX_DIMENSION:
            raise _bad(path, f"tensor {shown!r} has an impossible dimension")
        numel *= d
        spread *= d or 1
    if spread >= MAX_ELEMENTS:  # even beside a zero: readers multiply from the left
        raise _bad(path, f"tensor {shown!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise _bad(path, f"tensor {shown!r} has no pair of data offsets")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not (0 <= begin <= _LAST and 0 <= end <= _LAST):
        raise _bad(path, f"tensor {shown!r} has no pair of data offsets")
    nbytes = numel * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise _bad(path, f"tensor {shown!r} spans {end - begin} bytes but its shape needs {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, nbytes)


def _utf8_length(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))
