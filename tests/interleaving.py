"""Runs the parts of a merge in any order that a schedule says, one file operation at a time, killing some.

One process imports torch once and forks a process for every run of a part. A run stops before each of its file
operations (and where it waits for another part) until it is told to go on, so that a schedule decides everything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

DRIVER = """
import hashlib, json, os, shutil, signal, sys, traceback
import torch
from pathlib import Path
from mergekit_lr.checkpoint import fs
from mergekit_lr.engine import shared_space

work, parts = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
shared_space.BEAT = 1e6
{action}

class Run:
    def __init__(self, part, out):
        ours, theirs = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            def stop(*_):
                os.write(ours[1], b".")
                if not os.read(theirs[0], 1):
                    os._exit(3)
            os.close(ours[0]); os.close(theirs[1])
            fs.set_hook(stop)
            shared_space.pause = stop
            try:
                act(out, f"{part}/{parts}")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(ours[1]); os.close(theirs[0])
        self.said, self.go = ours[0], theirs[1]
        self.waits = bool(os.read(self.said, 1))

    def step(self):
        os.write(self.go, b".")
        self.waits = bool(os.read(self.said, 1))

    def end(self):
        os.close(self.said); os.close(self.go)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.end()

def digest(out):
    h, tensors = hashlib.sha256(), ""
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if path.name == "merge_report.json":
            tensors = json.dumps(json.loads(path.read_text())["tensors"])
        else:
            h.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return h.hexdigest() + tensors

def play(schedule, old):
    out = work / "out"
    if old:
        out.mkdir()
        (out / "config.json").write_text("old")
    running, done, facts = {}, set(), {"kills": 0, "steps": 0, "runs": 0}
    def turn(part, most):
        if part not in running:
            running[part] = Run(part, out)
            facts["runs"] += 1
        run = running[part]
        while run.waits and most:
            run.step()
            most -= 1
            facts["steps"] += 1
        if not run.waits:
            code = running.pop(part).end()
            assert code == 0, f"part {part} ended with {code}"
            done.add(part)
        if out.exists() and not (old and (out / "config.json").read_text() == "old"):
            assert digest(out) == wanted
    for part, most in schedule:
        if most:
            turn(part, most)
        elif part in running:
            running.pop(part).kill()
            facts["kills"] += 1
    limit = facts["steps"] + 20000
    while len(done) < parts or running:
        for part in sorted({*range(1, parts + 1)} - done | set(running)):
            turn(part, 5)
        assert facts["steps"] < limit, "the parts wait for each other"
    assert digest(out) == wanted
    turn(1, -1)  # once more, although all is done
    assert sorted(p.name for p in work.iterdir()) == ["out", "reference"], sorted(p.name for p in work.iterdir())
    return facts

reference = work / "reference"
whole(reference)
wanted = digest(reference)
print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    try:
        facts = play(task["schedule"], task["old"])
        print(json.dumps(facts), flush=True)
    except BaseException as e:
        print(json.dumps({"error": f"{type(e).__name__}: {e}"}), flush=True)
    for path in work.iterdir():
        if path != reference:
            shutil.rmtree(path)
"""

Schedule = list[tuple[int, int]]
"""Turns: a part, and how many file operations it may do; 0 kills it. Parts that are not running are started."""


class Interleaver:
    """``action`` is Python source that defines ``whole(out)`` and ``act(out, part)``; ``parts`` of them are run."""

    def __init__(self, action: str, work: Path, parts: int = 4) -> None:
        work.mkdir()
        command = [sys.executable, "-c", DRIVER.replace("{action}", action), str(work), str(parts)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise AssertionError(self.process.communicate()[1])

    def play(self, schedule: Schedule, *, old: bool = False) -> dict[str, Any]:
        """Play a schedule, then let all parts end, and compare with the whole run; how much happened.

        ``old``: there is an output already, to be replaced.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"schedule": schedule, "old": old}) + "\n")
        self.process.stdin.flush()
        facts: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "error" not in facts, (facts["error"], self.close())
        return facts

    def close(self) -> str:
        """End the process; what it said on standard error."""
        if self.process.poll() is None:
            return self.process.communicate()[1]
        return ""
