"""What this machine lets one process have: memory and CPUs, less what its control group (a container) allows.

A container sees the memory and the CPUs of the whole machine, and is killed or slowed down when it uses more than it
was given. Linux tells what that is in the files of the process's control group, version 2 or 1, and of those above it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNKNOWN = 8 << 30  # bytes believed to be free where nothing can be found out


@dataclass(frozen=True)
class Allowance:
    """So many bytes or CPUs, and in a few words why no more."""

    amount: int
    why: str


def free_memory(proc: Path = PROC, groups: Path = GROUPS) -> Allowance:
    """Bytes that can be taken now: what the kernel says is available, or what is left of a control group's limit.

    Pages that cache files which nobody uses at the moment count as free in both.
    """
    found = [_available(proc)]
    for group in _groups("memory", proc, groups):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        used = _number(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left = max(0, limit - used + _cached(group))
            found.append(Allowance(left, f"left of the {limit / 2**30:.1f} GiB of its control group"))
    return min(found, key=lambda a: a.amount)


def usable_cpus(proc: Path = PROC, groups: Path = GROUPS) -> Allowance:
    """CPUs that this process may use: those that it may run on, or as many as its time share is worth, rounded up."""
    if hasattr(os, "sched_getaffinity"):
        found = [Allowance(len(os.sched_getaffinity(0)), "that the process may run on")]
    else:
        found = [Allowance(os.cpu_count() or 1, "of the machine")]
    for group in _groups("cpu", proc, groups):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quota, period = int(words[0]), int(words[1])
        if quota is not None and period and quota > 0:
            share = max(1, math.ceil(quota / period))
            found.append(Allowance(share, "worth of time that its control group has"))
    return min(found, key=lambda a: a.amount)


def _available(proc: Path) -> Allowance:
    for line in _text(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return Allowance(int(value.split()[0]) << 10, "available on the machine")
    try:
        return Allowance(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "free on the machine")
    except (ValueError, OSError):
        return Allowance(UNKNOWN, "a guess: the system does not say what is free")


def _groups(controller: str, proc: Path, groups: Path) -> Iterator[Path]:
    """Folders of the control groups that bound this process: its own and all above it.

    In a container the path may be the host's and not be there; the root, which is then the container's own, always is.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            root = groups
        elif controller in controllers.split(","):
            root = groups / controller
        else:
            continue
        parts = [p for p in path.split("/") if p not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])


def _cached(group: Path) -> int:
    """Bytes of file pages that the kernel can drop at once."""
    values = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    name = "total_inactive_file" if "total_inactive_file" in values else "inactive_file"
    return int(values.get(name, "0"))


def _number(*paths: Path) -> int | None:
    """The number in the first of the files that there is; None for none, and for ``max``."""
    for path in paths:
        text = _text(path).strip()
        if text.lstrip("-").isdigit():
            return int(text)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
