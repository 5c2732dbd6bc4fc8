"""The floor under any merge: read every input byte, write one output of one input's size, make it durable.

``plain``  one thread; pread everything into one reused buffer, then pwrite the output from it, then fsync. This is the
    floor that ratios are taken against.
``early``  the least that was found: two threads that read and write piece by piece, space allocated first, and
    write-back started as the output grows, so that the disk works during the reading. For information.

Run as a script it prints one JSON line; the interpreter's start is not in its seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import threading
import time
from pathlib import Path

PIECE = 1 << 20  # the fastest of 256 KiB .. 8 MiB: large enough for the system call, small enough for the cache
WINDOW = 32 << 20
SYNC_FILE_RANGE_WRITE = 2


def _open_inputs(folders: list[Path]) -> list[list[int]]:
    return [[os.open(file, os.O_RDONLY) for file in sorted(f.glob("*.safetensors"))] for f in folders]


def _buffer() -> memoryview:
    buffer = mmap.mmap(-1, PIECE)
    buffer.write(b"\1" * PIECE)  # touched, so that no page fault is measured
    return memoryview(buffer)


def plain(folders: list[Path], out: Path) -> dict[str, float]:
    """Seconds of each part, one thread."""
    buffer = _buffer()
    started = time.perf_counter()
    inputs = _open_inputs(folders)
    for descriptors in inputs:
        for descriptor in descriptors:
            offset, size = 0, os.fstat(descriptor).st_size
            while offset < size:
                offset += os.preadv(descriptor, [buffer], offset)
    read = time.perf_counter()
    total = sum(os.fstat(descriptor).st_size for descriptor in inputs[0])
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.ftruncate(target, total)
    for offset in range(0, total, PIECE):
        os.pwrite(target, buffer[: min(PIECE, total - offset)], offset)
    written = time.perf_counter()
    os.fsync(target)
    done = time.perf_counter()
    os.close(target)
    for descriptor in (descriptor for descriptors in inputs for descriptor in descriptors):
        os.close(descriptor)
    return {"total": done - started, "read": read - started, "write": written - read, "fsync": done - written}


def _pieces(sizes: list[int]) -> list[tuple[int, int, int, int]]:
    """(file number, offset in the file, length, offset in the output) of every piece."""
    found, before = [], 0
    for number, size in enumerate(sizes):
        found += [(number, at, min(PIECE, size - at), before + at) for at in range(0, size, PIECE)]
        before += size
    return found


def early(folders: list[Path], out: Path, threads: int = 2) -> dict[str, float]:
    """Seconds in all and of the last fsync, with ``threads`` workers and early write-back."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    buffers = [[_buffer() for _ in folders] for _ in range(threads)]
    started = time.perf_counter()
    inputs = _open_inputs(folders)
    pieces = _pieces([os.fstat(descriptor).st_size for descriptor in inputs[0]])
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.posix_fallocate(target, 0, pieces[-1][3] + pieces[-1][2])
    per_window = WINDOW // PIECE
    windows = [pieces[start : start + per_window] for start in range(0, len(pieces), per_window)]

    def work(number: int) -> None:
        for window in windows[number::threads]:
            for file, offset, length, at in window:
                for buffer, descriptors in zip(buffers[number], inputs, strict=True):
                    os.preadv(descriptors[file], [buffer[:length]], offset)
                os.pwrite(target, buffers[number][0][:length], at)
            length = sum(piece[2] for piece in window)
            libc.sync_file_range(target, window[0][3], length, SYNC_FILE_RANGE_WRITE)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    written = time.perf_counter()
    os.fsync(target)
    done = time.perf_counter()
    os.close(target)
    for descriptor in (descriptor for descriptors in inputs for descriptor in descriptors):
        os.close(descriptor)
    return {"total": done - started, "fsync": done - written}


def main() -> None:
    """``floor.py plain|early OUT FOLDER...``"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["plain", "early"])
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    cpu = time.process_time()
    seconds = (plain if arguments.kind == "plain" else early)(arguments.folders, arguments.out)
    print(json.dumps({"seconds": seconds["total"], "cpu": time.process_time() - cpu, "parts": seconds}))


if __name__ == "__main__":
    main()
