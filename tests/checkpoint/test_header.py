"""The header reader against hand-made files and, differentially, against the reference parser."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors
from safetensors.torch import save_file

from mergekit_lr.checkpoint import header as header_module
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from mergekit_lr.checkpoint.header import parse_header, read_header
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

from ..fuzz.generators import sound

HERE = Path("fuzzed.safetensors")


def blob(header: Any, data: bytes = b"", raw: bytes | None = None) -> bytes:
    text = raw if raw is not None else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: list[int] | None = None, begin: int = 0, end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {f"t.{c}": torch.zeros(3, 2, dtype=torch_dtype(c)) for c in ITEM_BYTES if c != "F8_E8M0"}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == path.stat().st_size
    assert {n: i.shape for n, i in header.tensors.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    data = path.read_bytes()
    for name, info in header.tensors.items():
        assert torch_dtype(info.dtype) == tensors[name].dtype
        assert info.numel == tensors[name].numel()
        raw = tensors[name].reshape(-1).view(torch.uint8) if info.numel else torch.empty(0)
        assert data[info.offset : info.offset + info.nbytes] == bytes(raw.tolist())


BAD: dict[str, bytes] = {
    "empty file": b"",
    "shorter than its length field": b"\x01\x00",
    "length past the end": struct.pack("<Q", 1000) + b"{}",
    "length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "length zero": struct.pack("<Q", 0) + b"{}",
    "not JSON": blob(None, raw=b"{nope}"),
    "a list": blob([]),
    "leading space": blob(None, raw=b"  {}"),
    "byte order mark": blob(None, raw=b"\xef\xbb\xbf{}"),
    "not UTF-8": blob(None, b"\0" * 4, raw=b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "NaN": blob(None, raw=b'{"a":NaN}'),
    "deep nesting": blob(None, raw=b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "5000-digit number": blob(None, raw=b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
    "duplicate tensor": blob(None, b"\0" * 4, raw=b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "duplicate tensor, escaped": blob(
        None, b"\0" * 4, raw=b'{"a":%s,"\\u0061":%s}' % ((json.dumps(entry()).encode(),) * 2)
    ),
    "duplicate field": blob(
        None, b"\0" * 4, raw=b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ),
    "extra field": blob({"a": {**entry(), "x": 1}}, b"\0" * 4),
    "missing field": blob({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "entry is a list": blob({"a": [1]}, b"\0" * 4),
    "empty name": blob({"": entry()}, b"\0" * 4),
    "control character in name": blob({"a\nb": entry()}, b"\0" * 4),
    "NUL in name": blob({"a\0b": entry()}, b"\0" * 4),
    "lone surrogate in name": blob(None, b"\0" * 4, raw=b'{"\\ud800":%s}' % json.dumps(entry()).encode()),
    "right-to-left override in name": blob({"a\u202eb": entry()}, b"\0" * 4),
    "513-byte name": blob({"n" * 513: entry()}, b"\0" * 4),
    "unknown dtype": blob({"a": entry("F128")}, b"\0" * 4),
    "sub-byte dtype": blob({"a": entry("F4", [8])}, b"\0" * 4),
    "dtype a number": blob({"a": entry(7)}, b"\0" * 4),  # type: ignore[arg-type]
    "dtype a list": blob({"a": entry(["F32"])}, b"\0" * 4),  # type: ignore[arg-type]
    "wrong size": blob({"a": entry("F32", [2])}, b"\0" * 4),
    "hole": blob({"a": entry(), "b": entry(begin=8, end=12)}, b"\0" * 12),
    "hole at the start": blob({"a": entry(begin=4, end=8)}, b"\0" * 8),
    "overlap": blob({"a": entry(), "b": entry(begin=0, end=4)}, b"\0" * 4),
    "partial overlap": blob({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "tail": blob({"a": entry()}, b"\0" * 5),
    "truncated": blob({"a": entry()}, b"\0" * 3),
    "negative dimension": blob({"a": entry("F32", [-1])}, b"\0" * 4),
    "two negative dimensions": blob({"a": entry("F32", [-1, -1])}, b"\0" * 4),
    "fractional dimension": blob({"a": entry("F32", [1.0])}, b"\0" * 4),  # type: ignore[list-item]
    "boolean dimension": blob({"a": entry("F32", [True])}, b"\0" * 4),
    "dimension 2**63": blob({"a": entry("F32", [2**63, 0], 0, 0)}),
    "dimension 2**49": blob({"a": entry("F32", [2**49, 0], 0, 0)}),
    "product 2**64 beside a zero": blob({"a": entry("F32", [7, 2**31, 2**31, 0], 0, 0)}),
    "rank 17": blob({"a": entry("F32", [1] * 17)}, b"\0" * 4),
    "rank 100000": blob({"a": entry("F32", [1] * 100_000)}, b"\0" * 4),
    "shape a string": blob({"a": entry("F32", "1")}, b"\0" * 4),  # type: ignore[arg-type]
    "negative offset": blob({"a": entry(begin=-4, end=0)}, b""),
    "offsets reversed": blob({"a": entry(begin=4, end=0)}, b"\0" * 4),
    "three offsets": blob({"a": {**entry(), "data_offsets": [0, 4, 4]}}, b"\0" * 4),
    "offset 2**80": blob({"a": entry(begin=2**80, end=2**80 + 4)}, b"\0" * 4),
    "metadata a list": blob({"__metadata__": []}),
    "metadata null": blob({"__metadata__": None}),
    "metadata of numbers": blob({"__metadata__": {"a": 1}}),
    "minus zero": blob(None, b"", raw=b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 800 and "\n" not in message


@pytest.mark.parametrize("name", ["../../etc/x", "a//b", "/abs", "..", "C:\\x", "a" * 512, "日本"])
def test_odd_names_are_only_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(blob({name: entry()}, b"\0" * 4))
    assert list(read_header(path).tensors) == [name]


def test_too_many_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(header_module, "MAX_TENSORS", 3)
    path = tmp_path / "m.safetensors"
    for count, fine in ((3, True), (4, False)):
        path.write_bytes(blob({f"t{i}": entry("U8", [0], 0, 0) for i in range(count)}))
        if fine:
            assert len(read_header(path).tensors) == 3
        else:
            with pytest.raises(CheckpointError, match="more than 3 tensors"):
                read_header(path)


def test_header_longer_than_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as f:  # sparse: takes no space
        f.write(struct.pack("<Q", header_module.MAX_HEADER + 1))
        f.truncate(header_module.MAX_HEADER + 1000)
    with pytest.raises(CheckpointError, match="header length"):
        read_header(path)


def test_named_pipe_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    os.mkfifo(path)
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            read_header(path)
        except CheckpointError as e:
            outcome.append(e)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive() and "not a regular file" in str(outcome[0])


def test_folder_and_missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError):
            read_header(path)


def test_accepts_every_sound_header() -> None:
    """Headers that are not sound: tests/fuzz/test_headers.py."""
    source = random.Random(3)
    for _ in range(2_000):
        header, size = sound(source)
        data = blob(header, b"\0" * size)
        (length,) = struct.unpack("<Q", data[:8])
        assert set(parse_header(data[8 : 8 + length], len(data), HERE).tensors) == set(header) - {"__metadata__"}
        safetensors.deserialize(data)
