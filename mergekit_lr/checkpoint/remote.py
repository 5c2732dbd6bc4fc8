"""The headers of a Hub model, without its weights: a merge of any size can be planned in seconds.

A safetensors header stands at the start of its file, so a range request for a few kilobytes is enough.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.header import MAX_HEADER, Header, parse_header, read_header
from mergekit_lr.checkpoint.hub import INDEX, SMALL_FILES, explained, snapshot
from mergekit_lr.checkpoint.model import Checkpoint, Part, Stamp, assemble, inside, read_json, read_weight_map
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FIRST_READ = 1 << 17
"""Bytes of the first request: most headers fit."""


@dataclass
class RemoteCheckpoint(Checkpoint):
    """Names, shapes and dtypes of a Hub model. Its commit is pinned, so it cannot change."""

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Always an error: the weights are not here."""
        raise CheckpointError(
            f"tensor {name!r} was not downloaded", where=self.reference, why="the model was opened for planning only"
        )

    def changed(self) -> list[str]:
        """None: a commit does not change."""
        return []


def open_headers(place: Place, reference: str, *, cache: Path | None = None, hint: str = "") -> Checkpoint | None:
    """A Hub model by its headers; None where there are no safetensors, or all of them are in the cache already.

    Raises:
        CheckpointError: the Hub does not deliver, or what it delivers is not sound.
    """
    folder = snapshot(place, SMALL_FILES, cache, hint)
    pinned = Place(place.path, folder.name)
    index = folder / INDEX
    chosen: dict[str, set[str] | None]
    chosen = {**read_weight_map(index)} if index.exists() else dict.fromkeys(_listed(pinned, hint))
    if not chosen or all((folder / name).exists() for name in chosen):
        return None
    config = read_json(inside(folder, "config.json")) if (folder / "config.json").exists() else None
    if config is not None and not isinstance(config, dict):
        raise CheckpointError("config.json does not hold an object", where=str(place))
    parts = []
    for name in sorted(chosen):
        header = read_header(inside(folder, name)) if (folder / name).exists() else _fetch_header(pinned, name, hint)
        stamp = Stamp(f"hf://{pinned}/{name}", header.file_size, 0, 0, header.digest)
        parts.append(Part(folder / name, header, stamp, chosen[name]))
    checkpoint = RemoteCheckpoint(reference, folder, config, {}, {}, (), revision=folder.name)
    return assemble(checkpoint, parts)


def _listed(place: Place, hint: str) -> list[str]:
    """Weight files of a model without index: ``model.safetensors``, or all at the top level."""
    from huggingface_hub import HfApi

    with explained(place, hint):
        info = HfApi().model_info(place.path, revision=place.revision)
    names = [f.rfilename for f in info.siblings or []]
    found = [n for n in names if n.endswith(".safetensors") and "/" not in n and not n.startswith("adapter_")]
    return ["model.safetensors"] if "model.safetensors" in found else found


def _fetch_header(place: Place, name: str, hint: str) -> Header:
    start, size = _fetch(place, name, FIRST_READ, hint)
    where = Path(f"{place}/{name}")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise CheckpointError(
            "not a sound safetensors file", where=str(where), why=f"header length {length} of {size} bytes"
        )
    if len(start) < 8 + length:
        start, _ = _fetch(place, name, 8 + length, hint)
    if len(start) < 8 + length:
        raise CheckpointError("the Hub sent only part of a header", where=str(where), fix="try again later")
    return parse_header(start[8 : 8 + length], size, where)


def _fetch(place: Place, name: str, count: int, hint: str) -> tuple[bytes, int]:
    """The first ``count`` bytes of a file (or all of it, if shorter) and the size of the whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub import utils as hub

    url = hf_hub_url(place.path, name, revision=place.revision)
    headers = hub.build_hf_headers()  # type: ignore[attr-defined]
    headers |= {"range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    data = bytearray()
    with (
        explained(place, hint),
        hub.get_session().stream("GET", url, headers=headers, follow_redirects=True) as response,  # type: ignore[attr-defined]
    ):
        hub.hf_raise_for_status(response)  # type: ignore[attr-defined]
        for piece in response.iter_bytes():  # a server that ignores the range would send the whole file
            data += piece
            if len(data) >= count:
                break
        whole = response.headers.get("content-range", "").rpartition("/")[2]
        size = whole if whole.isdigit() else response.headers.get("content-length", "")
    if not size.isdigit():
        raise CheckpointError("the Hub does not say how large a file is", where=f"{place}/{name}")
    return bytes(data[:count]), int(size)
