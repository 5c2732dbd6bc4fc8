"""A workspace that several machines use at once, with nothing between them but a folder.

No lock decides anything here and no clocks are compared: locks lie on some network file systems, and clocks differ.
Whatever must be there once (the shards, what a method prepared, statistics of the model, a part's records, the output)
is made in a folder of its maker's own and renamed into place, which exactly one of several can do. What two machines do
twice they do to the same bytes. Claims and their beats only save work: who sees one waits, and does the work after all
when the beat stops.

``OUT.partial/`` then holds ``shared/`` (what all parts must agree on), ``prepared/``, ``statistics/``, ``model/``, a
``journal-PART-*`` of each process and ``done-PART/`` with the records of each finished part.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.engine.journal import Journal
from mergekit_lr.engine.lock import is_alive, this_process
from mergekit_lr.engine.target import check_place
from mergekit_lr.engine.workspace import SHARED, Workspace
from mergekit_lr.errors import ResourceError, UsageError

POLL = 0.5  # seconds between looks at what another part is making
BEAT = 5.0  # seconds between signs of life of one that makes something
PATIENCE = 60.0  # seconds without a sign after which another one makes it too


class Finished(Exception):
    """The output is complete already, and it is these parts' own."""


def pause() -> None:
    """Wait a little before looking again."""
    time.sleep(POLL)


@dataclass
class SharedSpace(Workspace):
    """`Workspace` for part ``number`` of ``count``. ``token`` is this process's own, in the names of what it makes."""

    number: int = 1
    count: int = 1
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _watched: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def join(self) -> None:
        """Open the workspace, or create it; all parts must have been asked for the same.

        Raises:
            Finished: there is nothing left to do.
            UsageError: the work there is another run's; it says what differs.
        """
        check_place(self.out)
        fs.make_folder(self.root)
        self._refuse_single_run()
        place = self.root / SHARED
        if not place.exists():
            own = self._own(SHARED)
            fs.make_folder(own)
            fs.write_file(own / "identity.json", json.dumps(self.fingerprint, sort_keys=True, indent=1).encode())
            if not fs.move(own, place):
                fs.remove_tree(own)
        self._refuse_single_run()
        self._compare(json.loads((place / "identity.json").read_bytes()))
        if self.finished():  # while we made the folder anew
            raise Finished

    def _refuse_single_run(self) -> None:
        if any((self.root / name).exists() for name in ("lock", "plan.json", "prepared.json", "journal")):
            raise UsageError(
                "the unfinished work there is not in parts",
                where=str(self.root),
                why="a run of the whole merge began it",
                fix="finish it without --part, or remove that folder",
            )

    def _compare(self, before: dict[str, Any]) -> None:
        if before == self.fingerprint:
            return
        now = self.fingerprint
        changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        short = [f"{k} was {before.get(k)} and is {now.get(k)}" for k in changed if _short(before.get(k), now.get(k))]
        long = [k for k in changed if not _short(before.get(k), now.get(k))]
        raise UsageError(
            "the unfinished parts there are of another run",
            where=str(self.root),
            why="; ".join([*short, *([f"changed since: {', '.join(long)}"] if long else [])]),
            fix="run every part alike, or remove that folder to start anew",
        )

    def _own(self, name: str) -> Path:
        return self.root / f"{name}-{self.token}"

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder ``name`` of the workspace, made by whoever comes first.

        ``make(folder)`` gives ``folder`` its content; it may find there what an interrupted process of this machine
        left. Others wait while it works and shows that it is alive.
        """
        place = self.root / name
        while not place.exists():
            folder = self._turn(name)
            if folder is None:
                if self.finished():
                    raise Finished
                pause()
                continue
            with self._beating(name):
                fs.make_folder(folder)
                make(folder)
            if not fs.move(folder, place):
                fs.remove_tree(folder)
        return place

    def _turn(self, name: str) -> Path | None:
        """A folder to make ``name`` in, or None where somebody else seems to be at it."""
        claim, own = self.root / f"claim-{name}", self._own(name)
        if fs.create_exclusive(claim, self._claim(0)):
            return own
        text = claim.read_bytes() if claim.exists() else b""
        holder = _holder(text)
        if holder is not None and (holder.items() >= this_process().items() or not is_alive(holder)):
            left = self.root / f"{name}-{holder['token']}"
            if left.exists() and not fs.move(left, own):
                return None  # another one took it over in this moment
        elif not self._given_up(name, text):
            return None
        fs.write_file(claim, self._claim(0))
        return own

    def _claim(self, beat: int) -> bytes:
        return json.dumps({**this_process(), "token": self.token, "beat": beat}).encode()

    def _given_up(self, name: str, text: bytes) -> bool:
        """Whether a claim has not changed for as long as one may be silent, by this machine's own clock."""
        now = time.monotonic()
        seen, since = self._watched.get(name, (None, now))
        if text != seen:
            self._watched[name] = (text, now)
            return False
        return now - since >= PATIENCE

    @contextmanager
    def _beating(self, name: str) -> Iterator[None]:
        """Show that we are alive while we make something."""
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(BEAT):
                count += 1
                with suppress(ResourceError):
                    fs.write_file(self.root / f"claim-{name}", self._claim(count))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def lay_down(self, folder: Path, layout: Layout) -> None:
        """Reserve the shards in ``folder`` and write their headers."""
        place = Workspace(self.out)
        place.model = folder
        place.prepare(layout)

    def journal(self) -> Journal:
        """This process's own file, after those of earlier processes of the part."""
        earlier = sorted(self.root.glob(f"journal-{self.number}-*"))
        return Journal(self.root / f"journal-{self.number}-{self.token}", earlier)

    def is_done(self, part: int) -> bool:
        return (self.root / f"done-{part}").is_dir()

    def missing(self) -> tuple[int, ...]:
        """Parts that are not done."""
        return tuple(i for i in range(1, self.count + 1) if not self.is_done(i))

    def mark_done(self, records: Sequence[dict[str, Any]], warnings: Sequence[str]) -> None:
        """Say that this part's bytes are durable, with its records."""
        own = self._own(f"done-{self.number}")
        fs.make_folder(own)
        content = {"records": list(records), "warnings": list(warnings)}
        fs.write_file(own / "records.json", json.dumps(content, separators=(",", ":")).encode())
        if not fs.move(own, self.root / f"done-{self.number}"):
            fs.remove_tree(own)

    def records(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """What all parts noted, by unit, and their warnings."""
        done: dict[str, dict[str, Any]] = {}
        warnings: dict[str, None] = {}
        for part in range(1, self.count + 1):
            content = json.loads((self.root / f"done-{part}" / "records.json").read_bytes())
            done |= {r["unit"]: r for r in content["records"]}
            warnings.update(dict.fromkeys(content["warnings"]))
        return done, list(warnings)

    def _aside(self) -> list[Path]:
        return sorted(self.out.parent.glob(f"{self.root.name}-replaced-*"))

    def finished(self) -> bool:
        """Whether the output is these parts' own."""
        if _made_by(self.out, self.digest):
            return True
        # One that moved an old output aside, found the new one in its hands and was killed before it put it back.
        return any(_made_by(path, self.digest) and fs.move(path, self.out) for path in self._aside())

    def commit_parts(self, files: dict[str, bytes], *, overwrite: bool) -> None:
        """Put the small files in and rename the whole into place; of several that try, one does.

        Raises:
            ResourceError: the output did not appear although nothing is left to rename.
        """
        own = self._own("files")
        fs.make_folder(own)
        for name, data in files.items():
            for folder in reversed(Path(name).parents[:-1]):
                fs.make_folder(own / folder)
                fs.make_folder(self.model / folder)
            fs.write_file(own / name, data)
            fs.rename(own / name, self.model / name)
        fs.fsync(self.model)
        if overwrite and (self.out.exists() or self.out.is_symlink()) and not self.finished():
            self._move_aside()
        if not self.finished() and not fs.move(self.model, self.out):
            self.await_output()

    def _move_aside(self) -> None:
        aside = self.out.with_name(f"{self.root.name}-replaced-{self.token}")
        try:
            fs.rename(self.out, aside)
        except ResourceError:
            if self.out.exists():
                raise
            return  # another one did
        if _made_by(aside, self.digest):  # the new one appeared between the look and the rename
            fs.move(aside, self.out)

    def await_output(self) -> None:
        """Another part has renamed the model; a network file system may take a while to show it."""
        until = time.monotonic() + PATIENCE
        while not self.finished():
            if time.monotonic() > until:
                raise ResourceError(
                    "the finished model is not where it was, and not at the output either",
                    where=str(self.root),
                    why="something else renamed or removed it, or another output appeared there",
                    fix="look for it, or remove that folder and run all parts again",
                )
            pause()

    def tidy(self) -> None:
        """Remove what is left of the work. Others may do the same, or still be writing into it for a moment."""
        for path in (self.root, *self._aside()):
            for _ in range(3):
                try:
                    fs.remove_tree(path)
                    break
                except ResourceError:
                    pause()


def _short(*values: Any) -> bool:
    return all(isinstance(v, str | int) and len(str(v)) <= 40 for v in values)


def _made_by(folder: Path, digest: str) -> bool:
    """Whether a folder is a finished output of the run with this fingerprint."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((folder / "merge_report.json").read_bytes()).get("fingerprint") == digest)
    return False


def _holder(claim: bytes) -> dict[str, Any] | None:
    """Who wrote a claim; None while it is being written."""
    try:
        found = json.loads(claim)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"pid", "token"} <= found.keys() else None
