"""Stops one job in one way, as often as asked; prints one line of JSON. Run by `stopping.run`.

The runs are forks of a process that has imported everything and started no threads: one costs some tens of
milliseconds. Nothing here needs a real fsync, for it is processes that are stopped; what a power failure would leave is
worked out by `disk`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from disk import Disk
from jobs import JOBS, Act, output_of

from mergekit_lr.checkpoint import fs
from mergekit_lr.errors import MergekitLrError

os.fsync = lambda fd: None  # type: ignore[assignment]
ROOM = {"create", "mkdir", "preallocate", "pwrite", "append", "write", "link", "lock", "truncate", "fsync", "rename"}
KILLED = 9


class Child:
    """A fork that does the job, and what it says of itself."""

    def __init__(self, act: Act, out: Path, hook: Callable[[int, str, str], None] | None = None) -> None:
        ours, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours)
            self._run(act, out, hook, theirs)
        os.close(theirs)
        self._pipe = ours

    def _run(self, act: Act, out: Path, hook: Callable[[int, str, str], None] | None, pipe: int) -> None:
        operations: list[str] = []
        own = os.getpid()

        def numbered(operation: str, path: str) -> None:
            operations.append(operation)
            if hook is not None and os.getpid() == own:
                hook(len(operations), operation, path)

        fs.set_hook(numbered)
        said: dict[str, Any] = {}
        code = 0
        try:
            act(out)
        except MergekitLrError as e:
            code = e.exit_code
            said = {"kind": type(e).__name__, "what": e.what, "where": e.where, "why": e.why, "fix": e.fix}
        except BaseException:
            code, said = 1, {"trace": traceback.format_exc()}
        os.write(pipe, json.dumps(said | {"operations": operations}).encode())
        os._exit(code)

    def wait(self) -> tuple[int, dict[str, Any]]:
        """Exit code (negative: signal), and what it said."""
        with os.fdopen(self._pipe, "rb") as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, json.loads(said) if said else {}


def digest(out: Path) -> str:
    """Of everything but the times in the report."""
    if out.is_file():
        return hashlib.sha256(out.read_bytes()).hexdigest()
    h, tensors = hashlib.sha256(), ""
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if path.name == "merge_report.json":
            tensors = json.dumps(json.loads(path.read_text()).get("tensors"))
        else:
            h.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return h.hexdigest() + tensors


class Stopping:
    """The job, its undisturbed run, and the ways to disturb it."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work = name, work
        inputs = work / "inputs"
        inputs.mkdir()
        torch.set_num_threads(1)
        self.act = JOBS[name](inputs)
        self.counts: dict[str, int] = {}
        reference = self.place("reference")
        began = time.monotonic()
        code, said = Child(self.act, reference).wait()
        self.seconds = time.monotonic() - began
        assert code == 0, said
        self.operations: list[str] = said["operations"]
        self.wanted = digest(reference)
        assert self.alone(reference), sorted(reference.parent.iterdir())

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def place(self, label: str) -> Path:
        """Where a run writes, in a folder of its own; the old model is there for a run that overwrites."""
        folder = self.work / label
        folder.mkdir()
        out = output_of(self.name, folder)
        if self.name == "overwrite":
            out.mkdir()
            (out / "config.json").write_text("old")
        return out

    def alone(self, out: Path) -> bool:
        return [p.name for p in out.parent.iterdir()] == [out.name]

    def never_half(self, out: Path, label: object) -> None:
        """Nothing is there, or what was there before, or all of the new."""
        if not out.exists():
            self.count("absent")
        elif self.name == "overwrite" and out.is_dir() and (out / "config.json").read_text() == "old":
            self.count("old")
        else:
            assert digest(out) == self.wanted, label
            self.count("complete")

    def resumes(self, out: Path, label: object, *, forgotten: bool = False) -> dict[str, Any]:
        """The same job again ends as if nothing had happened.

        ``forgotten``: the output may be complete and nothing there to say that the run was not: it is refused then.
        """
        code, said = Child(self.act, out).wait()
        if code == 2 and "exists" in said["what"] and (forgotten or self.name in ("curvature", "fisher")):
            code = 0
        assert code == 0, (label, said)
        assert digest(out) == self.wanted, label
        assert self.alone(out), (label, [p.name for p in out.parent.iterdir()])
        return said

    def kill(self, ks: list[int]) -> None:
        """os._exit in the place of operation k."""
        for k in ks:
            out = self.place(f"k{k}")

            def stop(number: int, operation: str, path: str, k: int = k) -> None:
                if number == k:
                    os._exit(KILLED)

            code, said = Child(self.act, out, stop).wait()
            assert code == KILLED, (k, code, said)
            self.never_half(out, k)
            self.resumes(out, k)
            self.count("killed")
            shutil.rmtree(out.parent)

    def sigkill(self, times: int, seed: int) -> None:
        """SIGKILL after a random time."""
        random = Random(seed)
        for i in range(times):
            out = self.place(f"s{i}")
            child = Child(self.act, out)
            time.sleep(random.uniform(0, 1.02 * self.seconds))
            os.kill(child.pid, signal.SIGKILL)
            code, said = child.wait()
            assert code in (0, -signal.SIGKILL), (i, said)
            self.count("killed" if code else "ended before")
            self.never_half(out, i)
            if code:
                # Killed after the last operation, on the way out: nothing is left that could say it was killed.
                self.resumes(out, i, forgotten=out.exists() and self.alone(out))
            shutil.rmtree(out.parent)

    def power(self, ks: list[int], states: int, seed: int) -> None:
        """The power fails before operation k: the worst that the disk may hold, and some random other states."""
        out = self.place("watched")
        disk = Disk(out.parent)
        random = Random(seed)
        chosen = set(ks)

        def look(number: int, operation: str, path: str) -> None:
            now = disk.before(operation, path)
            if number in chosen:
                for j, state in enumerate([disk.worst(now), *(disk.some(now, random) for _ in range(states - 1))]):
                    state.write(self.work / f"p{number}-{j}")

        code, said = Child(self.act, out, look).wait()
        assert code == 0, said
        for k in ks:
            for j in range(states):
                survived = output_of(self.name, self.work / f"p{k}-{j}")
                self.never_half(survived, (k, j))
                self.resumes(survived, (k, j), forgotten=True)
                self.count("power failures")
                shutil.rmtree(survived.parent)

    def fault(self, cases: list[tuple[int, str, bool]]) -> None:
        """Operation k fails with an errno; ``lasting``: and so does everything later that takes room."""
        for k, name, lasting in cases:
            out = self.place(f"f{k}{name}{int(lasting)}")
            number = getattr(errno, name)

            def fail(at: int, operation: str, path: str, k: int = k, e: int = number, on: bool = lasting) -> None:
                if at == k or (on and at > k and operation in ROOM):
                    raise OSError(e, os.strerror(e))

            code, said = Child(self.act, out, fail).wait()
            label = (k, self.operations[k - 1], name, lasting, said)
            if code != 0:
                assert code == 5 and said["kind"] == "ResourceError", label
                assert all(said[part] for part in ("what", "where", "why", "fix")), label
            self.count("errors" if code else "went on")
            self.never_half(out, label)
            again = self.resumes(out, label) if code else {"operations": []}
            if not code:
                assert digest(out) == self.wanted, label
            if self.name == "dense" and code and "append" in again["operations"]:
                self.keeps_the_journal(said["operations"], again["operations"], label)
            shutil.rmtree(out.parent)

    def keeps_the_journal(self, before: list[str], again: list[str], label: object) -> None:
        """Finished units are not done again, but for those in a shard that could not be made durable."""
        if "fsync" in before[before.index("append") if "append" in before else 0 :]:
            return
        done = before[:-1].count("append") - (before[-1] == "append")
        assert again.count("append") <= self.operations.count("append") - max(0, done - 1), label


def every(count: int, most: int | None, seed: int = 0) -> list[int]:
    """Operations to stop at: all, or so many of them, spread evenly, first and last among them."""
    if most is None or most >= count:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})


def main(name: str, work: Path, options: dict[str, Any]) -> None:
    stopping = Stopping(name, work)
    count = len(stopping.operations)
    began = time.monotonic()
    if "kill" in options:
        stopping.kill(every(count, options["kill"]))
    if "sigkill" in options:
        stopping.sigkill(options["sigkill"], options.get("seed", 0))
    if "power" in options:
        stopping.power(every(count, options["power"]), options["states"], options.get("seed", 0))
    if "fault" in options:
        names = ("ENOSPC", "EIO", "EDQUOT", "EACCES")
        at = every(count, options["fault"])
        if options.get("each"):
            cases = [(k, e, on) for k in at for e in names for on in (False, True)]
        else:
            cases = [(k, names[i % 4], bool(i // 4 % 2)) for i, k in enumerate(at)]
        stopping.fault(cases)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"job": name, "operations": count, "seconds": seconds, **stopping.counts}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
