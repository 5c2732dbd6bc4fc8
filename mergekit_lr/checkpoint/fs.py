"""The one place through which files are written, so that tests can fail or stop at any operation.

Every function is a thin wrapper of one system call. Anything that creates, changes, renames or removes a file
of an output goes through here; an injected `hook` sees each operation's name and path before it happens.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_lr.errors import ResourceError

Hook = Callable[[str, str], None]
_hook: Hook | None = None


def set_hook(hook: Hook | None) -> None:
    """Call ``hook(operation, path)`` before every operation from now on (tests only)."""
    global _hook
    _hook = hook


def _announce(operation: str, path: str | os.PathLike[str]) -> None:
    if _hook is not None:
        _hook(operation, os.fspath(path))


@contextmanager
def explained(doing: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError into a ResourceError that says what to do."""
    try:
        yield
    except OSError as e:
        fixes = {
            errno.ENOSPC: "free some space and run the same command again: it resumes",
            errno.EDQUOT: "raise the quota or free some space and run the same command again: it resumes",
            errno.EACCES: "choose a place you may write to, or change its permissions",
            errno.EROFS: "choose a place that is not mounted read-only",
            errno.ENOENT: "create the parent folder first",
        }
        fix = fixes.get(e.errno or 0, "run the same command again once that is mended: it resumes")
        raise ResourceError(f"cannot {doing}", where=os.fspath(path), why=e.strerror or str(e), fix=fix) from e


def make_folder(path: Path, *, parents: bool = False) -> None:
    """Create a folder with the user's own mode (0777 less the umask); an existing one is fine."""
    with explained("create the folder", path):
        _announce("mkdir", path)
        path.mkdir(parents=parents, exist_ok=True)


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create a file that must not exist yet; False if it does."""
    with explained("create the file", path):
        _announce("create", path)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    return True


def preallocate(path: Path, size: int) -> None:
    """Create (or keep) a file of exactly ``size`` bytes, its blocks reserved where the file system can."""
    with explained(f"reserve {size} bytes", path):
        _announce("preallocate", path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, size)
            if size:
                try:
                    os.posix_fallocate(fd, 0, size)
                except OSError as e:
                    if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                        raise
        finally:
            os.close(fd)


def open_for_writing(path: Path) -> int:
    """A descriptor for `pwrite` into an existing file."""
    with explained("open for writing", path):
        _announce("open", path)
        return os.open(path, os.O_RDWR)


def pwrite(fd: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of ``data`` at ``offset``."""
    with explained("write", path):
        _announce("pwrite", path)
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the disk begin on a written range, so that the fsync before the commit finds little left.

    Linux's sync_file_range; elsewhere, and where the file system will not, nothing happens: it is only a hint.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def append(path: Path, data: bytes) -> None:
    """Append one record with a single write."""
    with explained("append", path):
        _announce("append", path)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole small file and make it durable."""
    with explained("write", path):
        _announce("write", path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            _announce("fsync", path)
            os.fsync(fd)
        finally:
            os.close(fd)


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    with explained("make durable", path):
        _announce("fsync", path)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def rename(old: Path, new: Path) -> None:
    """Rename, atomically, and make the parent's entry durable."""
    with explained(f"rename {old.name}", new):
        _announce("rename", new)
        Path(old).rename(new)
        fsync(new.parent)


def move(old: Path, new: Path) -> bool:
    """Rename a folder where nothing may be yet; False if ``old`` is gone, or if something is at ``new`` already.

    Of several processes that move their own folders to one place exactly one gets True, on any file system that
    renames atomically: a folder does not replace one that holds something. The folder must not be empty.
    """
    with explained(f"rename {old.name}", new):
        _announce("rename", new)
        try:
            Path(old).rename(new)
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return False
            raise
        fsync(new.parent)
    return True


def remove_file(path: Path) -> None:
    with explained("remove", path):
        _announce("unlink", path)
        with suppress(FileNotFoundError):
            path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a folder of ours and all in it; links are removed, never followed."""
    with explained("remove", path):
        _announce("rmtree", path)
        if path.is_symlink():
            path.unlink()
        while path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):  # another process removes it too: go on with what it left
                shutil.rmtree(path)
