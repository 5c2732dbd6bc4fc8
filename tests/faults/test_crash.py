"""Stopped anywhere, in any way: the same command ends with the same bytes, and no half output can be loaded.

The normal suite has samples; ``-m slow -rP`` runs and prints the full counts.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from .disk import Disk
from .jobs import JOBS
from .stopping import run

LONG = 3600
IMPORTANT = 200  # random kills of the merge itself
OTHERS = 50
LONG_JOBS = ("grid", "learned", "moe", "calibrate")


@pytest.mark.parametrize("job", ["adapter", "curvature"])
def test_killed_at_every_operation(job: str, tmp_path: Path) -> None:
    found = run(job, tmp_path, kill=None)
    assert found["killed"] == found["operations"] > 5


def test_killed_at_random_with_workers(tmp_path: Path) -> None:
    found = run("workers", tmp_path, sigkill=8, seed=1)
    assert found.get("killed", 0) + found.get("ended before", 0) == 8


def test_the_power_fails_at_some_operations(tmp_path: Path) -> None:
    found = run("dense", tmp_path, power=14, states=3)
    assert found["power failures"] == 3 * 14


def test_the_power_fails_while_the_last_is_tidied_up(tmp_path: Path) -> None:
    """Any of the last removals may be lost; what is left must still be known as a run's."""
    found = run("overwrite", tmp_path, power=3, states=12, seed=3)
    assert found["power failures"] == 3 * 12


def test_some_operations_fail(tmp_path: Path) -> None:
    """Each operation, with one of the errors in turn, once or from there on."""
    found = run("dense", tmp_path, fault=None)
    assert found["errors"] + found.get("went on", 0) == found["operations"]
    assert found["errors"] >= found["operations"] - 2


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(JOBS))
def test_killed_at_every_operation_of_every_job(job: str, tmp_path: Path) -> None:
    if job == "workers":
        pytest.skip("which operations there are depends on who is quicker; killed at random instead")
    found = run(job, tmp_path, LONG, kill=None)
    assert found["killed"] == found["operations"]


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(JOBS))
def test_killed_at_random_times(job: str, tmp_path: Path) -> None:
    times = IMPORTANT if job in ("dense", "workers") else OTHERS
    found = run(job, tmp_path, LONG, sigkill=times, seed=7)
    assert found["killed"] + found.get("ended before", 0) == times


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(set(JOBS) - {"workers"}))
def test_the_power_fails_at_every_operation(job: str, tmp_path: Path) -> None:
    """Before every operation; before sixty of the jobs that run a model, where going on takes seconds each time."""
    found = run(job, tmp_path, LONG, power=60 if job in LONG_JOBS else None, states=4, seed=3)
    assert found["power failures"] == 4 * min(found["operations"], 60 if job in LONG_JOBS else found["operations"])


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(set(JOBS) - {"workers"}))
def test_every_operation_fails_in_every_way(job: str, tmp_path: Path) -> None:
    """ENOSPC, EIO, EDQUOT and EACCES, once and from there on; twelve operations of the long jobs."""
    found = run(job, tmp_path, LONG, fault=12 if job in LONG_JOBS else None, each=True)
    assert found["errors"] > 0


def test_the_model_of_a_disk_forgets_what_was_not_synced(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_bytes(b"old")
    disk = Disk(root)
    disk.before("write", str(root / "new"))
    (root / "new").write_bytes(b"new")
    (root / "old").unlink()
    now = disk.before("fsync", str(root / "new"))
    disk.worst(now).write(tmp_path / "first")
    assert {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir()} == {"old": b"old"}
    now = disk.before("fsync", str(root))  # the file was synced, its name was not
    disk.worst(now).write(tmp_path / "second")
    assert {p.name for p in (tmp_path / "second").iterdir()} == {"old"}
    now = disk.before("rename", str(root / "renamed"))
    disk.worst(now).write(tmp_path / "third")
    assert {p.name: p.read_bytes() for p in (tmp_path / "third").iterdir()} == {"new": b"new"}
    (root / "new").rename(root / "renamed")
    (root / "renamed").write_bytes(b"x" * 2000)
    now = disk.before("end", "")
    seen = set()
    for i in range(40):
        disk.some(now, Random(i)).write(tmp_path / str(i))
        [(name, data)] = [(p.name, p.read_bytes()) for p in (tmp_path / str(i)).iterdir()]
        seen.add((name, len(data), data.count(b"x"[0])))
    assert {name for name, _, _ in seen} == {"new", "renamed"}  # done or undone, never both or neither
    assert {size for _, size, _ in seen} == {3, 2000}
    assert len({count for _, size, count in seen if size == 2000}) > 2  # torn by blocks


def test_a_rename_between_folders_is_one_change(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "work").mkdir(parents=True)
    (root / "work" / "x").write_bytes(b"x")
    disk = Disk(root)
    disk.before("rename", str(root / "x"))
    (root / "work" / "x").rename(root / "x")
    disk.before("fsync", str(root))
    now = disk.before("end", "")
    disk.worst(now).write(tmp_path / "after")
    assert sorted(p.name for p in (tmp_path / "after").rglob("*")) == ["work", "x"]
