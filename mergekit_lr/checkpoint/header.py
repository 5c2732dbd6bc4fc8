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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.errors import CheckpointError

MAX_HEADER = 100_000_000
MAX_RANK = 16
MAX_DIMENSION = 1 << 48
MAX_ELEMENTS = 1 << 56
MAX_NAME = 512
MAX_TENSORS = 2_000_000
_LAST = 1 << 62
MAX_ENTRY = 4096
MAX_METADATA = 16 << 20
"""Characters of one tensor's entry, and of ``__metadata__``."""
AT_ONCE = 1 << 20
"""Bytes of a header that is parsed in one go; a longer one entry by entry, which is slower and takes less."""


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
        fs.reading("open", path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would otherwise wait for ever
    except OSError as e:
        raise CheckpointError(
            "cannot open the file", where=str(path), why=e.strerror or str(e), fix="check the path"
        ) from e
    try:
        fs.reading("read", path)
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
    data_start = 8 + len(raw)
    found: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    try:
        text = raw.decode("utf-8")
        # A minus before a value is rare; only then each number is looked at as text.
        decoder = _STRICT if _MINUS.search(raw) else _PLAIN
        entries = decoder.decode(text).items() if len(raw) <= AT_ONCE else _entries(text, decoder)
        for name, entry in entries:
            if name in found or (name == "__metadata__" and metadata is not None):
                raise ValueError(f"key {name[:80]!r} appears twice")
            if name == "__metadata__":
                metadata = _metadata(entry, path)
                continue
            found[name] = _tensor(name, entry, data_start, path)
            if len(found) > MAX_TENSORS:
                raise _bad(path, f"it lists more than {MAX_TENSORS} tensors")
    except (ValueError, RecursionError) as e:
        raise _bad(path, f"the header is not valid JSON: {e}") from e
    tensors = sorted(found.values(), key=lambda t: (t.offset, t.nbytes))
    end = data_start
    for t in tensors:
        if t.offset != end:
            raise _bad(path, f"tensor {t.name!r} leaves a hole or overlaps its neighbour")
        end += t.nbytes
    if end != file_size:
        raise _bad(path, f"its tensors end at byte {end}, the file at {file_size}")
    return Header({t.name: t for t in tensors}, metadata or {}, hashlib.sha256(raw).hexdigest(), file_size)


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
_PLAIN = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_constant)
_STRICT = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_constant, parse_int=_integer)
_ENTRY = {"dtype", "shape", "data_offsets"}
_SPACE = re.compile(r"[ \t\n\r]*")


def _entries(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any]]:
    """The header's entries, parsed one at a time: one that lies is refused before the next is looked at.

    Parsed at once, a header of 100 MB can become 2 GB of empty lists.
    """
    at = _after_space(text, 1)
    if text[at : at + 1] == "}":
        _nothing_after(text, at + 1)
        return
    while True:
        if text[at : at + 1] != '"':
            raise ValueError(f"a name in quotes was expected at character {at}")
        name, at = decoder.raw_decode(text, at)
        at = _after_space(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"a colon was expected at character {at}")
        at = _after_space(text, at + 1)
        # A tensor's entry holds no braces of its own, so the first one ends it.
        end = at + MAX_METADATA if name == "__metadata__" else text.find("}", at, at + MAX_ENTRY) + 1
        if not end:
            raise ValueError(f"the entry of {name[:80]!r} is no object of at most {MAX_ENTRY} characters")
        value, length = decoder.raw_decode(text[at:end])
        yield name, value
        at = _after_space(text, at + length)
        if text[at : at + 1] == "}":
            _nothing_after(text, at + 1)
            return
        if text[at : at + 1] != ",":
            raise ValueError(f"a comma was expected at character {at}")
        at = _after_space(text, at + 1)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _nothing_after(text: str, at: int) -> None:
    if _after_space(text, at) != len(text):
        raise ValueError(f"there is more behind its end, at character {at}")


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _bad(path, "__metadata__ must map strings to strings")
    return value


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
