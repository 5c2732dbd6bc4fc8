"""Running a command and seeing what it takes: wall and CPU seconds, and resident memory by kind."""

from __future__ import annotations

import json
import mmap
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.1
READ_PIECE = 1 << 20


@dataclass
class Sample:
    """One run. ``seconds`` is what counts for the contestant; ``wall`` the whole process; memory in bytes."""

    seconds: float
    wall: float
    cpu: float
    anonymous: int
    file_backed: int
    start_up: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Rounded for the result file."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += _family(int(child))
    return found


class MemoryWatch(threading.Thread):
    """Samples the resident memory of a process and its children until it ends; keeps the peaks.

    Proportional set sizes are added up, so that what forked children share with their parent counts once. The
    processes are read one after the other: where one ends in between, a sum is too large. A peak is therefore what two
    looks in a row agree on.
    """

    def __init__(self, pid: int, interval: float = SAMPLE_SECONDS) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.interval = interval
        self.anonymous = 0
        self.file_backed = 0

    def run(self) -> None:
        """Sample until the process is gone."""
        last = 0
        while True:
            kilobytes = {"Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
            seen = False
            try:
                for pid in _family(self.pid):
                    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                        name, amount = line.split(":")
                        if name in kilobytes:
                            kilobytes[name] += int(amount.split()[0])
                            seen = True
            except (FileNotFoundError, ProcessLookupError):  # one of them has just ended
                seen = seen or Path(f"/proc/{self.pid}/smaps_rollup").exists()
            if not seen:  # gone, or a zombie, which has no memory any more
                return
            now = kilobytes["Pss_Anon"] * 1024
            self.anonymous, last = max(self.anonymous, min(now, last)), now
            self.file_backed = max(self.file_backed, (kilobytes["Pss_File"] + kilobytes["Pss_Shmem"]) * 1024)
            time.sleep(self.interval)


def run(command: list[str], folder: Path, environment: Mapping[str, str], interval: float = SAMPLE_SECONDS) -> Sample:
    """Run ``command`` in ``folder``; a JSON line it prints with ``seconds`` replaces the wall time.

    Memory is looked at every ``interval`` seconds.

    Raises:
        RuntimeError: the command failed; its messages are in the error.
    """
    log = folder / "command.log"
    with log.open("wb") as stdout, (folder / "command.err").open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=dict(environment), stdout=stdout, stderr=stderr)
        watch = MemoryWatch(process.pid, interval)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.join()
    if process.returncode:
        raise RuntimeError(f"{command}: exit {process.returncode}\n{(folder / 'command.err').read_text()[-3000:]}")
    sample = Sample(wall, wall, usage.ru_utime + usage.ru_stime, watch.anonymous, watch.file_backed)
    lines = log.read_text().strip().splitlines()
    if lines and lines[-1].startswith('{"seconds"'):
        told = json.loads(lines[-1])
        sample.seconds, sample.cpu = told["seconds"], told["cpu"]
        sample.start_up = told.get("start_up", 0.0)
    return sample


def _free_memory() -> int:
    """Bytes that nothing uses, the page cache included in use."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemFree in /proc/meminfo")


def _touched(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return mmap.mmap(-1, size, flags=flags)


class Ballast:
    """Makes all contestants find the same free memory: ``keep`` bytes of it, all touched just before.

    A virtual machine whose host takes back pages that have been free for two seconds pays for each of them again at
    its first use, up to five times what a warm page costs, and an output's page cache is made of such pages. Which
    ones a run gets is chance, unless all free memory is warm; so most of it is held, and the rest touched each time.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.held: list[mmap.mmap] = []

    def trim(self) -> None:
        """Hold what is free beyond ``keep``, then touch and release what is left but for a tenth."""
        surplus = _free_memory() - self.keep
        if surplus > self.keep // 4:
            self.held.append(_touched(surplus))
        _touched(max(mmap.PAGESIZE, min(_free_memory(), self.keep) * 9 // 10)).close()


def read_into_cache(folders: list[Path]) -> None:
    """Read every safetensors file once, so that a timed run finds it in the page cache."""
    buffer = memoryview(bytearray(READ_PIECE))
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def machine() -> dict[str, object]:
    """CPU model, cores, memory and kernel; nothing that names a host or a path."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    cores = len(os.sched_getaffinity(0))
    kernel = ".".join(platform.release().split("-")[0].split(".")[:2])
    return {"cpu": cpu, "cores": cores, "memory_gib": round(memory / 2**30, 1), "linux": kernel}
