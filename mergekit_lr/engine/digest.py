"""Digest of a tensor's bytes, computed while they are written, in parts.

The digest is xxh3_128 over the concatenated xxh3_128 digests of consecutive `CHUNK` bytes, as hex. Chunks are
independent, so parts of a tensor may be written in any order by any worker. It guards against damage, not
against forgery: sign the report where that matters.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

CHUNK = 32 << 20
ALGORITHM = "xxh3_128 of the xxh3_128 digests of consecutive 32 MiB"


class ChunkDigests:
    """Feeds consecutive bytes, starting at a chunk's boundary; collects one digest per chunk."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._current = xxhash.xxh3_128()
        self._room = CHUNK

    def update(self, data: memoryview) -> None:
        while data:
            part = data[: self._room]
            self._current.update(part)
            self._room -= len(part)
            data = data[len(part) :]
            if not self._room:
                self._close()

    def _close(self) -> None:
        self._done.append(self._current.hexdigest())
        self._current, self._room = xxhash.xxh3_128(), CHUNK

    def finish(self) -> list[str]:
        """Digests of the chunks, the last of which may be short."""
        if self._room < CHUNK or not self._done:
            self._close()
        return self._done


def combine(chunks: Iterable[str]) -> str:
    """The digest of a tensor from those of its chunks."""
    h = xxhash.xxh3_128()
    for c in chunks:
        h.update(bytes.fromhex(c))
    return h.hexdigest()
