"""Opening folders: the index as authority, links and traversal, truncation, what is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint, open_file, open_folder, stamp_of
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

from .conftest import seeded

Folder = Callable[..., Path]
TWO = {"model-1.safetensors": {"a": seeded(1, 3)}, "model-2.safetensors": {"b": seeded(2, 2, 2)}}


def whole(checkpoint: Checkpoint, name: str) -> Any:
    info = checkpoint.tensors[name]
    return checkpoint.read(name, 0, info.numel).view(info.shape)


def test_sharded_folder_reads_what_the_library_reads(make_folder: Folder) -> None:
    folder = make_folder(shards=TWO, index=True, config={"model_type": "llama"})
    with open_folder(folder, "ref") as checkpoint:
        assert checkpoint.config == {"model_type": "llama"} and checkpoint.reference == "ref"
        for file, tensors in TWO.items():
            for name, tensor in load_file(folder / file).items():
                assert torch.equal(whole(checkpoint, name), tensor) and name in tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "bool", "float8_e4m3fn"])
def test_every_range_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    tensor = (seeded(5, 7, 5) * 3).to(getattr(torch, dtype))
    save_file({"t": tensor}, tmp_path / "m.safetensors")
    flat = tensor.reshape(-1)
    with open_file(tmp_path / "m.safetensors", "m") as checkpoint:
        scratch = torch.empty(1000, dtype=torch.uint8)
        for start in range(0, 36, 5):
            for stop in range(start, 36, 3):
                for buffer in (None, scratch, scratch[:2]):
                    got = checkpoint.read("t", start, stop, buffer)
                    assert got.dtype == tensor.dtype
                    assert torch.equal(got.view(torch.uint8), flat[start:stop].view(torch.uint8))


def test_folder_without_index_joins_its_files(make_folder: Folder) -> None:
    with open_folder(make_folder(shards=TWO), "r") as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"} and checkpoint.config is None


def test_model_safetensors_wins_over_other_files(make_folder: Folder) -> None:
    folder = make_folder(
        shards={"model.safetensors": {"a": seeded(1, 2)}, "consolidated.safetensors": {"z": seeded(2, 2)}}
    )
    with open_folder(folder, "r") as checkpoint:
        assert set(checkpoint.tensors) == {"a"}


def test_same_name_in_two_files_without_index(make_folder: Folder) -> None:
    folder = make_folder(shards={"x.safetensors": {"a": seeded(1, 2)}, "y.safetensors": {"a": seeded(2, 2)}})
    with pytest.raises(CheckpointError, match="is in two files"):
        open_folder(folder, "r")


def test_extra_tensor_in_a_shard_is_ignored_and_said(make_folder: Folder) -> None:
    folder = make_folder(shards=TWO, index={"a": "model-1.safetensors"})
    (folder / "model-1.safetensors").unlink()
    save_file({"a": seeded(1, 3), "stale": seeded(9, 3)}, folder / "model-1.safetensors")
    with open_folder(folder, "r") as checkpoint:
        assert set(checkpoint.tensors) == {"a"}
        assert any("1 tensors that the index does not list" in w for w in checkpoint.warnings)


EVIL_SHARDS = [
    "../model-1.safetensors",
    "/etc/passwd",
    "/etc/x.safetensors",
    "..",
    "sub/model-1.safetensors",
    "sub\\model-1.safetensors",
    "C:model-1.safetensors",
    "file:///x.safetensors",
    "https://x/model-1.safetensors",
    "%2e%2e%2fm.safetensors",
    "model-1.safetensors\0",
    "model-1.safetensors\n",
    "model-1.safetensors ",
    "model-1.safetensors/..",
    "mod\u202eel.safetensors",
    "model-1.bin",
    "model-1.py",
    ".safetensors/../x.safetensors",
    "~/x.safetensors",
    "",
    None,
    7,
    ["model-1.safetensors"],
]


@pytest.mark.parametrize("shard", EVIL_SHARDS)
def test_index_cannot_lead_out_of_the_folder(shard: Any, make_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(shards=TWO)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    opened: list[str] = []
    real = os.open

    def spy(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(CheckpointError, match="the index places tensor 'a'"):
        open_folder(folder, "r")
    assert not opened


def test_symbolic_links(make_folder: Folder, tmp_path: Path) -> None:
    folder = make_folder(shards=TWO, index=True)
    secret = tmp_path / "secret.safetensors"
    (folder / "model-1.safetensors").rename(secret)
    (folder / "model-1.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link that leaves the model folder"):
        open_folder(folder, "r")
    # Inside the folder is fine, however it is spelt.
    (folder / "model-1.safetensors").unlink()
    secret.rename(folder / "real.safetensors")
    (folder / "model-1.safetensors").symlink_to("../model/real.safetensors")
    open_folder(folder, "r").close()


def test_blobs_only_beside_their_own_snapshot(make_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "cache" / "snapshots").mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    (tmp_path / "other" / "blobs").mkdir(parents=True)
    folder = make_folder("cache/snapshots/0123", shards={"model.safetensors": {"a": seeded(1, 3)}})
    shard = folder / "model.safetensors"
    for place, fine in (("cache", True), ("other", False)):
        blob = tmp_path / place / "blobs" / "abc"
        shard.resolve().rename(blob)
        shard.unlink(missing_ok=True)
        shard.symlink_to(blob)
        if fine:
            open_folder(folder, "r").close()
        else:
            with pytest.raises(CheckpointError, match="leaves the model folder"):
                open_folder(folder, "r")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_links_do_not_leave_either(name: str, make_folder: Folder, tmp_path: Path) -> None:
    folder = make_folder()
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / name).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="leaves the model folder"):
        open_folder(folder, "r")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../x"])
def test_inside_wants_plain_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a plain file name"):
        inside(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "appears twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_index(content: str, message: str, make_folder: Folder) -> None:
    folder = make_folder()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_folder(folder, "r")


def test_json_that_is_a_pipe_or_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")
    with (tmp_path / "big.json").open("wb") as f:
        f.truncate((64 << 20) + 1)
    with pytest.raises(CheckpointError, match="too large"):
        read_json(tmp_path / "big.json")


_FILES = ("s1.safetensors", "s2.safetensors", "s3.safetensors")


@settings(max_examples=150, deadline=None)
@given(
    holds=st.fixed_dictionaries({f: st.sets(st.sampled_from("abc"), max_size=3) for f in _FILES}),
    present=st.sets(st.sampled_from(_FILES)),
    mapped=st.dictionaries(st.sampled_from("abc"), st.sampled_from(_FILES), min_size=1),
)
def test_index_is_the_one_authority(
    holds: dict[str, set[str]], present: set[str], mapped: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("m")
    for number, file in enumerate(_FILES):
        if file in present:
            save_file({n: torch.full((2,), float(number)) for n in sorted(holds[file])}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
    sound = all(file in present and name in holds[file] for name, file in mapped.items())
    if not sound:
        with pytest.raises(CheckpointError, match=r"is missing|is not in the shard"):
            open_folder(folder, "r")
        return
    with open_folder(folder, "r") as checkpoint:
        for name, file in mapped.items():
            assert whole(checkpoint, name).tolist() == [float(_FILES.index(file))] * 2
        assert set(checkpoint.tensors) == set(mapped)


def test_truncation_during_a_run_is_an_error_not_a_signal(tmp_path: Path) -> None:
    """In a process of its own, because a mapped file would end it with SIGBUS."""
    program = """
import os, sys, random
from pathlib import Path
from mergekit_lr.checkpoint.model import open_file
from mergekit_lr.errors import CheckpointError
path = Path(sys.argv[1]); size = path.stat().st_size; whole = path.read_bytes(); caught = 0
source = random.Random(1)
for _ in range(100):
    path.write_bytes(whole)
    with open_file(path, "m") as c:
        n = c.tensors["t"].numel
        c.read("t", 0, 10)
        os.truncate(path, source.randrange(c.tensors["t"].offset + 40, size))
        try:
            c.read("t", 0, n)
        except CheckpointError as e:
            assert "ended inside tensor 't'" in str(e), e
            assert c.changed() == [str(path.resolve())]
            caught += 1
print(caught)
"""
    save_file({"t": torch.zeros(100_000)}, tmp_path / "m.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m.safetensors")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "100"), done.stderr


def test_truncation_before_a_run(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"t": torch.zeros(50)}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            open_file(path, "m")


def test_stamps_notice_change(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"t": torch.zeros(5)}, path)
    with open_file(path, "m") as checkpoint:
        assert checkpoint.changed() == []
        before = checkpoint.identity()
        os.utime(path, ns=(1, 1))
        assert checkpoint.changed() == [str(path)]
        path.unlink()
        assert checkpoint.changed() == [str(path)]
    save_file({"t": torch.ones(6)}, path)
    with open_file(path, "m") as checkpoint:
        assert checkpoint.identity() != before


def test_threads_share_one_descriptor_and_close_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"t": torch.arange(1000.0)}, path)
    checkpoint = open_file(path, "m")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    threads = [threading.Thread(target=checkpoint.read, args=("t", i, i + 10)) for i in range(50)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_pickled_folder_says_why(make_folder: Folder) -> None:
    folder = make_folder(shards={})
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_folder(folder, "r")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        open_folder(folder, "r")


def test_reading_order_follows_the_file(tmp_path: Path) -> None:
    save_file({n: torch.zeros(i + 1) for i, n in enumerate("cab")}, tmp_path / "m.safetensors")
    with open_file(tmp_path / "m.safetensors", "m") as checkpoint:
        order = sorted(checkpoint.tensors, key=checkpoint.file_position)
        assert order == sorted(order, key=lambda n: checkpoint.tensors[n].offset)
        assert len({checkpoint.file_position(n) for n in order}) == 3


def test_a_file_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(5)}, tmp_path / "m.safetensors")
    with open_file(tmp_path / "m.safetensors", "m") as checkpoint:
        (tmp_path / "m.safetensors").unlink()
        with pytest.raises(CheckpointError, match="cannot open the file"):
            checkpoint.read("t", 0, 5)


def test_a_file_that_became_something_else_has_changed(make_folder: Folder) -> None:
    """Even one of the same size, time and inode: its header is read again."""
    folder = make_folder()
    path = folder / "model.safetensors"
    with open_folder(folder, "m") as checkpoint:
        assert checkpoint.changed() == []
        status, data = path.stat(), path.read_bytes()
        with path.open("r+b") as f:
            f.write(b"\xff" * 16)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert checkpoint.changed() == [str(path.resolve())]
        with path.open("r+b") as f:
            f.write(data[:16])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert checkpoint.changed() == []


def test_a_file_that_grows_while_it_is_opened(make_folder: Folder) -> None:
    path = make_folder() / "model.safetensors"
    header = read_header(path)
    with path.open("ab") as f:
        f.write(b"more")
    with pytest.raises(CheckpointError, match="the file changed while it was opened") as caught:
        stamp_of(path, header)
    assert caught.value.fix == "run again"


def test_a_file_that_is_cut_while_its_header_is_read(make_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pread = make_folder() / "model.safetensors", os.pread

    def cutting(fd: int, count: int, offset: int) -> bytes:
        found = pread(fd, count, offset)
        os.truncate(path, 20)
        return found

    monkeypatch.setattr(os, "pread", cutting)
    with pytest.raises(CheckpointError, match="the file ends inside its header"):
        read_header(path)
