"""Free memory and CPUs as made-up systems state them: no limits, control groups of both versions, containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergekit_lr.engine import machine, memory
from mergekit_lr.engine.machine import Allowance, free_memory, usable_cpus

GIB = 1 << 30
MEMINFO = "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   50331648 kB\n"  # 48 GiB


class System:
    """A ``/proc`` and a ``/sys/fs/cgroup``."""

    def __init__(self, room: Path, groups: str) -> None:
        self.proc, self.groups = room / "proc", room / "cgroup"
        self.write("proc/meminfo", MEMINFO, room)
        self.write("proc/self/cgroup", groups, room)

    def write(self, name: str, text: object, room: Path | None = None) -> None:
        path = (room or self.groups) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def free(self) -> Allowance:
        return free_memory(self.proc, self.groups)

    def cpus(self) -> Allowance:
        return usable_cpus(self.proc, self.groups)


def test_without_limits_what_the_kernel_calls_available(tmp_path: Path) -> None:
    """Not MemFree, which leaves out the pages that cache files nobody uses."""
    system = System(tmp_path, "0::/user.slice")
    system.write("user.slice/memory.max", "max")
    system.write("user.slice/memory.current", 3 * GIB)
    assert system.free() == Allowance(48 * GIB, "available on the machine")


def test_what_a_group_has_left(tmp_path: Path) -> None:
    """Its limit less its use, but for file pages that can be dropped: 16 - 10 + 4."""
    system = System(tmp_path, "0::/a/b")
    system.write("a/b/memory.max", 16 * GIB)
    system.write("a/b/memory.current", 10 * GIB)
    system.write("a/b/memory.stat", f"anon {6 * GIB}\ninactive_file {4 * GIB}\nactive_file 7")
    found = system.free()
    assert found == Allowance(10 * GIB, "left of the 16.0 GiB of its control group")


def test_the_group_above_may_have_less(tmp_path: Path) -> None:
    system = System(tmp_path, "0::/pod/container")
    for name, limit, used in (("pod/container", 16, 1), ("pod", 12, 9)):
        system.write(f"{name}/memory.max", limit * GIB)
        system.write(f"{name}/memory.current", used * GIB)
    assert system.free() == Allowance(3 * GIB, "left of the 12.0 GiB of its control group")


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """The path is the host's, and not there."""
    system = System(tmp_path, "0::/../../host/path")
    system.write("memory.max", 2 * GIB)
    system.write("memory.current", GIB)
    assert system.free().amount == GIB


def test_version_one(tmp_path: Path) -> None:
    system = System(tmp_path, "9:name=systemd:/\n4:memory:/jobs/7\n1:cpu,cpuacct:/\n0::/")
    system.write("memory/jobs/7/memory.limit_in_bytes", 8 * GIB)
    system.write("memory/jobs/7/memory.usage_in_bytes", 5 * GIB)
    system.write("memory/jobs/7/memory.stat", f"inactive_file 1\ntotal_inactive_file {2 * GIB}")
    system.write("memory/memory.limit_in_bytes", 9223372036854771712)  # how it says that there is none
    system.write("memory/memory.usage_in_bytes", 40 * GIB)
    assert system.free().amount == 5 * GIB
    system.write("memory/jobs/7/memory.usage_in_bytes", 11 * GIB)  # over its limit for a moment
    assert system.free().amount == 0


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/a", {"a/cpu.max": "max 100000"}, 64),
        ("0::/a", {"a/cpu.max": "250000 100000"}, 3),
        ("0::/a", {"a/cpu.max": "5000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "800000 100000", "a/cpu.max": "200000 100000"}, 2),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
        ("0::/a", {"a/cpu.max": "nonsense"}, 64),
        ("", {}, 64),
    ],
)
def test_cpus(groups: str, files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    system = System(tmp_path, groups)
    for name, text in files.items():
        system.write(name, text)
    assert system.cpus().amount == cpus


def test_cpus_where_the_system_has_no_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, cpus in ((7, 7), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert usable_cpus(tmp_path, tmp_path) == Allowance(cpus, "of the machine")


def test_where_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(tmp_path, tmp_path).amount > 0  # the C library knows

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert free_memory(tmp_path, tmp_path) == Allowance(8 * GIB, "a guess: the system does not say what is free")


@pytest.mark.parametrize(("free", "limit"), [(40 * GIB, 8 * GIB), (6 * GIB, 3 * GIB), (0, GIB // 4)])
def test_the_default_budget_is_half_of_it(free: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: Allowance(free, ""))
    assert memory.default_limit() == limit


def test_this_machine() -> None:
    assert machine.free_memory().amount > 1 << 20
    assert 1 <= machine.usable_cpus().amount <= (os.cpu_count() or 1)
