"""Who works in a folder: a lock that the kernel keeps, and a file that says whose it is.

The kernel's lock goes with the process, so nothing is left to be judged stale; no two runs can take over from a dead
one at once. Where it cannot be relied on (file systems of other machines), the file's word counts: host, process,
boot and the time at which the process began.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.errors import ResourceError, UsageError

PATIENCE = 10.0  # seconds that the workers of a killed run may take to end
_TICK = 0.05


class FolderLock:
    """The right to work in the folder of ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def take(self) -> None:
        """Take the lock, making its folder if need be; what is there already is taken.

        Raises:
            UsageError: another run has it, and is alive.
            ResourceError: the file system refuses.
        """
        patience = time.monotonic() + PATIENCE
        while self._fd is None:
            fs.make_folder(self.path.parent)
            try:
                fd = fs.try_lock(self.path)
            except ResourceError:
                if self.path.parent.is_dir():
                    raise
                continue  # its last holder has just tidied up
            holder = self._holder()
            if fd is not None:
                self._settle(fd, holder)
            elif (holder is not None and is_alive(holder)) or time.monotonic() > patience:
                raise _taken(self.path.parent, holder)
            else:  # it is being taken this moment, or its dead holder's workers are on their way out
                time.sleep(_TICK)

    def _settle(self, fd: int, holder: dict[str, Any] | None) -> None:
        """Write down that the lock is ours, unless the file says that another lives."""
        try:
            if holder is not None and holder.get("pid") != os.getpid() and is_alive(holder):
                raise _taken(self.path.parent, holder)
            own = json.dumps(this_process()).encode()
            fs.truncate(fd, 0, self.path)
            fs.pwrite(fd, memoryview(own), 0, self.path)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _holder(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def release(self) -> None:
        """Let others have it, and remove its file."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            if fs.is_at(fd, self.path):
                fs.remove_file(self.path)
        finally:
            os.close(fd)


def _taken(folder: Path, holder: dict[str, Any] | None) -> UsageError:
    fix = "wait for it, or choose another output"
    if holder is not None and holder.get("host") != socket.gethostname():
        fix += f"; if that machine is gone remove {folder / 'lock'}"
    return UsageError(
        "another run is writing this output",
        where=str(folder),
        why=f"process {holder.get('pid')} on {holder.get('host')}" if holder else "its lock is held",
        fix=fix,
    )


def this_process() -> dict[str, Any]:
    """Enough to tell, on the same machine, whether this process still runs."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "began": began(os.getpid())}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def began(pid: int) -> str:
    """When a process started, so that a recycled pid is not taken for its former owner."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote this identity may still be at work."""
    if holder.get("host") != socket.gethostname():
        return True  # it cannot be asked; believing it costs a retry, not believing it a corrupted output
    if holder.get("boot") != _boot():
        return False
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError, TypeError, OverflowError):
        return False
    except PermissionError:
        return True
    return bool(began(int(holder["pid"])) == holder.get("began"))
