"""Safetensors headers that lie about the data, or that are meant to exhaust the reader (rows 3, 4, 5)."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from pathlib import Path
from typing import Any

from staging import attack, header, main, refused

from mergekit_lr.checkpoint.header import MAX_HEADER, read_header
from mergekit_lr.errors import CheckpointError


def entry(begin: int = 0, end: int = 4, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def rejected(room: Path, data: bytes, match: str) -> str:
    path = room / "m.safetensors"
    path.write_bytes(data)
    return refused(lambda: read_header(path), match, kind=CheckpointError)


@attack(3)
def overlap(room: Path) -> str:
    """two tensors share their bytes, so that changing one changes the other"""
    return rejected(room, header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "hole or overlaps")


@attack(3)
def hole(room: Path) -> str:
    """bytes that belong to no tensor hide a second file in the first"""
    return rejected(room, header({"a": entry(), "b": entry(64, 68)}, bytes(68)), "hole or overlaps")


@attack(3)
def tail(room: Path) -> str:
    """a zip archive stands behind the last tensor: one file, two formats"""
    return rejected(room, header({"a": entry()}, bytes(4) + b"PK\5\6" + bytes(18)), "end at byte")


@attack(3)
def out_of_bounds(room: Path) -> str:
    """a tensor begins past the end of the file"""
    return rejected(room, header({"a": entry(2**40, 2**40 + 4)}, bytes(4)), "hole or overlaps")


@attack(3)
def negative(room: Path) -> str:
    """a tensor begins before the data: inside the header"""
    return rejected(room, header({"a": entry(-4, 0)}, b""), "negative number")


@attack(3)
def wrong_size(room: Path) -> str:
    """a shape of a million elements over four bytes"""
    return rejected(room, header({"a": entry(0, 4, [1000, 1000])}, bytes(4)), "its shape needs 4000000")


@attack(3)
def overflow(room: Path) -> str:
    """a shape whose product is 0 modulo 2^64"""
    return rejected(room, header({"a": entry(0, 0, [2**32, 2**32])}), "impossible shape")


@attack(4)
def huge_header(room: Path) -> str:
    """a length field of 1 GB in a sparse file makes the reader allocate it"""
    path = room / "m.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", 1 << 30))
        f.truncate(2 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refused(lambda: read_header(path), "header length 1073741824")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10
    return line


@attack(4)
def header_of_spaces(room: Path) -> str:
    """a header of the longest length allowed that holds nothing but spaces"""
    path = room / "m.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", MAX_HEADER))
        f.truncate(8 + MAX_HEADER)
    return refused(lambda: read_header(path), "does not begin with '{'")


@attack(4)
def deep(room: Path) -> str:
    """200,000 brackets overflow the stack of a recursive parser"""
    return rejected(room, header({}, raw=b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not valid JSON")


@attack(4)
def million_dimensions(room: Path) -> str:
    """a shape of 1,000,000 ones"""
    return rejected(room, header({"a": entry(0, 4, [1] * 1_000_000)}, bytes(4)), "at most 4096 characters")


def cost(path: Path) -> tuple[str, float, float]:
    """Reading a header in a process of its own: the error, memory as multiples of its length, CPU seconds."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            began = time.process_time()
            try:
                line = f"{len(read_header(path).tensors)} tensors were read"
            except CheckpointError as e:
                line = str(e)
            taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            os.write(sender, json.dumps([line, taken / path.stat().st_size, time.process_time() - began]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(sender)
    with os.fdopen(receiver) as f:
        answer = f.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed"
    line, times, seconds = json.loads(answer)
    return line, times, seconds


COSTLY = {
    "numbers for tensors": lambda n: b"{" + b",".join(b'"%d":0' % i for i in range(n)) + b"}",
    "empty lists": lambda n: b'{"a":[' + b"[]," * (2 * n) + b"[]]}",
    "empty objects": lambda n: b'{"a":[' + b"{}," * (2 * n) + b"{}]}",
    "metadata": lambda n: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(2 * n)) + b"}}",
    "one long name": lambda n: b'{"' + b"n" * (8 * n) + b'":0}',
    "empty tensors": lambda n: (
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(n // 8)) + b"}"
    ),
}


@attack(4)
def memory(room: Path) -> str:
    """headers of some megabytes that become gigabytes of Python objects"""
    worst, slowest = 0.0, 0.0
    for name, make in COSTLY.items():
        path = room / "m.safetensors"
        path.write_bytes(header({}, raw=make(500_000)))
        line, times, seconds = cost(path)
        # Metadata are parsed at once, and 16 MB of them are all that is read.
        most = 12 if name != "metadata" else 24
        assert times <= most and seconds < 10, f"{name}: {times:.1f} times the header, {seconds:.1f} s ({line})"
        worst, slowest = max(worst, times), max(slowest, seconds)
    return f"{len(COSTLY)} kinds: no more than 12 times the header's bytes (metadata 24), and no more than 10 s"


@attack(5)
def duplicate_key(room: Path) -> str:
    """a tensor is described twice: parsers differ in which one they take"""
    one, two = (json.dumps(entry(shape=s)).encode() for s in ([1], [1, 1]))
    return rejected(room, header({}, bytes(4), raw=b'{"a":' + one + b',"a":' + two + b"}"), "twice")


@attack(5)
def duplicate_by_escape(room: Path) -> str:
    """the same name twice, once written with an escape"""
    one = json.dumps(entry()).encode()
    return rejected(room, header({}, bytes(4), raw=b'{"a":' + one + b',"\\u0061":' + one + b"}"), "twice")


@attack(5)
def terminal_codes(room: Path) -> str:
    """a name that clears the screen of whoever lists the tensors"""
    return rejected(room, header({"\x1b[2Jweights": entry()}, bytes(4)), "control characters")


@attack(5)
def right_to_left(room: Path) -> str:
    """a name that reads the other way round on a screen"""
    return rejected(room, header({"a\u202egpj.exe": entry()}, bytes(4)), "control characters")


@attack(5)
def names_like_paths(room: Path) -> str:
    """tensors called ../../etc/x and /abs: names are read as names, and no file of that name is touched"""
    from staging import LLAMA, merged, model, watched

    hostile = {**LLAMA, "../../escaped": (2,), "/absolute": (2,), "..\\up": (2,)}
    first, second = model(room / "a", tensors=hostile), model(room / "b", tensors=hostile)
    with watched() as seen:
        report = merged(first, second, out=room / "out")
    assert not [s for s in seen if s[0] == "open" and ("escaped" in s[1] or "absolute" in s[1])]
    assert {"../../escaped", "/absolute"} <= {t["name"] for t in report["tensors"]}
    assert not (room.parent / "escaped").exists() and not (room / "escaped").exists()
    return "merged under those names, in OUT/model.safetensors only"


@attack(5)
def sixty_names(room: Path) -> str:
    """names of every odd kind: refused, or nothing but names"""
    odd = [chr(c) for c in (*range(32), 127, 0x85, 0x2028, 0x2029, 0x200B, 0xFEFF, 0xE000, 0xD800, 0x202E, 0x2066)]
    fine = ["..", "a/b", "a\\b", "C:", "~", "%2e%2e", "日本", "é", "a" * 512, "'", '"', "<b>", "`", "$(x)", "a.b", "-"]
    for name in odd:
        rejected(room, header({f"a{name}b": entry()}, bytes(4)), "control characters|JSON")
    for name in fine:
        path = room / "fine.safetensors"
        path.write_bytes(header({name: entry()}, bytes(4)))
        assert list(read_header(path).tensors) == [name]
    for name in ("", "a" * 513, "é" * 257):
        rejected(room, header({name: entry()}, bytes(4)), "empty, too long")
    assert len(odd) + len(fine) >= 55
    return f"{len(odd) + 3} refused, {len(fine)} read as names"


main(__name__)
