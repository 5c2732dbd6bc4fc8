"""What is done, in a file that survives a kill: one checksummed line per finished unit."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs


class Journal:
    """Append-only. A torn or damaged line is as if it were not there; its unit is done again.

    ``earlier``: files of other processes that are read first and never written to.
    """

    def __init__(self, path: Path, earlier: Sequence[Path] = ()) -> None:
        self.path, self.earlier = path, earlier
        self._lock = threading.Lock()
        self.done: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        done: dict[str, dict[str, Any]] = {}
        for path in (*self.earlier, self.path):
            for line in path.read_bytes().split(b"\n") if path.exists() else ():
                crc, _, body = line.partition(b" ")
                if len(crc) == 8 and crc == _crc(body):
                    record = json.loads(body)
                    done[record["unit"]] = record
        return done

    def record(self, record: dict[str, Any]) -> None:
        """Note a finished unit: its key under ``unit``, and whatever resuming or the report needs."""
        body = json.dumps(record, separators=(",", ":")).encode()
        with self._lock:
            # A newline first: a line torn by a kill must not swallow this one.
            fs.append(self.path, b"\n" + _crc(body) + b" " + body)
            self.done[record["unit"]] = record

    def unlock(self) -> None:
        """After a fork: the lock may have been held by a thread that is not here."""
        self._lock = threading.Lock()

    def reload(self) -> None:
        """Read what other processes have added."""
        self.done = {**self.done, **self._read()}

    def forget(self, unit: str) -> None:
        self.done.pop(unit, None)


def _crc(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)
