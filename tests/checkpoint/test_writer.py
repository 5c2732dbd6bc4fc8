"""The writer of single files, read back by the reference library."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.writer import Entry, FileWriter, write_safetensors
from mergekit_lr.errors import ResourceError, UsageError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1, -2, 3], dtype=torch.int64),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "mask": torch.tensor([255, 0, 7], dtype=torch.uint8),
}


def test_what_is_written_is_what_the_reference_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"samples": "3"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in TENSORS.items())
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "samples": "3"}
    assert read_header(path).tensors.keys() == TENSORS.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_bytes_do_not_depend_on_the_order_of_the_dict(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", TENSORS)
    write_safetensors(tmp_path / "y", dict(reversed(TENSORS.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"t": TENSORS["b"].t()})
    assert torch.equal(load_file(tmp_path / "x")["t"], TENSORS["b"].t())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: w.write("other", torch.zeros(2)),
        lambda w: w.write("x", torch.zeros(3)),
        lambda w: w.write("x", torch.zeros(2, dtype=torch.float64)),
        lambda w: (w.write("x", torch.zeros(2)), w.write("x", torch.zeros(2))),
        lambda w: None,
    ],
)
def test_a_file_that_is_not_as_announced_never_appears(tmp_path: Path, wrong) -> None:
    with pytest.raises(ValueError), FileWriter(tmp_path / "f", [Entry("x", "F32", (2,))]) as writer:
        wrong(writer)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_safetensors(path, {"x": torch.zeros(2)})
    seen = []

    def look(operation: str, name: str) -> None:
        renamed = "rename" in seen
        seen.append(operation)
        assert torch.equal(load_file(path)["x"], torch.ones(2) if renamed else torch.zeros(2))

    fs.set_hook(look)
    try:
        write_safetensors(path, {"x": torch.ones(2)})
    finally:
        fs.set_hook(None)
    assert torch.equal(load_file(path)["x"], torch.ones(2))
    assert "rename" in seen and "fsync" in seen


def test_one_process_writes_a_file_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with FileWriter(path, [Entry("x", "F32", (2,))]) as first:
        with pytest.raises(UsageError, match="another run is writing this file") as caught:
            FileWriter(path, [Entry("x", "F32", (3,))])
        assert caught.value.where == str(path) and "wait for it" in str(caught.value.fix)
        first.write("x", torch.ones(2))
    assert load_file(path)["x"].tolist() == [1.0, 1.0]
    write_safetensors(path, {"x": torch.zeros(3)})  # and then the next


@pytest.mark.parametrize("operation", ["truncate", "preallocate", "pwrite"])
def test_a_disk_that_refuses_at_the_start_leaves_nothing(tmp_path: Path, operation: str) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    def full(name: str, path: str) -> None:
        if name == operation:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fs.set_hook(full)
    try:
        with pytest.raises(ResourceError, match="No space left on device"):
            write_safetensors(tmp_path / "f", {"x": torch.ones(2)})
    finally:
        fs.set_hook(None)
    assert list(tmp_path.iterdir()) == [] and len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_was_put_in_the_place_of_ours_is_not_removed(tmp_path: Path) -> None:
    partial = tmp_path / "f.partial"
    with pytest.raises(ValueError, match="were not written"), FileWriter(tmp_path / "f", [Entry("x", "F32", (2,))]):
        partial.unlink()
        partial.write_bytes(b"of somebody else")
    assert partial.read_bytes() == b"of somebody else"


def test_a_dtype_that_the_format_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.complex128 cannot be stored in safetensors"):
        write_safetensors(tmp_path / "f", {"x": torch.zeros(2, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []
