"""What a disk may hold after the power fails: a model of a journalling file system, fed by the operations of a run.

* The content of a file survives as it was at its last fsync. What was written since may be there or not, block by
  block; so may a new length.
* The entries of a folder survive as they were at its last fsync. What was created, removed or renamed since may have
  happened or not, in any order; but a rename is one change, whichever folders it touches.
* fsync of a folder makes the renames into and out of it durable.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

BLOCK = 512
Entries = dict[int, dict[str, int]]  # folder -> name -> what is there


@dataclass(frozen=True)
class State:
    """Folders and files by their numbers; 0 is the folder that everything is in."""

    entries: Entries
    data: dict[int, bytes]

    def write(self, target: Path) -> None:
        """Make it so on a real disk, in a new folder."""
        self._folder(0, target)

    def _folder(self, number: int, path: Path) -> None:
        path.mkdir()
        for name, what in self.entries[number].items():
            if what in self.entries:
                self._folder(what, path / name)
            else:
                (path / name).write_bytes(self.data[what])


@dataclass
class Disk:
    """Watches everything in ``root``; `before` is called before each operation."""

    root: Path
    durable: Entries = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    _next: int = 0
    _folders: set[int] = field(default_factory=set)
    _last: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        now = self.now()
        self.durable = {n: dict(e) for n, e in now.entries.items()}
        self.synced = dict(now.data)

    def now(self) -> State:
        """Everything that the operating system would say is there."""
        entries: Entries = {}
        data: dict[int, bytes] = {}
        seen: dict[tuple[int, int], int] = {}
        self._look(self.root, entries, data, seen)
        self._numbers = seen  # a number is not given again, even if an inode is
        self._folders |= set(entries)
        return State(entries, data)

    def _number(self, path: Path, seen: dict[tuple[int, int], int]) -> int:
        status = path.lstat()
        key = (status.st_dev, status.st_ino)
        if key not in seen:
            if key in self._numbers:
                seen[key] = self._numbers[key]
            else:
                seen[key], self._next = self._next, self._next + 1
        return seen[key]

    def _look(self, path: Path, entries: Entries, data: dict[int, bytes], seen: dict[tuple[int, int], int]) -> None:
        own = entries.setdefault(self._number(path, seen), {})
        for child in sorted(path.iterdir()):
            own[child.name] = number = self._number(child, seen)
            if child.is_dir():
                self._look(child, entries, data, seen)
            else:
                data[number] = child.read_bytes()

    def before(self, operation: str, path: str) -> State:
        """Note what the operation before this one did; what is there now."""
        now = self.now()
        if self._last is not None and self._last[0] == "fsync" and Path(self._last[1]).exists():
            number = self._numbers[_key(Path(self._last[1]))]
            if number in now.entries:
                self._sync_folder(number, now)
            else:
                self.synced[number] = now.data[number]
        self._last = (operation, path)
        return now

    def _sync_folder(self, folder: int, now: State) -> None:
        self.durable[folder] = dict(now.entries[folder])
        here = set(now.entries[folder].values())
        for other, names in self.durable.items():
            for name, what in list(names.items()):
                present = now.entries.get(other, {}).get(name)
                if other != folder and what in here and present != what:
                    _put(names, name, present)

    def worst(self, now: State) -> State:
        """Only what was made durable."""
        return self._reachable(self.durable, {n: self.synced.get(n, b"") for n in {*self.synced, *now.data}})

    def some(self, now: State, random: Random) -> State:
        """What was made durable, and a random part of the rest."""
        entries = {n: dict(self.durable.get(n, {})) for n in {*self.durable, *now.entries}}
        changes = [
            (folder, name, self.durable.get(folder, {}).get(name), now.entries.get(folder, {}).get(name))
            for folder in entries
            for name in sorted({*self.durable.get(folder, {}), *now.entries.get(folder, {})})
        ]
        luck: dict[int, bool] = {}
        for folder, name, old, new in changes:
            if old == new:
                continue
            decisive = new if new is not None else old  # both halves of a rename name the same thing
            assert decisive is not None
            if luck.setdefault(decisive, random.random() < 0.5):
                _put(entries[folder], name, new)
        data = {n: self._torn(self.synced.get(n, b""), now.data.get(n), random) for n in {*self.synced, *now.data}}
        return self._reachable(entries, data)

    def _torn(self, old: bytes, new: bytes | None, random: Random) -> bytes:
        if new is None or new == old:
            return old
        size = random.choice([len(old), len(new)])
        mixed = bytearray(old[:size].ljust(size, b"\0"))
        for start in range(0, size, BLOCK):
            if random.random() < 0.5:
                part = new[start : start + BLOCK][: size - start]
                mixed[start : start + len(part)] = part
        return bytes(mixed)

    def _reachable(self, entries: Entries, data: dict[int, bytes]) -> State:
        """Folders that were made and never synced are there, but empty."""
        files = {what for names in entries.values() for what in names.values()} - self._folders
        return State({n: dict(entries.get(n, {})) for n in self._folders}, dict.fromkeys(files, b"") | data)


def _key(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _put(names: dict[str, int], name: str, what: int | None) -> None:
    if what is None:
        names.pop(name, None)
    else:
        names[name] = what
