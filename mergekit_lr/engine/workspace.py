"""The folder in which a run works, and the one rename that turns it into an output.

``OUT.partial/`` holds ``model/`` (what will be ``OUT``), ``plan.json`` (what the run was asked for), the
``journal`` and a ``lock``. Until the rename nothing is at ``OUT``; after it everything is. A run that finds a
matching ``OUT.partial`` goes on where it stopped; one that finds another's refuses and says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.engine.journal import Journal
from mergekit_lr.errors import ResourceError, UsageError

SHARED = "shared"
"""The folder that says that the work is done in parts; see `mergekit_lr.engine.shared_space`."""


@dataclass
class Workspace:
    """Paths of one run. ``fingerprint`` decides whether earlier work may be used. ``held``: the lock is ours."""

    out: Path
    fingerprint: dict[str, Any] = field(default_factory=dict)
    held: bool = False

    def __post_init__(self) -> None:
        self.root = self.out.with_name(self.out.name + ".partial")
        self.model = self.root / "model"
        self.plan = self.root / "plan.json"
        self.lock = self.root / "lock"

    def check_target(self, *, overwrite: bool, inputs: list[Path]) -> None:
        """Refuse to write over an input, or over anything without being told to."""
        target = self.out.resolve()
        for used in inputs:
            own = used.resolve()
            if own == target or target in own.parents:
                raise UsageError("the output is one of the inputs", where=str(self.out), fix="write to another folder")
        if (self.out.exists() or self.out.is_symlink()) and not overwrite:
            raise UsageError(
                "the output exists already", where=str(self.out), fix="choose another name, or pass --overwrite"
            )

    @property
    def digest(self) -> str:
        """sha256 of the fingerprint; the report carries it, so that an output says which run made it."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()

    def committed(self) -> bool:
        """Whether this very run was renamed into place before and was killed before it tidied up."""
        report = self.out / "merge_report.json"
        if not self.root.exists() or self.model.exists() or not report.is_file():
            return False
        try:
            same = bool(json.loads(report.read_bytes()).get("fingerprint") == self.digest)
        except (ValueError, AttributeError):
            return False
        if same:
            fs.remove_tree(self.root)
        return same

    def holds(self, layout: Layout) -> bool:
        """Whether ``OUT`` is what this very run makes, and all there."""
        try:
            report = json.loads((self.out / "merge_report.json").read_bytes())
            complete = all((self.out / s.file).stat().st_size == s.size for s in layout.shards)
        except (OSError, ValueError):
            return False
        return complete and isinstance(report, dict) and report.get("fingerprint") == self.digest

    def unfinished(self) -> bool:
        """Whether unfinished work there is of this very run."""
        try:
            return bool(json.loads(self.plan.read_bytes()) == json.loads(json.dumps(self.fingerprint)))
        except (OSError, ValueError):
            return False

    def claim(self, *, resume: bool) -> None:
        """Create or take over ``OUT.partial``; start afresh unless resuming finds the same fingerprint."""
        if not self.held:
            self.reserve(resume=resume)
        try:
            self.match(self.plan, self.fingerprint)
        except BaseException:
            self.release()
            raise
        fs.make_folder(self.model)

    def reserve(self, *, resume: bool, overwrite: bool = True) -> None:
        """Take ``OUT.partial`` for this process; empty it unless resuming."""
        self._check_writable()
        if not overwrite and not self.root.exists():
            self.check_target(overwrite=False, inputs=[])
        if not resume:
            self._check_lock()
            fs.remove_tree(self.root)
        fs.make_folder(self.root)
        self._take_lock()
        self.held = True
        if (self.root / SHARED).exists():
            self.release()
            raise UsageError(
                "the unfinished work there is done in parts",
                where=str(self.root),
                fix="run the parts that are missing with --part, or pass --restart to discard it",
            )

    def _check_writable(self) -> None:
        parent = self.out.parent
        if not parent.is_dir():
            raise ResourceError("the output's parent folder does not exist", where=str(parent), fix="create it first")

    def match(self, path: Path, fingerprint: dict[str, Any]) -> None:
        """Write down what is being done, or compare with what an earlier run wrote down.

        Raises:
            UsageError: they differ.
        """
        wanted = json.dumps(fingerprint, sort_keys=True, indent=1).encode()
        if not path.exists():
            fs.write_file(path, wanted)
            return
        try:
            before = json.loads(path.read_bytes())
        except ValueError:
            before = None  # killed while it was being written: nothing was done yet
        if before is None:
            fs.write_file(path, wanted)
            return
        after = json.loads(wanted)
        if before != after:
            changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
            raise UsageError(
                "the unfinished work there was for another run",
                where=str(self.root),
                why=f"changed since: {', '.join(changed)}",
                fix="pass --restart to discard it, or choose another output",
            )

    def prepare(self, layout: Layout, only: Collection[int] | None = None) -> None:
        """Reserve the shards, or those whose numbers are in ``only``, and write their headers."""
        if only is None:
            self._check_space(layout)
        for shard in layout.shards if only is None else [layout.shards[i] for i in sorted(only)]:
            path = self.model / shard.file
            fs.preallocate(path, shard.size)
            fd = fs.open_for_writing(path)
            try:
                fs.pwrite(fd, memoryview(shard.header), 0, path)
            finally:
                os.close(fd)

    def _check_space(self, layout: Layout) -> None:
        stat = os.statvfs(self.root)
        held = sum(p.stat().st_blocks * 512 for p in self.model.glob("*.safetensors"))
        needed = int(layout.file_bytes * 1.02) - held
        free = stat.f_bavail * stat.f_frsize
        if needed > free:
            raise ResourceError(
                f"the output needs {needed / 2**20:.0f} MiB more",
                where=str(self.root),
                why=f"{free / 2**20:.0f} MiB are free",
                fix="free some space and run the same command again",
            )

    def journal(self) -> Journal:
        return Journal(self.root / "journal")

    def commit(self, files: dict[str, bytes], layout: Layout, *, overwrite: bool) -> None:
        """Make everything durable, then rename. ``files`` are the small ones: index, config, card, report."""
        for shard in layout.shards:
            fs.fsync(self.model / shard.file)
        folders = sorted({f.parent for f in map(Path, files)} - {Path()})
        for folder in folders:
            fs.make_folder(self.model / folder)
        for name, data in files.items():
            fs.write_file(self.model / name, data)
        self._remove_strays({s.file for s in layout.shards} | set(files))
        for folder in [*folders, Path()]:
            fs.fsync(self.model / folder)
        aside = self.root / "replaced"
        if overwrite and (self.out.exists() or self.out.is_symlink()):
            fs.rename(self.out, aside)
        fs.rename(self.model, self.out)
        fs.remove_tree(self.root)

    def abandon(self) -> None:
        """Remove the workspace: all that it was for is elsewhere and durable."""
        fs.remove_tree(self.root)

    def _remove_strays(self, wanted: set[str]) -> None:
        for path in [p for p in self.model.rglob("*") if not p.is_dir()]:
            if path.relative_to(self.model).as_posix() not in wanted:
                fs.remove_file(path)

    def _take_lock(self) -> None:
        while not fs.create_exclusive(self.lock, json.dumps(this_process()).encode()):
            self._check_lock()
            fs.remove_file(self.lock)

    def _check_lock(self) -> None:
        """Refuse while another live process holds the lock. One left by a dead process does not count."""
        try:
            holder = json.loads(self.lock.read_bytes())
        except (FileNotFoundError, ValueError):
            return
        if isinstance(holder, dict) and is_alive(holder):
            raise UsageError(
                "another run is writing this output",
                where=str(self.root),
                why=f"process {holder.get('pid')} on {holder.get('host')}",
                fix=_if_held(holder, self.lock),
            )

    def release(self) -> None:
        """Let others have the unfinished work, if it is ours and there is any."""
        if self.held and self.lock.exists():
            fs.remove_file(self.lock)
        self.held = False


def _if_held(holder: dict[str, Any], lock: Path) -> str:
    if holder.get("host") == socket.gethostname():
        return "wait for it, or choose another output"
    return f"wait for it, or choose another output; if that machine is gone remove {lock}"


def this_process() -> dict[str, Any]:
    """Enough to tell, on the same machine, whether this process still runs."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "began": _began(os.getpid())}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process started, so that a recycled pid is not taken for its former owner."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote this down still runs; one of another machine is believed to."""
    if holder.get("host") != socket.gethostname():
        return True  # it cannot be asked; believing it costs a retry, not believing it a corrupted output
    if holder.get("boot") != _boot():
        return False
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return bool(_began(int(holder["pid"])) == holder.get("began"))
