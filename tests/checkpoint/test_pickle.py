"""Pickled weights: never run, never larger than they are, converted to the bit."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.pickle import _state_dict, check_archive, weight_files, write_plain
from mergekit_lr.errors import CheckpointError, ResourceError
from mergekit_lr.lazy import torch

from .conftest import reference, seeded

TENSORS = {
    "a": seeded(1, 5, 7),
    "half": seeded(2, 64, dtype=torch.float16),
    "brain": seeded(3, 3, 3, dtype=torch.bfloat16),
    "ints": torch.arange(10),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "turned": seeded(4, 6, 9).T,
    "row": seeded(5, 40, 8)[::2],
}


def save(path: Path, content: Any = None) -> Path:
    torch.save(TENSORS if content is None else content, path)
    return path


def assert_same(path: Path, cache: Path | None = None, expected: dict[str, Any] | None = None) -> None:
    with open_model(reference(path), allow_pickle=True, cache=cache) as checkpoint:
        assert set(checkpoint.tensors) == set(expected or TENSORS)
        for name, tensor in (expected or TENSORS).items():
            info = checkpoint.tensors[name]
            got = checkpoint.read(name, 0, info.numel).view(info.shape)
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)


def test_converted_to_the_bit_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    temporary = tmp_path / "tmp"
    source.mkdir()
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert_same(save(source / "model.bin"))
    assert list(temporary.iterdir()) == []
    assert [p.name for p in source.iterdir()] == ["model.bin"]


def test_sharded_folder_and_cache(tmp_path: Path) -> None:
    folder, cache = tmp_path / "m", tmp_path / "cache"
    folder.mkdir()
    names = list(TENSORS)
    files = {f"pytorch_model-{i}.bin": {n: TENSORS[n] for n in names[i::2]} for i in range(2)}
    for file, tensors in files.items():
        save(folder / file, OrderedDict(tensors))
    weight_map = {n: f for f, ts in files.items() for n in ts}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "x"}')
    assert_same(folder, cache)
    kept = {p: p.stat().st_mtime_ns for p in (cache / "converted").iterdir()}
    assert len(kept) == 2 and all(p.suffix == ".safetensors" for p in kept)
    with open_model(reference(folder), allow_pickle=True, cache=cache) as checkpoint:
        assert checkpoint.config == {"model_type": "x"}
        # The run's inputs are the user's files, not the copies.
        assert sorted(Path(s.path).name for s in checkpoint.stamps) == sorted(files)
    assert {p: p.stat().st_mtime_ns for p in (cache / "converted").iterdir()} == kept


def test_identity_is_the_same_for_every_conversion(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", {"a": TENSORS["a"]})
    identities = []
    for _ in range(2):
        with open_model(reference(path), allow_pickle=True) as checkpoint:
            identities.append(checkpoint.identity())
    assert identities[0] == identities[1]


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth"])
def test_only_if_asked(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / name)
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        open_model(reference(path))
    with pytest.raises(CheckpointError, match=r"a pickle can run code|holds no weights"):
        open_model(reference(tmp_path))


def test_safetensors_are_taken_before_pickles(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a zip")
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    assert_same(tmp_path, expected={"a": TENSORS["a"]})


def test_which_files_of_a_folder(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "best.pt"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == ["best.pt"]
    (tmp_path / "last.pt").touch()
    assert weight_files(tmp_path) == []  # which one is not ours to guess
    (tmp_path / "pytorch_model.bin").touch()
    assert weight_files(tmp_path) == ["pytorch_model.bin"]
    index = {"weight_map": {"a": "../evil.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"plain \.bin file name"):
        weight_files(tmp_path)


# --- archives that lie ------------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[zipfile.ZipInfo, bytes], tuple[zipfile.ZipInfo, bytes]]) -> Path:
    """A saved archive whose members went through ``change``."""
    save(path)
    with zipfile.ZipFile(path) as old:
        members = [(i, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for info, data in members:
            changed, content = change(zipfile.ZipInfo(info.filename), data)
            new.writestr(changed, content, changed.compress_type)
    return path


def compressed(kind: int, only: str = "") -> Callable[[Path], Path]:
    def change(info: zipfile.ZipInfo, data: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        info.compress_type = kind if only in info.filename else zipfile.ZIP_STORED
        return info, data + (b"\0" * 50_000_000 if "data/0" in info.filename else b"")

    return lambda path: rewritten(path, change)


def patched(find: bytes, offset: int, value: bytes, last: bool = False) -> Callable[[Path], Path]:
    """Overwrite bytes at ``offset`` after the first (or last) occurrence of a zip signature."""

    def make(path: Path) -> Path:
        data = bytearray(save(path).read_bytes())
        at = data.rfind(find) if last else data.find(find)
        data[at + offset : at + offset + len(value)] = value
        path.write_bytes(bytes(data))
        return path

    return make


def renamed(info: zipfile.ZipInfo, data: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    return zipfile.ZipInfo(info.filename.replace("pkl", "txt")), data


def same_name_twice(path: Path) -> Path:
    save(path)
    data = path.read_bytes().replace(b"data/1", b"data/0")
    path.write_bytes(data)
    return path


def many_members_one_body(path: Path) -> Path:
    """Every entry of the directory points at one local body: the overlapping-files bomb."""
    body = b"\0" * 1_000_000
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"x")
        archive.writestr("m/data/0", body)
    data = path.read_bytes()
    start = data.find(b"PK\x01\x02", data.find(b"PK\x01\x02") + 1)
    end = data.find(b"PK\x05\x06")
    entry, tail = data[start:end], bytearray(data[end:])
    copies = b"".join(entry.replace(b"data/0", b"data/%d" % i) for i in range(1, 9))
    struct.pack_into("<HH", tail, 8, 10, 10)
    struct.pack_into("<I", tail, 12, len(data[:end]) - data.find(b"PK\x01\x02") + len(copies))
    path.write_bytes(data[:end] + copies + bytes(tail))
    return path


CENTRAL = b"PK\x01\x02"
LYING: dict[str, tuple[Callable[[Path], Path], str]] = {
    "deflated storage": (compressed(zipfile.ZIP_DEFLATED, "data/0"), "compressed"),
    "deflated everywhere": (compressed(zipfile.ZIP_DEFLATED), "compressed"),
    "lzma": (compressed(zipfile.ZIP_LZMA, "data/0"), "compressed"),
    "bzip2": (compressed(zipfile.ZIP_BZIP2, "data/0"), "compressed"),
    "unknown compression": (patched(CENTRAL, 10, b"\x63\0"), "compressed"),
    "encrypted flag": (patched(CENTRAL, 8, b"\x01\0"), "encrypted"),
    "size of 4 GB": (patched(CENTRAL, 24, b"\xfe\xff\xff\xff"), "larger than the file"),
    "both sizes of 4 GB": (patched(CENTRAL, 20, b"\xfe\xff\xff\xff" * 2), "larger than the file"),
    "overlapping members": (many_members_one_body, "larger than the file"),
    "a name twice": (same_name_twice, "the same name"),
    "no zip": (lambda p: [p.write_bytes(b"\x80\x02}q\0." * 99), p][1], "zip format"),
    "tar": (lambda p: [p.write_bytes(b"data.pkl" + b"\0" * 10_000), p][1], "zip format"),
    "empty": (lambda p: [p.touch(), p][1], "zip format"),
    "cut short": (lambda p: [save(p), os.truncate(p, 900), p][2], "zip format"),
    "directory entry cut": (patched(CENTRAL, 0, b"XXXX"), "not a pickled checkpoint"),
    "no data.pkl": (lambda p: rewritten(p, renamed), "data.pkl"),
    "a folder": (lambda p: [p.mkdir(), p][1], "zip format"),
}  # fmt: skip


@pytest.mark.parametrize("case", LYING)
def test_archives_are_refused_before_anything_is_loaded(case: str, tmp_path: Path) -> None:
    make, message = LYING[case]
    path = make(tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=message):
        check_archive(path)


# --- pickles that attack, in one process that forks the converter for each --------------------------------------------


def with_pickle(path: Path, raw: bytes) -> None:
    """A torch archive whose data.pkl is ``raw``."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(256)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, raw if info.filename.endswith("/data.pkl") else old.read(info))


class Call:
    """Pickles as a call of ``function`` on ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def by_name(module: str, name: str, *arguments: bytes) -> bytes:
    """Protocol-0 pickle: import ``module.name`` and call it on strings."""
    pushed = b"".join(b"V" + a + b"\n" for a in arguments)
    return f"c{module}\n{name}\n".encode() + b"(" + pushed + b"tR."


def attacks(canary: Path) -> dict[str, bytes]:
    touch = f"touch {canary}".encode()
    code = f"open({str(canary)!r}, 'w')".encode()
    quoted = str(canary).encode()
    programs = {
        "os.system": by_name("os", "system", touch),
        "posix.system": by_name("posix", "system", touch),
        "subprocess.getoutput": by_name("subprocess", "getoutput", touch),
        "os.popen": by_name("os", "popen", touch),
        "builtins.eval": by_name("builtins", "eval", code),
        "builtins.exec": by_name("builtins", "exec", code),
        "builtins.open": by_name("builtins", "open", quoted, b"w"),
        "builtins.compile": by_name("builtins", "compile", code, b"x", b"exec"),
        "builtins.__import__": by_name("builtins", "__import__", b"antigravity"),
        "builtins.getattr": by_name("builtins", "getattr", b"x", b"upper"),
        "io.open": by_name("io", "open", quoted, b"w"),
        "pathlib": by_name("pathlib", "Path.touch", quoted),
        "runpy": by_name("runpy", "run_path", quoted),
        "pty.spawn": by_name("pty", "spawn", touch),
        "ctypes": by_name("ctypes", "CDLL", b"libc.so.6"),
        "webbrowser": by_name("webbrowser", "open", b"file:///"),
        "shutil.rmtree": by_name("shutil", "rmtree", str(canary.parent / "precious").encode()),
        "socket": by_name("socket", "create_connection"),
        "torch.hub.load": by_name("torch.hub", "load", b"x/y", b"z"),
        "torch.load": by_name("torch", "load", quoted),
        "torch.save": by_name("torch", "save", b"x", quoted),
        "torch.ops.load_library": by_name("torch", "ops.load_library", quoted),
        "numpy load": by_name("numpy", "load", quoted),
        "importlib": by_name("importlib", "import_module", b"antigravity"),
        "timeit": by_name("timeit", "timeit", code),
        "pickle in pickle": by_name("pickle", "loads", by_name("os", "system", touch).replace(b"\n", b"\\u000a")),
    }  # fmt: skip
    objects = {
        "reduce in a state dict": {"a": torch.zeros(2), "b": Call(os.system, touch.decode())},
        "reduce in a list": [Call(eval, code.decode())],
    }
    for name, value in objects.items():
        programs[name] = pickle.dumps(value, protocol=2)
    return programs


def bombs() -> dict[str, Any]:
    """State dicts that torch loads without complaint and that are more than the file holds."""
    one = torch.zeros(4)
    return {
        "stride 0": {"a": one[:1].expand(1 << 40)},
        "stride 0 in two dimensions": {"a": one[:1].expand(1 << 20, 1 << 20)},
        "ten thousand views of one storage": {f"v{i}": torch.zeros(0) for i in range(2)} | shared_views(),
        "not a state dict": {"a": 1},
        "a list of tensors": [one],
        "keys that are numbers": {1: one},
        "sparse": {"a": torch.eye(3).to_sparse()},
    }


def shared_views() -> dict[str, Any]:
    whole = torch.zeros(1000)
    return {f"t{i}": whole[:] for i in range(10_000)}


DRIVER = """
import os, sys
from pathlib import Path
import torch
from mergekit_lr.checkpoint.pickle import _main
torch.set_num_threads(1)
for source in sorted(Path(sys.argv[1]).glob("*.bin")):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_main(source, source.with_suffix(".out")))
    print(source.stem, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def convert_all(folder: Path) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", DRIVER, str(folder)], capture_output=True, text=True, check=True)
    return {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in done.stdout.splitlines()}


def test_attacks_and_bombs_end_with_an_error_and_do_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = tmp_path / "in"
    (tmp_path / "precious").mkdir()
    folder.mkdir()
    names = []
    pickle.loads(attacks(canary)["os.system"])  # the attacks are live: an unguarded loader runs them
    canary.unlink()
    for name, raw in attacks(canary).items():
        with_pickle(folder / f"{name}.bin", raw)
        names.append(name)
    for name, content in bombs().items():
        save(folder / f"{name}.bin", content)
        names.append(name)
    save(folder / "sound.bin")
    outcome = convert_all(folder)
    assert outcome == {**dict.fromkeys(names, 4), "sound": 0}
    assert not canary.exists() and (tmp_path / "precious").is_dir()
    assert len(names) >= 33


def test_the_audit_hook_ends_what_slips_through(tmp_path: Path) -> None:
    """With the loader's own fence taken away, the confined process still starts no program and connects nowhere."""
    program = """
import sys
from pathlib import Path
from mergekit_lr.checkpoint.pickle import confine
confine(Path(sys.argv[1]).stat().st_size)
exec(sys.argv[2])
"""
    (tmp_path / "file").touch()
    canary = tmp_path / "canary"
    for code in (
        f"import os; os.system('touch {canary}')",
        f"import subprocess; subprocess.run(['touch', '{canary}'])",
        f"import os; os.execv('/bin/touch', ['touch', '{canary}'])",
        f"import os; os.posix_spawn('/bin/touch', ['touch', '{canary}'], {{}})",
        "import os; os.fork()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('example.org', 80)",
    ):
        command = [sys.executable, "-c", program, str(tmp_path / "file"), code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 3 and done.stderr.startswith("it tried "), (code, done)
    assert not canary.exists()
    code = "x = bytearray(1 << 40)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file"), code], capture_output=True, text=True, check=False
    )
    assert "MemoryError" in done.stderr


def test_refusal_reaches_the_user_as_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with_pickle(path, by_name("os", "system", b"true"))
    with pytest.raises(CheckpointError) as caught:
        open_model(reference(path), allow_pickle=True)
    message = str(caught.value)
    assert message.startswith(f"{path}: pickled weights were refused") and "\n" not in message


def test_training_checkpoint_with_a_state_dict_inside(tmp_path: Path) -> None:
    path = save(tmp_path / "last.pt", {"state_dict": {"a": TENSORS["a"]}, "epoch": 3, "lr": 0.1})
    assert_same(path, expected={"a": TENSORS["a"]})


# --- what a conversion does, in this process --------------------------------------------------------------------------


@pytest.fixture
def nearby(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions here instead of in a process that first imports torch. What they read was written by the test."""

    def convert(sources: list[Path], target: Path, module: str) -> None:
        write_plain(torch.load(sources[0], weights_only=True), target)

    monkeypatch.setattr("mergekit_lr.checkpoint.pickle.convert", convert)


def test_a_tensor_in_two_files_of_one_model_is_refused(tmp_path: Path, nearby: None) -> None:
    for number in (1, 2):
        save(tmp_path / f"pytorch_model-{number}.bin", {"a": TENSORS["a"]})
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="tensor 'a' is in two files") as caught:
        open_model(reference(tmp_path), allow_pickle=True)
    assert "pytorch_model-2.bin" in str(caught.value)


def test_a_file_that_the_index_names_and_that_is_not_there(tmp_path: Path) -> None:
    weight_map = {"a": "pytorch_model-1.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="cannot read the file") as caught:
        open_model(reference(tmp_path), allow_pickle=True)
    assert "pytorch_model-1.bin" in str(caught.value) and caught.value.why == "No such file or directory"


def test_an_archive_of_more_members_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.bin")
    with zipfile.ZipFile(path) as archive:
        members = len(archive.infolist())
    monkeypatch.setattr("mergekit_lr.checkpoint.pickle.MAX_MEMBERS", members)
    check_archive(path)
    monkeypatch.setattr("mergekit_lr.checkpoint.pickle.MAX_MEMBERS", members - 1)
    with pytest.raises(CheckpointError, match=f"it has {members} members"):
        check_archive(path)


def test_a_disk_without_room_for_the_copy_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.bin")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=path.stat().st_size - 1))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ResourceError, match="no room to convert pickled weights") as caught:
        open_model(reference(path), allow_pickle=True)
    assert "TMPDIR" in str(caught.value.fix) and f"{path.stat().st_size} bytes are needed" in str(caught.value.why)
    assert list(tmp_path.iterdir()) == [path]  # nor is the temporary folder left


def test_large_tensors_that_do_not_lie_in_order_are_written_in_order(tmp_path: Path) -> None:
    """They are copied row by row, never whole."""
    tensors = {"turned": seeded(7, 1100, 1000).T, "deep": seeded(8, 3, 700, 600).permute(0, 2, 1)}
    write_plain(tensors, tmp_path / "f")
    found = load_file(tmp_path / "f")
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_a_dtype_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'c' has dtype torch\.complex128, which is not read"):
        write_plain({"c": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "f")


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("state_dict", "model"), ()])
def test_where_the_tensors_of_a_training_checkpoint_are(keys: tuple[str, ...]) -> None:
    content: dict[str, Any] = {"a": TENSORS["a"]}
    for key in reversed(keys):
        content = {key: content, **({"epoch": 3} if key == "state_dict" else {})}
    assert list(_state_dict(content)) == ["a"]


def test_a_limit_that_the_user_set_is_not_raised(tmp_path: Path) -> None:
    program = """
import resource, sys
from mergekit_lr.checkpoint.pickle import confine
most = 3 << 30
resource.setrlimit(resource.RLIMIT_AS, (most, most))
confine(1 << 40)
assert resource.getrlimit(resource.RLIMIT_AS) == (most, most), resource.getrlimit(resource.RLIMIT_AS)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tensors_come_in_the_order_of_the_users_files_wherever_the_copies_are(tmp_path: Path, nearby: None) -> None:
    """The order decides in which shard of an output a tensor is; a copy's name is a digest, or a number."""
    model = tmp_path / "model"
    model.mkdir()
    names = [f"t{i:02}" for i in range(12)]
    weight_map = {n: f"pytorch_model-{i + 1:05}-of-00012.bin" for i, n in enumerate(names)}
    for name, file in weight_map.items():
        save(model / file, {name: TENSORS["a"]})
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for cache in (None, tmp_path / "cache"):
        with open_model(reference(model), allow_pickle=True, cache=cache) as checkpoint:
            assert sorted(checkpoint.tensors, key=checkpoint.file_position) == names
