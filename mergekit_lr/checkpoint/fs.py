"""The one place through which files are written, so that tests can fail or stop at any operation.

Every function is a thin wrapper of one system call. Anything that creates, changes, renames or removes a file
of an output goes through here; an injected `hook` sees each operation's name and path before it happens, and may
raise an OSError in its place. Reads of inputs pass by a hook of their own. A call that a signal interrupts is begun
again by Python itself; a write that took less than it was given is gone on with here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_lr.errors import ResourceError

Hook = Callable[[str, str], None]
_hook: Hook | None = None
_read_hook: Hook | None = None


def set_hook(hook: Hook | None) -> None:
    """Call ``hook(operation, path)`` before every operation from now on (tests only)."""
    global _hook
    _hook = hook


def set_read_hook(hook: Hook | None) -> None:
    """Call ``hook("open" or "read", path)`` before an input is opened or read (tests only)."""
    global _read_hook
    _read_hook = hook


def reading(operation: str, path: str | os.PathLike[str]) -> None:
    """Announce that an input is about to be opened or read, by whoever does it."""
    if _read_hook is not None:
        _read_hook(operation, os.fspath(path))


def _announce(operation: str, path: str | os.PathLike[str]) -> None:
    if _hook is not None:
        _hook(operation, os.fspath(path))


_FIXES = {
    errno.ENOSPC: "free some space and run the same command again: it resumes",
    errno.EDQUOT: "raise the quota or free some space and run the same command again: it resumes",
    errno.EACCES: "choose a place you may write to, or change its permissions",
    errno.EPERM: "choose a place you may write to, or change its permissions",
    errno.EROFS: "choose a place that is not mounted read-only",
    errno.ENOENT: "create the parent folder first",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def explained(doing: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError into a ResourceError that says what to do."""
    try:
        yield
    except OSError as e:
        fix = _FIXES.get(e.errno or 0, "run the same command again once that is mended: it resumes")
        raise ResourceError(f"cannot {doing}", where=os.fspath(path), why=e.strerror or str(e), fix=fix) from e


def make_folder(path: Path, *, parents: bool = False) -> None:
    """Create a folder with the user's own mode (0777 less the umask); an existing one is fine."""
    with explained("create the folder", path):
        _announce("mkdir", path)
        path.mkdir(parents=parents, exist_ok=True)


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create a file that must not exist yet; False if it does. For a moment it is there and empty."""
    with explained("create the file", path):
        _announce("create", path)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
    return True


def create_whole(path: Path, data: bytes) -> bool:
    """Create a file that must not exist yet, durable and never seen in part; False if it exists.

    It is written under another name and then linked to its own, which fails where the name is taken.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        write_file(draft, data)
        with explained("create the file", path):
            _announce("link", path)
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                Path(draft).rename(path)  # no hard links here: the lock alone keeps others out
    finally:
        with suppress(ResourceError):  # it goes with its folder
            remove_file(draft)
    fsync(path.parent)
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


def truncate(fd: int, size: int, path: Path) -> None:
    """Cut an open file to ``size`` bytes."""
    with explained("truncate", path):
        _announce("truncate", path)
        os.ftruncate(fd, size)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the disk begin on a written range, so that the fsync before the commit finds little left.

    Linux's sync_file_range; elsewhere, and where the file system will not, nothing happens: it is only a hint.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def append(path: Path, data: bytes) -> None:
    """Append one record, which must bear a torn copy of itself before it, with a single write.

    Others may append too, so a write that took only a part is not gone on with: the whole record is written again.
    """
    with explained("append", path):
        _announce("append", path)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            for _ in range(5):
                if os.write(fd, data) == len(data):
                    return
            raise OSError(errno.EIO, "only a part of it is written each time")
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
        try:
            fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            _remove(path, fd)
        finally:
            os.close(fd)


def _remove(path: Path, parent: int) -> None:
    """Remove ``path``, whose folder is open as ``parent``: a folder that becomes a link meanwhile is not entered."""
    try:
        folder = stat.S_ISDIR(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode)
        if folder:
            fd = os.open(path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            try:
                for name in sorted(os.listdir(fd)):  # noqa: PTH208 - of a descriptor
                    _remove(path / name, fd)
            finally:
                os.close(fd)
        _announce("rmdir" if folder else "unlink", path)
        (os.rmdir if folder else os.unlink)(path.name, dir_fd=parent)
    except FileNotFoundError:
        return


def remove_if_empty(path: Path) -> None:
    """Remove a folder if nothing is in it."""
    with explained("remove", path):
        _announce("rmdir", path)
        try:
            path.rmdir()
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of this file, made if need be; None while another process holds it.

    The kernel takes the lock back when the last process with the descriptor ends, however it ends. Where the file
    system has no locks the descriptor comes all the same, and only what the file says can keep others out.
    """
    with explained("lock", path):
        while True:
            _announce("lock", path)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            except OSError as e:
                if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    os.close(fd)
                    raise
            if is_at(fd, path):  # its last holder may have removed it between our two calls
                return fd
            os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Whether the open file is (still) the one with this name."""
    own = os.fstat(fd)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)
