"""The headers of a Hub model, without its weights: a merge of any size can be planned in seconds.

A safetensors header stands at the start of its file, so a range request for a few kilobytes is enough. What comes is
checked like a local header, and against the index and the size that the Hub states.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.header import MAX_HEADER, Header, parse_header, read_header
from mergekit_lr.checkpoint.hub import INDEX, SMALL_FILES, RemoteFile, listing, snapshot
from mergekit_lr.checkpoint.model import HUB, Checkpoint, Part, Stamp, assemble, read_weight_map, stamp_of
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.retry import Interrupted, patiently
from mergekit_lr.checkpoint.small_files import inside, read_config
from mergekit_lr.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FIRST_READ = 1 << 17
"""Bytes of the first request: most headers fit."""

AT_ONCE = 8
"""Requests for headers under way at a time."""

TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""


@dataclass
class RemoteCheckpoint(Checkpoint):
    """Names, shapes and dtypes of a Hub model. Its commit is pinned, so it cannot change.

    ``missing``: bytes of the files that are not on this machine, by the path that they would have in the cache.
    """

    missing: dict[Path, int] = field(default_factory=dict, repr=False)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Always an error: the weights are not here."""
        raise CheckpointError(
            f"tensor {name!r} was not downloaded", where=self.reference, why="the model was opened for planning only"
        )

    def changed(self) -> list[str]:
        """None: a commit does not change."""
        return []


@dataclass(frozen=True)
class Remote:
    """A Hub model by its headers: what is where, before it is a checkpoint."""

    place: Place  # pinned to a commit
    folder: Path
    config: dict[str, Any] | None
    parts: tuple[Part, ...]
    files: Mapping[str, RemoteFile]  # those that are not in the cache


def open_headers(place: Place, reference: str, *, cache: Path | None = None, hint: str = "") -> Checkpoint | None:
    """A Hub model by its headers; None where there are no safetensors, or all of them are in the cache already.

    Raises:
        CheckpointError: the Hub refuses, or what it delivers is not sound.
        ResourceError: the Hub does not deliver.
    """
    remote = look(place, cache=cache, hint=hint)
    if remote is None:
        return None
    empty = RemoteCheckpoint(reference, remote.folder, remote.config, {}, {}, (), revision=remote.folder.name)
    empty.missing = {remote.folder / file.name: file.size for file in remote.files.values()}
    return assemble(empty, remote.parts)


def look(place: Place, *, cache: Path | None = None, hint: str = "") -> Remote | None:
    """Headers, config and file list of a Hub model; None as in `open_headers`."""
    folder = snapshot(place, SMALL_FILES, cache, hint)
    pinned = Place(place.path, folder.name)
    index = folder / INDEX
    chosen: dict[str, set[str] | None] = {}
    stated: Mapping[str, RemoteFile] = {}
    if index.exists():
        chosen = {**read_weight_map(index)}
        if all((folder / name).exists() for name in chosen):
            return None
    elif (folder / "model.safetensors").exists():
        return None
    stated = listing(pinned, hint)
    chosen = chosen or dict.fromkeys(_weights(stated))
    if not chosen or all((folder / name).exists() for name in chosen):
        return None
    config = read_config(inside(folder, "config.json")) if (folder / "config.json").exists() else None
    absent = [name for name in sorted(chosen) if name not in stated]
    if absent:
        raise CheckpointError(
            f"shard {absent[0]!r} is missing on the Hub",
            where=str(place),
            why=f"{len(absent)} of the {len(chosen)} shards in the index are not in the repository",
            fix="choose another revision, or tell its owner",
        )

    def part(name: str) -> Part:
        local = folder / name
        if local.exists():
            header = read_header(inside(folder, name))
            return Part(local, header, stamp_of(local, header), chosen[name])
        header = fetch_header(pinned, stated[name], hint)
        return Part(local, header, Stamp(f"{HUB}{pinned}/{name}", header.file_size, 0, 0, header.digest), chosen[name])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = tuple(pool.map(part, sorted(chosen)))
    missing = {n: stated[n] for n in chosen if not (folder / n).exists()}
    sized = {p.path.name: p.header.file_size for p in parts}
    files = {n: RemoteFile(n, sized[n], f.sha256, f.git) for n, f in missing.items()}
    return Remote(pinned, folder, config, parts, files)


def _weights(stated: Mapping[str, RemoteFile]) -> list[str]:
    """Weight files of a model without index: ``model.safetensors``, or all at the top level."""
    found = [n for n in stated if n.endswith(".safetensors") and not n.startswith("adapter_")]
    return ["model.safetensors"] if "model.safetensors" in found else sorted(found)


def fetch_header(place: Place, file: RemoteFile, hint: str = "") -> Header:
    """The checked header of one file on the Hub."""
    start, size = fetch_start(place, file.name, FIRST_READ, hint)
    where = Path(f"{place}/{file.name}")
    if file.size not in (-1, size):
        raise CheckpointError(
            "the Hub states two sizes of one file", where=str(where), why=f"{file.size} and {size} bytes"
        )
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise CheckpointError(
            "not a sound safetensors file", where=str(where), why=f"header length {length} of {size} bytes"
        )
    if len(start) < 8 + length:
        start, _ = fetch_start(place, file.name, 8 + length, hint)
    return parse_header(start[8 : 8 + length], size, where)


def fetch_start(place: Place, name: str, count: int, hint: str) -> tuple[bytes, int]:
    """The first ``count`` bytes of a file (or all of it, if shorter) and the size of the whole."""

    def get() -> tuple[bytes, int]:
        data = bytearray()
        with requested(place, name, f"bytes=0-{count - 1}") as response:
            for piece in response.iter_bytes():  # a server that ignores the range would send the whole file
                data += piece
                if len(data) >= count:
                    break
            size = whole_size(response)
        if size is None:
            raise CheckpointError("the Hub does not say how large a file is", where=f"{place}/{name}")
        if len(data) < min(count, size):
            raise Interrupted(f"the Hub sent {len(data)} of {min(count, size)} bytes")
        return bytes(data[:count]), size

    return patiently(place, get, hint=hint, doing=f"get the header of {name}")


@contextmanager
def requested(place: Place, name: str, span: str) -> Iterator[Any]:
    """A response with a part of a file. The client drops the token where it is sent on to another host."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub import utils as hub

    headers = hub.build_hf_headers()  # type: ignore[attr-defined]
    headers |= {"range": span, "accept-encoding": "identity"}
    url = hf_hub_url(place.path, name, revision=place.revision)
    session = hub.get_session()  # type: ignore[attr-defined]
    with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT) as response:
        hub.hf_raise_for_status(response)  # type: ignore[attr-defined]
        yield response


def whole_size(response: Any) -> int | None:
    """Size of the whole file, from the answer to a request for a part; None where the server does not say it."""
    part = response.headers.get("content-range")  # without it the whole file is coming, and its length is its size
    text = response.headers.get("content-length", "") if part is None else part.rpartition("/")[2]
    return int(text) if text.isdigit() else None
