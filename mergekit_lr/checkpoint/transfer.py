"""One file from the Hub to a folder of ours: resumed where it stopped, compared with its digest, then named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.hub import RemoteFile, digest_of
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.remote import requested, whole_size
from mergekit_lr.checkpoint.retry import Interrupted, patiently
from mergekit_lr.errors import CheckpointError

Tell = Callable[[int], None]


def download(place: Place, file: RemoteFile, target: Path, tell: Tell | None = None) -> None:
    """Fetch a file of a pinned commit to ``target``. What an interrupted run left beside it is gone on with.

    ``tell`` gets the bytes of each block. The file has its name only when it is complete, compared and durable.

    Raises:
        CheckpointError: it differs from what the Hub states, twice.
        ResourceError: the Hub does not deliver, or the disk refuses.
    """
    partial = target.with_name(target.name + ".incomplete")
    wrong = _arrive(place, file, partial, tell) and _arrive(place, file, partial, tell)
    if wrong:
        raise CheckpointError(
            f"{file.name!r} arrives damaged",
            where=str(place),
            why=f"{wrong}; it was fetched twice",
            fix="try again later, or another revision; a proxy on the way may change it",
        )
    fs.fsync(partial)
    fs.rename(partial, target)


def _arrive(place: Place, file: RemoteFile, partial: Path, tell: Tell | None) -> str:
    """Fetch what ``partial`` lacks. What is wrong with it then, in words, and it is gone; empty where nothing is."""
    patiently(place, lambda: _append(place, file, partial, tell), doing=f"download {file.name}")
    wrong = file.matches(partial)
    if wrong:
        fs.remove_file(partial)
    return wrong


def _append(place: Place, file: RemoteFile, partial: Path, tell: Tell | None) -> None:
    """Bring ``partial`` to its full size, from where it ends."""
    fs.create_exclusive(partial, b"")
    have = partial.stat().st_size
    if have > file.size:
        fs.remove_file(partial)
        fs.create_exclusive(partial, b"")
        have = 0
    if have == file.size:
        return
    fd = fs.open_for_writing(partial)
    try:
        with requested(place, file.name, f"bytes={have}-") as response:
            if response.status_code != 206:
                have = 0  # the server ignores ranges and sends the whole file
            if whole_size(response) != file.size:
                raise CheckpointError(
                    f"{file.name!r} has another size than the Hub states",
                    where=str(place),
                    why=f"{whole_size(response)} and {file.size} bytes",
                    fix="try again later, or another revision",
                )
            for block in response.iter_bytes():  # as it comes: what arrived before a break is kept
                if have + len(block) > file.size:
                    raise Interrupted(f"the Hub sent more than the {file.size} bytes of {file.name}")
                fs.pwrite(fd, memoryview(block), have, partial)
                have += len(block)
                if tell is not None:
                    tell(len(block))
    finally:
        os.close(fd)
    if have < file.size:
        raise Interrupted(f"the Hub sent {have} of the {file.size} bytes of {file.name}")


def is_whole(path: Path, file: RemoteFile, *, compare: bool) -> bool:
    """Whether an earlier run's file is there: by its size, and with ``compare`` by its digest."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return not compare or file.sha256 is None or digest_of(path, hashlib.sha256()) == file.sha256
