"""Pickled weights that run code when they are loaded, or that are larger than they look (rows 1, 2)."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from staging import attack, main, refused

from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.pickle import check_archive
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.errors import CheckpointError

CALLS = {
    "os.system": ("os", "system", "touch {canary}"),
    "posix.system": ("posix", "system", "touch {canary}"),
    "os.popen": ("os", "popen", "touch {canary}"),
    "os.execv": ("os", "execl", "/bin/touch", "touch", "{canary}"),
    "os.remove": ("os", "remove", "{precious}"),
    "os.mkdir": ("os", "mkdir", "{canary}"),
    "subprocess.Popen": ("subprocess", "Popen", "touch {canary}"),
    "subprocess.getoutput": ("subprocess", "getoutput", "touch {canary}"),
    "builtins.eval": ("builtins", "eval", "open('{canary}', 'w')"),
    "builtins.exec": ("builtins", "exec", "open('{canary}', 'w')"),
    "builtins.open": ("builtins", "open", "{canary}", "w"),
    "builtins.__import__": ("builtins", "__import__", "antigravity"),
    "io.open": ("io", "open", "{canary}", "w"),
    "pathlib.Path.touch": ("pathlib", "Path.touch", "{canary}"),
    "pty.spawn": ("pty", "spawn", "touch {canary}"),
    "ctypes.CDLL": ("ctypes", "CDLL", "{evil}"),
    "shutil.rmtree": ("shutil", "rmtree", "{precious}"),
    "socket.create_connection": ("socket", "create_connection", "localhost"),
    "runpy.run_path": ("runpy", "run_path", "{evil}"),
    "importlib.import_module": ("importlib", "import_module", "antigravity"),
    "webbrowser.open": ("webbrowser", "open", "file:///{canary}"),
    "timeit.timeit": ("timeit", "timeit", "open('{canary}', 'w')"),
    "code.interact": ("code", "InteractiveInterpreter.runcode", "{canary}"),
    "torch.hub.load": ("torch.hub", "load", "evil/repo", "model"),
    "torch.load": ("torch", "load", "{evil}"),
    "torch.ops.load_library": ("torch", "ops.load_library", "{evil}"),
    "numpy.load": ("numpy", "load", "{evil}"),
}

WATCHED = """
import json, os, sys
from pathlib import Path
import torch
from mergekit_lr.checkpoint.pickle import _main
BAD = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.mkdir", "subprocess.", "socket.connect",
       "shutil.", "pty.", "webbrowser.", "ctypes.dlopen")
seen = []
def hook(event, arguments):
    if event.startswith(BAD):
        seen.append(event)
    elif event == "open" and str(arguments[0]).endswith(("canary", "evil")):
        seen.append(f"open {arguments[0]}")
    elif event in ("compile", "exec") and "canary" in str(arguments[0]):
        seen.append(event)
    elif event == "import" and arguments[0] == "antigravity":
        seen.append(event)
torch.set_num_threads(1)
for source in sorted(Path(sys.argv[1]).glob("*.bin")):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        sys.addaudithook(hook)
        code = _main(source, source.with_suffix(".out"))
        print(json.dumps([source.stem, code, seen]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def archive(path: Path, pickled: bytes) -> None:
    """A torch archive whose data.pkl is these bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(64)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, pickled if info.filename.endswith("/data.pkl") else old.read(info))


@attack(1)
def calls(room: Path) -> str:
    """27 pickles that call os.system, eval, open, ... when they are loaded; an audit hook counts what happens"""
    folder, canary, precious = room / "in", room / "canary", room / "precious"
    folder.mkdir()
    precious.mkdir()
    (room / "evil").write_bytes(b"\x7fELF")
    for name, (module, function, *arguments) in CALLS.items():
        values = [a.format(canary=canary, precious=precious, evil=room / "evil") for a in arguments]
        pushed = b"".join(b"V" + v.encode() + b"\n" for v in values)
        archive(folder / f"{name}.bin", f"c{module}\n{function}\n(".encode() + pushed + b"tR.")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder)], capture_output=True, text=True, check=True, timeout=300
    )
    outcome = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, _, _ in outcome} == set(CALLS), done.stdout
    assert all(code == 4 and not seen for _, code, seen in outcome), outcome
    assert not canary.exists() and precious.is_dir()
    return f"{len(outcome)} pickles refused with 0 executions"


@attack(1)
def without_asking(room: Path) -> str:
    """a pickled model is opened like any other"""
    archive(room / "pytorch_model.bin", b"cos\nsystem\n(Vtouch canary\ntR.")
    return refused(lambda: open_model(ModelReference(Place(str(room)))), "a pickle can run code", kind=CheckpointError)


def zip_of(*members: tuple[str, bytes, int]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as new:
            for name, data, kind in members:
                new.writestr(zipfile.ZipInfo(name), data, kind)

    return make


def overlapping(path: Path) -> None:
    """Forty entries of the directory point at one body of a megabyte."""
    zip_of(("m/data.pkl", b"x", 0), ("m/data/0", bytes(1 << 20), 0))(path)
    data = path.read_bytes()
    first = data.find(b"PK\x01\x02")
    start, end = data.find(b"PK\x01\x02", first + 1), data.find(b"PK\x05\x06")
    copies = b"".join(data[start:end].replace(b"data/0", b"data/%c" % (65 + i)) for i in range(40))
    tail = bytearray(data[end:])
    tail[8:16] = (42).to_bytes(2, "little") * 2 + (end - first + len(copies)).to_bytes(4, "little")
    path.write_bytes(data[:end] + copies + bytes(tail))


def lying_size(path: Path) -> None:
    zip_of(("m/data.pkl", b"x", 0), ("m/data/0", bytes(64), 0))(path)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 20 : at + 28] = b"\xfe\xff\xff\xff" * 2
    path.write_bytes(bytes(data))


MEGABYTES = bytes(100 << 20)
ZIPS: dict[str, Callable[[Path], None]] = {
    "deflate": zip_of(("m/data.pkl", b"x", 0), ("m/data/0", MEGABYTES, zipfile.ZIP_DEFLATED)),
    "bzip2": zip_of(("m/data.pkl", b"x", 0), ("m/data/0", MEGABYTES[: 8 << 20], zipfile.ZIP_BZIP2)),
    "lzma": zip_of(("m/data.pkl", b"x", 0), ("m/data/0", MEGABYTES[: 8 << 20], zipfile.ZIP_LZMA)),
    "deflated pickle": zip_of(("m/data.pkl", MEGABYTES, zipfile.ZIP_DEFLATED)),
    "overlapping members": overlapping,
    "lying size": lying_size,
    "many members": zip_of(*((f"m/data/{i}", b"", 0) for i in range(20_000))),
}


@attack(2)
def zip_bombs(room: Path) -> str:
    """7 archives that unpack to a thousand times their size, or claim to"""
    slowest = 0.0
    for name, make in ZIPS.items():
        path = room / f"{name}.bin"
        make(path)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        refused(lambda path=path: check_archive(path), "not a pickled checkpoint", kind=CheckpointError)
        slowest = max(slowest, time.process_time() - began)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, f"{name} took memory"
    assert slowest < 0.5, f"{slowest:.2f} s"
    return f"{len(ZIPS)} refused from their directories alone, none unpacked"


STRIDES = """
import json, os, resource, sys, time
from pathlib import Path
import torch
from mergekit_lr.checkpoint.pickle import _main
torch.set_num_threads(1)
for source in sorted(Path(sys.argv[1]).glob("*.bin")):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        code = _main(source, source.with_suffix(".out"))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([source.stem, code, grown, time.process_time() - began]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def stride_bombs() -> dict[str, Any]:
    import torch

    one = torch.zeros(4)
    return {
        "a terabyte from one number": {"a": one[:1].expand(1 << 38)},
        "in two dimensions": {"a": one[:1].expand(1 << 19, 1 << 19)},
        "in eight dimensions": {"a": one[:1].reshape([1] * 8).expand([32] * 8)},
        "a thousand views": {f"v{i}": one[:1].expand(1 << 20) for i in range(1000)},
        "a sparse identity": {"a": torch.eye(2).to_sparse()},
    }


@attack(2)
def strides(room: Path) -> str:
    """5 tensors of stride 0: a few bytes that become terabytes when they are copied"""
    import torch

    for name, content in stride_bombs().items():
        torch.save(content, room / f"{name}.bin")
    done = subprocess.run(
        [sys.executable, "-c", STRIDES, str(room)], capture_output=True, text=True, check=True, timeout=300
    )
    outcome = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcome) == 5 and all(code == 4 for _, code, _, _ in outcome), done.stdout + done.stderr
    assert all(grown < 64 << 10 and seconds < 0.5 for _, _, grown, seconds in outcome), outcome
    assert sum(os.path.getsize(p) for p in room.glob("*.out")) == 0  # noqa: PTH202
    return f"{len(outcome)} refused before anything of them was written"


main(__name__)
