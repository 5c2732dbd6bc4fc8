"""Stops a run at every single file operation, runs it again, and compares with an undisturbed run.

The runs are forks of a process that has imported torch but started none of its threads: a kill costs milliseconds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

DRIVER = """
import hashlib, json, os, sys
import torch
from pathlib import Path
from mergekit_lr.checkpoint import fs

work, overwrite = Path(sys.argv[1]), sys.argv[2] == "overwrite"
torch.set_num_threads(1)
{action}

def in_child(stop_at, out):
    pid = os.fork()
    if pid == 0:
        count = 0
        def hook(operation, path):
            nonlocal count
            count += 1
            if count == stop_at:
                os._exit(9)
        fs.set_hook(hook)
        try:
            act(out)
        except BaseException as e:
            print(type(e).__name__, e, file=sys.stderr)
            os._exit(1)
        (work / "count").write_text(str(count))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def digest(out):
    if out.is_file():
        return hashlib.sha256(out.read_bytes()).hexdigest()
    h, tensors = hashlib.sha256(), ""
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if path.name == "merge_report.json":
            tensors = json.dumps(json.loads(path.read_text())["tensors"])
        else:
            h.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return h.hexdigest() + tensors

def old(out):
    out.mkdir()
    (out / "config.json").write_text("old")

reference = work / "reference"
if overwrite:
    old(reference)
assert in_child(0, reference) == 0
operations = int((work / "count").read_text())
wanted = digest(reference)
for k in range(1, operations + 1):
    out = work / f"out{k}"
    if overwrite:
        old(out)
    assert in_child(k, out) == 9, k
    # Either nothing (or the old model) is there, or the complete new one.
    if out.exists() and not (overwrite and (out / "config.json").read_text() == "old"):
        assert digest(out) == wanted, k
    assert in_child(0, out) == 0, k
    assert digest(out) == wanted, k
    assert not out.with_name(out.name + ".partial").exists(), k
print(operations)
"""


def killed_everywhere(action: str, work: Path, *, overwrite: bool = False, timeout: int = 300) -> int:
    """How many operations there were, each of which was survived.

    ``action`` is Python source that defines ``act(out)``, which writes the folder (or file) ``out``.
    """
    work.mkdir()
    command = [sys.executable, "-c", DRIVER.replace("{action}", action), str(work), "overwrite" if overwrite else ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
