"""Takes protections out, one at a time, and runs the tests that guard them: each must then fail.

``python tests/attacks/removal.py [ROW...]`` copies the package, changes one place of the copy, runs that row's tests
against it and prints a table. A row whose tests still pass is a row that nothing guards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from removals_of_inputs import INPUTS, Removal
from removals_of_runs import RUNS

ROOT = Path(__file__).parents[2]

REMOVALS = sorted([*INPUTS, *RUNS], key=lambda r: r.row)


def copy_without(removal: Removal | None, target: Path) -> None:
    """A copy of the package at ``target`` in which one protection is missing, or none."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mergekit_lr", target / "mergekit_lr", ignore=ignored)
    if removal is None:
        return
    path = target / removal.file
    text = path.read_text(encoding="utf-8")
    assert text.count(removal.old) == 1, (
        f"row {removal.row}: {removal.file} has {text.count(removal.old)} of {removal.old!r}"
    )
    path.write_text(text.replace(removal.old, removal.new), encoding="utf-8")


def fails_without(removal: Removal | None, test: str = "") -> bool:
    """Whether the row's tests fail once its protection is gone; without a removal, whether ``test`` fails anyway."""
    with tempfile.TemporaryDirectory(prefix="without-") as room:
        copy_without(removal, Path(room))
        file, *options = (removal.test if removal else test).split()
        environment = {
            **os.environ,
            "PYTHONPATH": room,
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        program = (
            "import mergekit_lr, pathlib, sys, pytest, resource;"
            f"assert pathlib.Path(mergekit_lr.__file__).is_relative_to({room!r}), mergekit_lr.__file__;"
            "resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2);"
            "sys.exit(pytest.main(sys.argv[1:]))"
        )
        command = [
            sys.executable,
            "-c",
            program,
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"--rootdir={ROOT}",
            f"-c{ROOT / 'pyproject.toml'}",
            str(ROOT / file),
            *options,
        ]
        # Ray's workers look for modules in the working folder first.
        done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        assert (done.returncode, " failed" in done.stdout) in ((0, False), (1, True)), said
        return done.returncode == 1


def main(rows: list[int]) -> int:
    unguarded = 0
    chosen = [r for r in REMOVALS if not rows or r.row in rows]
    for test in dict.fromkeys(r.test for r in chosen):
        assert not fails_without(None, test), f"{test} fails in a whole copy too"
    print(f"{'row':<4} {'protection taken out':<50} {'its test':<48} outcome")
    for removal in chosen:
        failed = fails_without(removal)
        unguarded += not failed
        outcome = "fails" if failed else "STILL PASSES"
        print(f"{removal.row:<4} {removal.protection:<50} {removal.test.partition('-k ')[2]:<48} {outcome}", flush=True)
    return unguarded > 0


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]]))
