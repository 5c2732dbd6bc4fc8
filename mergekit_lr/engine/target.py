"""Where an output may not go: where nobody may write; over, around or into one of its inputs, however it is spelt."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import ResourceError, UsageError

Identity = tuple[int, int]


def check_place(out: Path) -> None:
    """Refuse an output whose parent is missing or may not be written to, before hours go into reading inputs.

    Raises:
        ResourceError: it is so.
    """
    parent = out.parent
    with fs.explained("look at the output's place", parent):
        there = parent.is_dir()
    if not there:
        raise ResourceError("the output's parent folder does not exist", where=str(parent), fix="create it first")
    with fs.explained("write to the output's parent folder", parent):
        if not os.access(parent, os.W_OK | os.X_OK):
            mounted_so = os.statvfs(parent).f_flag & os.ST_RDONLY
            code = errno.EROFS if mounted_so else errno.EACCES
            raise OSError(code, os.strerror(code))


def places_of(checkpoints: Iterable[Checkpoint]) -> list[Path]:
    """Every folder and file that the checkpoints are read from."""
    return list(dict.fromkeys(place for c in checkpoints for place in c.places()))


def refuse_inputs(out: Path, work: Path, inputs: Sequence[Path], *, into: bool = False) -> None:
    """Compare by device and inode, so links, other cases and mounts make no difference.

    ``work``: the folder in which the output is made, which may not be an input either. ``into``: an output inside an
    input's folder is fine.

    Raises:
        UsageError: the output is an input, holds one, or would be inside one.
    """
    target, above = _identity(out), _above(out)
    for used in inputs:
        own = _identity(used)
        same = os.path.realpath(out) == os.path.realpath(used) or (own is not None and own in (target, _identity(work)))
        if same or (target is not None and target in _above(used)):
            raise UsageError(
                "the output is one of the inputs" if same else "the output holds one of the inputs",
                where=str(out),
                why=f"{used} is read",
                fix="write to another folder",
            )
        if not into and own is not None and own in above:
            raise UsageError(
                "the output would be inside one of the inputs",
                where=str(out),
                why=f"{used} is read, and inputs are never changed",
                fix="write to a folder outside of it",
            )


def _identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _above(path: Path) -> set[Identity]:
    """The folders that a path lies in, as far as they exist."""
    real = Path(os.path.realpath(path))  # Path.resolve raises where a link leads round in a circle
    return {i for p in real.parents if (i := _identity(p)) is not None}
