"""Hub shards on a disk that cannot hold them all: fetched when they are needed, released when they are not.

Two ways in. `ShardStore.settle` is for who knows what comes: it makes exactly the wanted shards be there before anyone
reads. `ShardStore.held` is for readers that cannot say (calibration, statistics of the whole model): a shard is
fetched when it is first read, and the one that was used longest ago makes room. What is in the Hub's cache is read from
there and counts nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.hub import RemoteFile
from mergekit_lr.checkpoint.model import Checkpoint, Part, assemble
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.remote import Remote
from mergekit_lr.checkpoint.transfer import Tell, download, is_whole
from mergekit_lr.errors import ResourceError
from mergekit_lr.sizes import format_size


@dataclass
class ShardStore:
    """Shards of Hub models under ``folder``. ``room``: most bytes of them at once; None: no bound.

    ``compare``: shards that an earlier run left are compared with their digests before they are used. ``fetched``:
    bytes that were downloaded.
    """

    folder: Path
    room: int | None = None
    compare: bool = False
    lazy: bool = True
    fetched: int = 0
    files: dict[Path, tuple[Place, RemoteFile]] = field(default_factory=dict)
    _readers: list[StreamedCheckpoint] = field(default_factory=list)
    _there: dict[Path, int] = field(default_factory=dict)  # path -> when it was last used
    _pins: dict[Path, int] = field(default_factory=dict)
    _clock: int = 0
    _turn: threading.Condition = field(default_factory=threading.Condition)

    def open(self, remote: Remote, reference: str) -> StreamedCheckpoint:
        """A Hub model whose missing shards this store keeps."""
        home = self.folder / sha256(str(remote.place).encode()).hexdigest()[:16]
        parts = []
        for part in remote.parts:
            file = remote.files.get(part.path.name)
            if file is None:
                parts.append(part)
                continue
            path = home / file.name
            self.files[path] = remote.place, file
            parts.append(Part(path, part.header, part.stamp, part.wanted))
        empty = StreamedCheckpoint(
            reference, remote.folder, remote.config, {}, {}, (), revision=remote.folder.name, store=self
        )
        opened = assemble(empty, parts)
        self._readers.append(opened)
        return opened

    def size(self, path: Path) -> int:
        return self.files[path][1].size

    @property
    def used(self) -> int:
        """Bytes of the shards that are there."""
        return sum(self.size(p) for p in self._there)

    def find(self) -> None:
        """Take over what an earlier run left; remove what is nobody's."""
        for path in [p for p in self._there if not p.is_file()]:  # the workspace was begun anew
            self._release(path)
        for path, (_, file) in self.files.items():
            if path not in self._there and is_whole(path, file, compare=self.compare):
                self._there[path] = 0
        if self.folder.is_dir():
            for path in sorted(self.folder.rglob("*")):
                whole = path.with_name(path.name.removesuffix(".incomplete"))
                if path.is_file() and (whole not in self.files or (path == whole and path not in self._there)):
                    fs.remove_file(path)

    def settle(
        self, wanted: Collection[Path], later: Sequence[Collection[Path]] = (), tell: Tell | None = None
    ) -> None:
        """Let ``wanted`` be there. What ``later`` wants soonest stays if there is room; the rest is released.

        Nobody may be reading.

        Raises:
            ResourceError: they do not fit together, or cannot be fetched.
        """
        for path in self._to_release(wanted, later):
            self._release(path)
        for path in sorted(wanted):
            if path not in self._there:
                self._fetch(path, tell)

    def fetch_ahead(self, wanted: Collection[Path], tell: Tell) -> None:
        """Fetch of ``wanted`` what fits beside what is there. One call at a time; ``tell`` may raise to end it."""
        for path in sorted(wanted):
            if path not in self._there and (self.room is None or self.used + self.size(path) <= self.room):
                self._fetch(path, tell)

    def _to_release(self, wanted: Collection[Path], later: Sequence[Collection[Path]]) -> list[Path]:
        keep = set(wanted)
        used = sum(self.size(p) for p in keep)
        self._check(used)
        spare = []
        for more in later:
            spare += [p for p in sorted(more) if p in self._there and p not in keep and p not in spare]
        for path in spare:
            if self.room is None or used + self.size(path) <= self.room:
                keep.add(path)
                used += self.size(path)
        return [p for p in self._there if p not in keep]

    def _check(self, nbytes: int) -> None:
        if self.room is not None and nbytes > self.room:
            raise ResourceError(
                "the disk budget is too small",
                where=str(self.folder),
                why=f"shards of {format_size(nbytes)} are needed at once, {format_size(self.room)} are left for them",
                fix=f"allow {format_size(nbytes - self.room)} more with --disk-budget",
            )

    def _fetch(self, path: Path, tell: Tell | None) -> None:
        fs.make_folder(path.parent, parents=True)
        place, file = self.files[path]
        download(place, file, path, tell)
        self.fetched += file.size
        self._there[path] = self._clock

    def _release(self, path: Path) -> None:
        for reader in self._readers:
            reader.let_go(path)
        fs.remove_file(path)
        del self._there[path]

    @contextmanager
    def held(self, path: Path) -> Iterator[None]:
        """Have one shard there while it is read; any thread, and no forked process, may ask."""
        if not self.lazy or path not in self.files:
            yield
            return
        with self._turn:
            self._clock += 1
            if path not in self._there:
                self._make_room(self.size(path))
            if path not in self._there:  # making room lets others have their turn
                self._fetch(path, None)
            self._there[path] = self._clock
            self._pins[path] = self._pins.get(path, 0) + 1
        try:
            yield
        finally:
            with self._turn:
                self._pins[path] -= 1
                self._turn.notify_all()

    def _make_room(self, nbytes: int) -> None:
        self._check(nbytes)
        while self.room is not None and self.used + nbytes > self.room:
            idle = [p for p in self._there if not self._pins.get(p)]
            if idle:
                self._release(min(idle, key=lambda p: (self._there[p], p)))
            else:
                self._turn.wait()


@dataclass
class StreamedCheckpoint(Checkpoint):
    """A Hub model whose shards come and go. Its commit is pinned, so it cannot change."""

    store: ShardStore = field(default=None, repr=False)  # type: ignore[assignment]

    def _read_into(self, name: str, view: memoryview, offset: int) -> None:
        with self.store.held(self.files[name]):
            super()._read_into(name, view, offset)

    def changed(self) -> list[str]:
        """Files of the cache that are not what they were; a commit does not change."""
        return []

    def let_go(self, path: Path) -> None:
        """Close a shard that is about to go."""
        with self._opening:
            fd = self._descriptors.pop(path, None)
        if fd is not None:
            os.close(fd)
