"""Inputs that are almost sound: headers, files and JSON documents with a few changes, from one random source.

Plain `random` and not hypothesis, for speed: tens of thousands of cases a second's fraction each. A failing case is
printed whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES

NAMES = [
    "a",
    "b",
    "model.layers.0.mlp.w",
    "",
    "__metadata__",
    "x\ty",
    "é",
    "../x",
    "a" * 600,
    "\ud800",
    "a\u202eb",
    "t0",
]
DTYPES = [*ITEM_BYTES, "F4", "F6_E2M3", "f32", "", "U128", "F8_E8M0FNU", 7, None, ["F32"]]
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    -1,
    2**31,
    2**48,
    2**62,
    2**63,
    2**64,
    2**80,
    10**30,
    1.0,
    1e3,
    1e308,
    True,
    None,
    "1",
    [1],
    {},
]
BYTES = b'{}[]",:0123456789-+e.\\u \x00\x7f\xff\xc3\n\tntfalsr'
CODES = list(ITEM_BYTES)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sound(random: Random) -> tuple[dict[str, Any], int]:
    """A well-formed header, and how many bytes of data it describes."""
    header: dict[str, Any] = {}
    offset = 0
    for i in range(random.randrange(4)):
        dtype = random.choice(CODES)
        shape = [random.randrange(4) for _ in range(random.randrange(4))]
        size = ITEM_BYTES[dtype]
        for d in shape:
            size *= d
        header[f"t{i}"] = entry(dtype, shape, offset, offset + size)
        offset += size
    if random.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    return header, offset


def spoil(random: Random, header: dict[str, Any]) -> None:
    """One change somewhere in the structure."""
    names = [n for n in header if isinstance(header[n], dict) and n != "__metadata__"]
    if not names or random.random() < 0.1:
        header[random.choice(NAMES)] = random.choice([entry("U8", [0], 0, 0), None, {}, [], "x", {"format": 1}])
        return
    name = random.choice(names)
    fields = header[name]
    match random.randrange(8):
        case 0:
            fields["dtype"] = random.choice(DTYPES)
        case 1:
            fields["shape"] = [random.choice(NUMBERS) for _ in range(random.randrange(20))]
        case 2:
            fields["data_offsets"] = [random.choice(NUMBERS) for _ in range(random.choice([2, 2, 2, 1, 3]))]
        case 3:
            offsets = fields.get("data_offsets", [0, 0])
            known = offsets if isinstance(offsets, list) else []
            fields["data_offsets"] = [o + random.choice([-1, 1, 4]) for o in known if type(o) is int]
        case 4 if fields:
            fields.pop(random.choice(list(fields)), None)
        case 5:
            fields[random.choice(["x", "dtype", "shape", "data_offsets"])] = random.choice(NUMBERS)
        case 6:
            header[random.choice(NAMES)] = header.pop(name)
        case _:
            if isinstance(fields.get("shape"), list):
                fields["shape"].append(random.choice(NUMBERS))


def scribble(random: Random, data: bytes) -> bytes:
    """One to three changes of bytes: other values, some lost, some twice."""
    spot = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        if not spot:
            break
        at = random.randrange(len(spot))
        match random.randrange(4):
            case 0:
                del spot[at : at + random.randrange(1, 9)]
            case 1:
                spot[at:at] = spot[at : at + random.randrange(1, 40)]
            case _:
                spot[at] = random.choice(BYTES)
    return bytes(spot)


def safetensors_file(random: Random) -> bytes:
    """A file that is sound, or has been changed in its structure, its bytes, its length field or its size."""
    header, size = sound(random)
    for _ in range(random.choice([0, 0, 1, 1, 1, 2])):
        spoil(random, header)
    raw = json.dumps(header, separators=random.choice([(", ", ": "), (",", ":"), (" ,\n", "\t: ")])).encode()
    if random.random() < 0.04 and header:  # the same key again
        first = next(iter(header))
        raw = raw[:-1] + b"," + json.dumps({first: header[first]}).encode()[1:]
    raw += b" " * random.choice([0, 0, 1, -len(raw) % 8])
    if random.random() < 0.3:
        raw = scribble(random, raw)
    size = max(0, size + random.choice([0] * 9 + [1, -1, 8]))
    length = max(0, len(raw) + random.choice([0] * 30 + [1, -1, 2**40, 2**63]))
    data = struct.pack("<Q", min(length, 2**64 - 1)) + raw + random.randbytes(size)
    return data[: random.randrange(len(data) + 1)] if random.random() < 0.03 else data


VALUES: Sequence[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, 1e308, "", "x", "../x", "/etc/x", "\x1b[2J", "\ud800"),
    *([], {}, [[]], {"a": {}}, ["x"], "9" * 50, "a" * 3000),
]  # fmt: skip


def changed(random: Random, document: Any) -> Any:
    """A copy of a parsed JSON document with one thing in it replaced, removed, added, or moved to another key."""
    places = list(_places(document, ()))
    path = random.choice(places)
    if not path:
        return random.choice(VALUES)
    copy = json.loads(json.dumps(document))
    holder = copy
    for step in path[:-1]:
        holder = holder[step]
    match random.randrange(6):
        case 0:
            del holder[path[-1]]
        case 1 if isinstance(holder, dict):
            holder[random.choice(["x", "__proto__", "", "a.b", "0", *holder])] = holder.pop(path[-1])
        case 2 if isinstance(holder, list):
            holder.append(holder[path[-1]])
        case 3:
            other = document
            for step in random.choice(places):
                other = other[step]
            holder[path[-1]] = json.loads(json.dumps(other))
        case _:
            holder[path[-1]] = random.choice(VALUES)
    return copy


def _places(document: Any, path: tuple[Any, ...]) -> Any:
    yield path
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from _places(value, (*path, key))
    elif isinstance(document, list):
        for i, value in enumerate(document):
            yield from _places(value, (*path, i))


def json_bytes(random: Random, document: Any) -> bytes:
    """A document with one to three changes of structure and, now and then, of bytes."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        document = changed(random, document)
    raw = json.dumps(document).encode()
    return scribble(random, raw) if random.random() < 0.2 else raw
