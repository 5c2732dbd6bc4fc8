"""Safetensors headers: one kind of error, no wait, no memory; and the reference parser is never outdone.

What we accept the reference parser accepts, with the same names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path
from random import Random

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from mergekit_lr.checkpoint import header as header_module
from mergekit_lr.checkpoint.header import Header, parse_header
from mergekit_lr.errors import CheckpointError

from .generators import entry, safetensors_file

HERE = Path("fuzzed.safetensors")


def ours(data: bytes) -> Header | None:
    """What the strict reader makes of a file. Any exception but CheckpointError is a failure."""
    if len(data) < 8:
        return None
    (length,) = struct.unpack("<Q", data[:8])
    if length < 2 or length > len(data) - 8:
        return None
    try:
        return parse_header(data[8 : 8 + length], len(data), HERE)
    except CheckpointError as e:
        assert len(str(e)) < 1000 and str(e).isprintable()
        return None


def compare(data: bytes) -> bool:
    """Whether we accept a file; AssertionError if the reference parser does not, or reads something else."""
    header = ours(data)
    if header is None:
        return False
    try:
        theirs = safetensors.deserialize(data)
    except SafetensorError as e:
        raise AssertionError(f"accepted what the reference parser rejects ({e}): {data!r}") from e
    assert {n for n, _ in theirs} == set(header.tensors), data
    for name, read in theirs:
        info = header.tensors[name]
        assert (read["dtype"], tuple(read["shape"])) == (info.dtype, info.shape), data
        assert bytes(read["data"]) == data[info.offset : info.offset + info.nbytes], data
    return True


def run(seed: int, cases: int) -> tuple[int, float, int]:
    """How many cases were accepted, CPU seconds of the slowest, and growth of the process in bytes."""
    random = Random(seed)
    accepted, slowest = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(cases):
        data = safetensors_file(random)
        began = time.process_time()
        accepted += compare(data)
        slowest = max(slowest, time.process_time() - began)
    return accepted, slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.parametrize(
    ("seed", "cases", "at_once"),
    [
        (20261122, 40_000, True),
        (20261123, 10_000, False),
        pytest.param(7, 700_000, True, marks=pytest.mark.slow),
        pytest.param(8, 300_000, False, marks=pytest.mark.slow),
    ],
)
def test_headers(seed: int, cases: int, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``at_once``: parsed in one go, as small headers are; else entry by entry, as large ones are."""
    if not at_once:
        monkeypatch.setattr(header_module, "AT_ONCE", 0)
    accepted, slowest, grown = run(seed, cases)
    assert 0.1 * cases < accepted < 0.9 * cases  # the generator must reach both sides, or the test says nothing
    assert slowest < 1.0
    assert grown < 64 << 20


def test_both_ways_of_parsing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(5)
    for _ in range(4_000):
        data = safetensors_file(random)
        monkeypatch.setattr(header_module, "AT_ONCE", 1 << 30)
        whole = ours(data)
        monkeypatch.setattr(header_module, "AT_ONCE", 0)
        assert ours(data) == whole, data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    compare(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=6), _json | st.just(entry("U8", [0], 0, 0)), max_size=4) | _json)
def test_any_json(value: object) -> None:
    import json

    raw = json.dumps(value).encode()
    compare(struct.pack("<Q", len(raw)) + raw)
