"""Several processes that want to write the same output: one wins, whatever becomes of the lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lr import merge, verify
from mergekit_lr.checkpoint import fs
from mergekit_lr.engine import lock as locks
from mergekit_lr.engine.lock import FolderLock, began, this_process
from mergekit_lr.errors import UsageError

from .jobs import ties

RUNNER = Path(__file__).with_name("racing.py")


def race(work: Path, times: int, **options: Any) -> dict[str, int]:
    """So many races of two to four processes; how often what happened."""
    command = [sys.executable, str(RUNNER), str(work), str(times), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("broken", [False, True], ids=["locked", "unlocked"])
@pytest.mark.parametrize("different", [False, True], ids=["alike", "different"])
def test_one_process_wins(tmp_path: Path, broken: bool, different: bool) -> None:
    found = race(tmp_path, 3, broken=broken, different=different)
    assert found["races"] == found["winners"] == 3
    assert found["refused"] + found["content"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["locked", "unlocked"])
@pytest.mark.parametrize("different", [False, True], ids=["alike", "different"])
def test_one_process_wins_a_hundred_times(tmp_path: Path, broken: bool, different: bool) -> None:
    found = race(tmp_path, 100, broken=broken, different=different)
    assert found["races"] == found["winners"] == 100


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "inputs"
    folder.mkdir()
    return ties(folder)


def while_merging(recipe: dict[str, Any], out: Path, at: str, then: Callable[[], None], **options: Any) -> None:
    """Merge, and before the first operation of that name do something else."""
    done: list[int] = []

    def hook(operation: str, path: str) -> None:
        if operation == at and not done:
            done.append(1)
            fs.set_hook(None)
            then()

    fs.set_hook(hook)
    try:
        merge(recipe, out, device="cpu", threads=1, **options)
    finally:
        fs.set_hook(None)
    assert done


def test_an_output_that_appears_meanwhile_is_not_replaced(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        out.mkdir()
        (out / "precious").write_bytes(b"x")

    with pytest.raises(UsageError, match="the output exists already"):
        while_merging(recipe, out, "append", appear)
    assert [p.name for p in out.iterdir()] == ["precious"]
    (out / "precious").rename(tmp_path / "precious")
    out.rmdir()
    merge(recipe, out, device="cpu")  # nothing that was done is lost
    assert not verify(out).problems and not (tmp_path / "out.partial").exists()


def test_a_second_run_of_the_same_process_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = []

    def second() -> None:
        for resume in (True, False):
            with pytest.raises(UsageError, match=f"another run is writing.*process {os.getpid()}"):
                merge(recipe, out, device="cpu", resume=resume)
            refused.append(resume)

    while_merging(recipe, out, "append", second)
    assert refused == [True, False]
    assert not verify(out).problems


def test_a_lock_without_a_word_is_waited_for_and_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    (tmp_path / "out.partial").mkdir()
    path = tmp_path / "out.partial" / "lock"
    held = fs.try_lock(path)
    assert held is not None
    with pytest.raises(UsageError, match="its lock is held"):
        FolderLock(path).take()
    os.close(held)
    lock = FolderLock(path)
    lock.take()
    assert json.loads(path.read_bytes())["pid"] == os.getpid()
    lock.release()
    assert not path.exists()


@pytest.mark.parametrize(
    ("word", "alive"),
    [
        ({}, True),
        ({"host": "elsewhere"}, True),  # it cannot be asked
        ({"boot": "another"}, False),
        ({"began": "1"}, False),  # the number was given to another process
        ({"pid": 0x7FFFFFFF}, False),
        ({"pid": "nonsense"}, False),
        ({"pid": None}, False),
    ],
)
def test_whose_word_counts(word: dict[str, Any], alive: bool) -> None:
    assert locks.is_alive({**this_process(), "pid": os.getppid(), "began": began(os.getppid()), **word}) == alive


def test_where_there_are_no_locks_the_word_still_counts(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    work = tmp_path / "out.partial"
    work.mkdir()
    word = {**this_process(), "pid": os.getppid(), "began": began(os.getppid())}
    (work / "lock").write_text(json.dumps(word))
    with pytest.raises(UsageError, match="another run is writing"):
        merge(recipe, tmp_path / "out", device="cpu")
    (work / "lock").write_text(json.dumps({**word, "began": "0"}))
    merge(recipe, tmp_path / "out", device="cpu")
    assert not work.exists()
