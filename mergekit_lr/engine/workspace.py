"""The folder in which a run works, and the one rename that turns it into an output.

``OUT.partial/`` holds ``model/`` (what will be ``OUT``), ``plan.json`` (what the run was asked for), the
``journal`` and a ``lock``. Until the rename nothing is at ``OUT``; after it everything is. A run that finds a
matching ``OUT.partial`` goes on where it stopped; one that finds another's refuses and says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.engine.journal import Journal
from mergekit_lr.engine.lock import FolderLock
from mergekit_lr.engine.target import check_place, refuse_inputs
from mergekit_lr.errors import ResourceError, UsageError

SHARED = "shared"
"""The folder that says that the work is done in parts; see `mergekit_lr.engine.shared_space`."""

PREPARED = "preparation"
"""The key in a report's ``run`` for the digest of what was prepared for it."""

MARKS = ("lock", "plan.json", "prepared.json", SHARED, "statistics", "inputs", "stages")
"""What files and folders begin with by which a folder is known to be a run's."""


@dataclass
class Workspace:
    """Paths of one run. ``fingerprint`` decides whether earlier work may be used, ``preparation`` whether what was
    prepared for it may."""

    out: Path
    fingerprint: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.out.name in ("", ".."):
            raise UsageError("the output has no name", where=str(self.out), fix="name a folder, such as out")
        self.root = self.out.with_name(self.out.name + ".partial")
        self.model = self.root / "model"
        self.plan = self.root / "plan.json"
        self.replaced = self.root / "replaced"
        self._lock = FolderLock(self.root / "lock")

    @property
    def held(self) -> bool:
        """Whether the lock is ours."""
        return self._lock.held

    def check_target(self, *, overwrite: bool, inputs: Sequence[Path], into: bool = False) -> None:
        """Refuse to write over an input or (but for ``into``) inside one, or over anything without being told to."""
        check_place(self.out)
        refuse_inputs(self.out, self.root, inputs, into=into)
        if not overwrite and os.path.lexists(self.out):
            raise self._exists()

    def _exists(self) -> UsageError:
        return UsageError(
            "the output exists already", where=str(self.out), fix="choose another name, or pass --overwrite"
        )

    @property
    def digest(self) -> str:
        """sha256 of the fingerprint; the report carries it, so that an output says which run made it."""
        return digest_of(self.fingerprint)

    def committed(self, *, prepared: bool = False) -> bool:
        """Whether this very run was renamed into place before and was killed before it tidied up.

        The output's report tells, by the digest of the fingerprint or, with ``prepared``, of the preparation.
        """
        report = _read(self.out / "merge_report.json") or {}
        if prepared:
            same = (report.get("run") or {}).get(PREPARED) == digest_of(self.preparation)
        else:
            same = report.get("fingerprint") == self.digest
        return same and self.tidied_up()

    def tidied_up(self) -> bool:
        """Do what was left to do after a rename into place, if it was made and left that."""
        if not self.root.exists():
            return False
        self.take()
        if self.model.exists():
            return False
        fs.fsync(self.out.parent)  # the rename may have been the last that was done
        self.discard()
        return True

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

    def claim(self, *, resume: bool, overwrite: bool = True) -> None:
        """Create or take over ``OUT.partial``; start afresh unless resuming finds the same fingerprint."""
        if not self.held:
            self.reserve(resume=resume, overwrite=overwrite)
        try:
            self.match(self.plan, self.fingerprint, (self.model, self.root / "parts", self.root / "journal"))
        except BaseException:
            self.release()
            raise
        fs.make_folder(self.model)

    def reserve(self, *, resume: bool, overwrite: bool = True) -> None:
        """Take ``OUT.partial`` for this process; empty it unless resuming."""
        check_place(self.out)
        if not overwrite and os.path.lexists(self.out):
            raise self._exists()
        self.take()
        try:
            if not overwrite and os.path.lexists(self.out):
                raise self._exists()  # also where somebody finished it while we asked for the lock
            if not resume:
                self._give_back_replaced()
                self._empty()
            if (self.root / SHARED).exists():
                raise UsageError(
                    "the unfinished work there is done in parts",
                    where=str(self.root),
                    fix="run the parts that are missing with --part, or pass --restart to discard it",
                )
        except BaseException:
            self.release()
            raise

    def take(self) -> None:
        """Take the lock; refuse a folder of that name that no run made."""
        if self.held:
            return
        with fs.explained("look into", self.root):
            folder = self.root.is_dir() and not self.root.is_symlink()
            found = {p.name for p in self.root.iterdir()} if folder else set()
        if not folder and os.path.lexists(self.root):
            found = {self.root.name}
        if found and not (folder and any(n.startswith(m) for n in found for m in MARKS)):
            raise UsageError(
                "this is where the run would work, and something else is there",
                where=str(self.root),
                why=f"it holds {min(found)!r} and is no run's",
                fix="move it, or choose another output",
            )
        self._lock.take()

    def match(self, path: Path, fingerprint: dict[str, Any], stale: Sequence[Path] = ()) -> None:
        """Write down what is being done, or compare with what an earlier run wrote down.

        ``stale``: what can only be of another run if nothing is written down; it is removed.

        Raises:
            UsageError: they differ.
        """
        wanted = json.dumps(fingerprint, sort_keys=True, indent=1).encode()
        before = _read(path)
        if before is None:
            for old in (path, *stale):
                fs.remove_tree(old)
            if fs.create_whole(path, wanted):
                return
            before = _read(path) or {}
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
        with fs.explained("look into", self.root):  # another process may clear it where locks do not work
            stat = os.statvfs(self.root)
            held = sum(p.stat().st_blocks * 512 for p in self.model.glob("*.safetensors"))
        needed = layout.file_bytes + layout.file_bytes // 50 - held
        free = stat.f_bavail * stat.f_frsize
        if needed > free:
            raise ResourceError(
                f"the output needs {needed} bytes more ({needed / 2**20:,.0f} MiB, 2 % to spare)",
                where=str(self.root),
                why=f"{free} bytes ({free / 2**20:,.0f} MiB) are free",
                fix="free some space and run the same command again: it resumes",
            )

    def journal(self) -> Journal:
        return Journal(self.root / "journal")

    def commit(self, files: dict[str, bytes], layout: Layout, *, overwrite: bool) -> None:
        """Make everything durable, then rename. ``files`` are the small ones: index, config, card, report."""
        for shard in layout.shards:
            self._make_durable(self.model / shard.file)
        folders = sorted({f.parent for f in map(Path, files)} - {Path()})
        for folder in folders:
            fs.make_folder(self.model / folder)
        for name, data in files.items():
            fs.write_file(self.model / name, data)
        self._remove_strays({s.file for s in layout.shards} | set(files))
        for folder in [*folders, Path()]:
            fs.fsync(self.model / folder)
        self._swap(overwrite)
        self.discard()

    def _make_durable(self, shard: Path) -> None:
        """fsync; what the disk refused once is done again, for the kernel may since take it for written."""
        try:
            fs.fsync(shard)
        except ResourceError:
            with suppress(ResourceError):
                fs.remove_file(shard)
            raise

    def _swap(self, overwrite: bool) -> None:
        """Put the finished model in the output's place; what was there is kept until it is."""
        if os.path.lexists(self.out):
            if not overwrite:
                raise self._exists()
            fs.remove_tree(self.replaced)
            fs.rename(self.out, self.replaced)
        try:
            fs.rename(self.model, self.out)
        except ResourceError as e:
            self._give_back_replaced()
            if not overwrite and os.path.lexists(self.out) and self.model.exists():
                raise self._exists() from e  # it came while this run was at work
            raise

    def _give_back_replaced(self) -> None:
        """Undo the first half of a swap whose second half never came."""
        if os.path.lexists(self.replaced) and not os.path.lexists(self.out):
            with suppress(ResourceError):
                fs.rename(self.replaced, self.out)

    def abandon(self) -> None:
        """Remove the workspace: all that it was for is elsewhere and durable."""
        self.discard()

    def _remove_strays(self, wanted: set[str]) -> None:
        with fs.explained("look into", self.model):
            found = [p for p in self.model.rglob("*") if p.is_symlink() or not p.is_dir()]
        for path in found:
            if path.relative_to(self.model).as_posix() not in wanted:
                fs.remove_file(path)

    def _empty(self) -> None:
        """Remove everything but the lock; last, when the rest is durably gone, what says that the folder is a run's."""
        with fs.explained("look into", self.root):
            names = {p.name for p in self.root.iterdir()}
        rest = sorted(names - set(MARKS))
        for name in rest:
            fs.remove_tree(self.root / name)
        if rest:
            fs.fsync(self.root)  # else a power failure could leave a folder that no run would call its own
        for name in sorted(names & set(MARKS) - {"lock"}):
            fs.remove_tree(self.root / name)

    def discard(self) -> None:
        """Remove ``OUT.partial``, the lock last: until then nobody else takes the folder for theirs."""
        self._empty()
        self._lock.release()
        fs.remove_if_empty(self.root)

    def release(self) -> None:
        """Let others have the unfinished work, if it is ours; an empty folder goes.

        That the lock's file stays, where it cannot be removed, does no harm: the kernel's lock is gone.
        """
        if self.held:
            with suppress(ResourceError):
                self._lock.release()
                fs.remove_if_empty(self.root)


def digest_of(fingerprint: dict[str, Any]) -> str:
    """sha256 of what a run was asked for."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """What an earlier run wrote down; None where there is nothing that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
