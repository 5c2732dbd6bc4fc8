"""Pickled weights, for those who ask for them: checked, then converted to safetensors in a confined process.

Three fences. Before anything is unpickled, the archive must be a plain zip whose members are stored uncompressed
and do not outgrow the file. The unpickling itself is torch's ``weights_only`` loader, in a process of its own with
an address-space limit and an audit hook that ends it on any attempt to start a program or open a connection. And
every tensor must fit in its own storage, so that a few bytes with stride 0 cannot become terabytes.

Run as a module it is that process: ``python -m mergekit_lr.checkpoint.pickle SOURCE TARGET``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from mergekit_lr.checkpoint.model import Checkpoint, Stamp, open_file, read_weight_map
from mergekit_lr.checkpoint.small_files import inside, read_config
from mergekit_lr.errors import CheckpointError, ResourceError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SPARE_ADDRESS_SPACE = 2 << 30
MAX_MEMBERS = 1_000_000
_REFUSED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.", "pty.")


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's pickled weight files: what its index names, or ``pytorch_model.bin``, or its only one."""
    index = inside(folder, "pytorch_model.bin.index.json")
    if index.exists():
        return sorted(read_weight_map(index, "bin"))
    if (folder / "pytorch_model.bin").exists():
        return ["pytorch_model.bin"]
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    side = ("training_args", "optimizer", "scheduler", "rng_state", "adapter_model")
    found = [n for n in found if not n.startswith(side)]
    return found if len(found) == 1 else []


def check_archive(path: Path) -> None:
    """Refuse a file that is not torch's plain zip format, before anything in it is interpreted.

    Raises:
        CheckpointError: it is no zip, is compressed or encrypted, or claims more than the file holds.
    """

    def bad(why: str) -> CheckpointError:
        fix = "convert it to safetensors with the program that wrote it"
        return CheckpointError("not a pickled checkpoint that can be read", where=str(path), why=why, fix=fix)

    try:
        size = path.stat().st_size
        if not path.is_file() or not zipfile.is_zipfile(path):
            raise bad("it is not in torch's zip format (torch before 1.6 wrote another)")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as e:
        raise bad(str(e)) from e
    except OSError as e:
        raise CheckpointError("cannot read the file", where=str(path), why=e.strerror or str(e)) from e
    if len(members) > MAX_MEMBERS:
        raise bad(f"it has {len(members)} members")
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise bad("a member is compressed, so it may unpack to any size")
    if any(m.flag_bits & 1 for m in members):
        raise bad("a member is encrypted")
    if any(m.file_size != m.compress_size for m in members) or sum(m.file_size for m in members) > size:
        raise bad("its members claim to be larger than the file")
    if len({m.filename for m in members}) != len(members):
        raise bad("two members have the same name")
    if sum(m.filename.endswith("/data.pkl") for m in members) != 1:
        raise bad("it has not exactly one data.pkl")


@dataclass
class ConvertedCheckpoint(Checkpoint):
    """A checkpoint read from converted copies; ``copies``: of which of the user's files. ``temporary`` is not kept."""

    temporary: Path | None = field(default=None, kw_only=True, repr=False)
    copies: dict[Path, Path] = field(default_factory=dict, kw_only=True, repr=False)

    def file_position(self, name: str) -> tuple[str, int]:
        """By the user's files: what a copy is called depends on whether and when it was kept."""
        return f"{self.reference}/{self.copies[self.files[name]].name}", self.tensors[name].offset

    def close(self) -> None:
        super().close()
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary = None


def open_converted(sources: list[Path], folder: Path | None, reference: str, cache: Path | None) -> ConvertedCheckpoint:
    """Convert pickled weight files, each to a safetensors file of its own, and open those as one model.

    With ``cache`` the copies are kept there, keyed by path, size and time of the source; without, they live in a
    temporary folder until the checkpoint is closed.

    Raises:
        CheckpointError: a file is refused, fails to load, or a tensor is in two of them.
        ResourceError: there is no room for the copies.
    """
    for source in sources:
        check_archive(source)
    temporary = None if cache is not None else Path(tempfile.mkdtemp(prefix="mergekit_lr-"))
    checkpoint = ConvertedCheckpoint(reference, folder, None, {}, {}, (), temporary=temporary)
    try:
        config = inside(folder, "config.json") if folder is not None else None
        if config is not None and config.exists():
            checkpoint.config = read_config(config)
        for number, source in enumerate(sources):
            target = _target(source, number, cache, temporary)
            if not target.exists():
                convert([source], target, __spec__.name)
            _join(checkpoint, open_file(target, reference), source)
    except (CheckpointError, ResourceError):
        checkpoint.close()
        raise
    return checkpoint


def _target(source: Path, number: int, cache: Path | None, temporary: Path | None) -> Path:
    if cache is None:
        assert temporary is not None
        return temporary / f"{number}.safetensors"
    status = source.stat()
    key = f"{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    folder = cache / "converted"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest() + ".safetensors")


def _join(whole: ConvertedCheckpoint, part: Checkpoint, source: Path) -> None:
    for name, info in part.tensors.items():
        if name in whole.tensors:
            raise CheckpointError(f"tensor {name!r} is in two files", where=str(source))
        whole.tensors[name], whole.files[name] = info, part.files[name]
        whole.copies[part.files[name]] = source
    status = source.stat()
    # The identity of the input is that of the user's file; the copy's times change with every run.
    header = part.stamps[0].header
    stamp = Stamp(str(source.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, header)
    whole.stamps = (*whole.stamps, stamp)


def convert(sources: list[Path], target: Path, module: str, *arguments: str) -> None:
    """Run a conversion in its own process, as ``module``; the target appears whole or not at all.

    The process gets ``arguments``, the first of ``sources`` and a path to write to; the others say how much it reads.
    """
    free, source = shutil.disk_usage(target.parent).free, sources[0]
    needed = sum(s.stat().st_size for s in sources)
    if free < needed:
        raise ResourceError(
            "no room to convert pickled weights",
            where=str(target.parent),
            why=f"{needed} bytes are needed, {free} are free",
            fix="free some space, or set TMPDIR to another disk",
        )
    fd, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".unfinished")
    os.close(fd)
    command = [sys.executable, "-P", "-m", module, *arguments, str(source.resolve()), unfinished]
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
    environment = {k: os.environ[k] for k in kept if k in os.environ}
    environment["OMP_NUM_THREADS"] = "1"
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            why = lines[-1][:300] if lines else f"the process ended with status {done.returncode}"
            fix = "do not use this file, or convert it with the program that wrote it"
            raise CheckpointError("pickled weights were refused", where=str(source), why=why, fix=fix)
        Path(unfinished).replace(target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def confine(nbytes: int) -> None:
    """From here on this process can neither start programs, nor connect, nor allocate much more than ``nbytes``."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + 2 * nbytes + SPARE_ADDRESS_SPACE
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def refuse(event: str, _: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            os.write(2, f"it tried {event}\n".encode())
            os._exit(3)

    sys.addaudithook(refuse)


def _state_dict(loaded: object) -> dict[str, Tensor]:
    """The tensors by name: the object itself, or the one under ``state_dict`` or ``model``."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"it holds a {type(loaded).__name__}, not a state dict")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"entry {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor")
    return dict(loaded)


def check_tensors(tensors: dict[str, Tensor], most: int) -> None:
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"tensor {name[:80]!r} is not a plain dense one")
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"tensor {name[:80]!r} is {nbytes} bytes, more than its storage holds")
        total += nbytes
    if total > most:
        raise CheckpointError(f"its tensors overlap: {total} bytes in a file of {most // 2}")


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's bytes in order, never more than a few megabytes copied at a time."""
    if tensor.is_contiguous():
        yield tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    elif tensor.dim() > 1 and tensor.numel() > 1 << 20:
        for row in tensor:
            yield from _pieces(row)
    else:
        yield tensor.contiguous().reshape(-1).view(torch.uint8)


def write_plain(tensors: dict[str, Tensor], target: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, sorted by name, never more than a few megabytes copied at a time."""
    names = sorted(tensors)
    with target.open("wb") as f:
        f.write(plain_header({n: (tensors[n].dtype, tuple(tensors[n].shape)) for n in names}, metadata))
        for name in names:
            for piece in _pieces(tensors[name].detach()):
                f.write(piece.numpy().data)


def plain_header(
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a safetensors file whose tensors follow in the order given."""
    codes = {torch_dtype(code): code for code in ITEM_BYTES}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in described.items():
        if dtype not in codes:
            raise CheckpointError(f"tensor {name[:80]!r} has dtype {dtype}, which is not read")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


REFUSALS = (
    *(RuntimeError, ValueError, TypeError, KeyError, EOFError, MemoryError, AttributeError, IndexError),
    *(AssertionError, OSError, RecursionError, UnicodeError),
)
"""What a damaged or hostile pickle makes a loader raise, besides its own errors."""


def refused(error: BaseException) -> int:
    """Say in one line on standard error why a conversion is refused; the exit code."""
    if isinstance(error, CheckpointError):
        print(error.what, file=sys.stderr)
    else:
        print(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}", file=sys.stderr)
    return 4


def _main(source: Path, target: Path) -> int:
    import pickle

    torch.set_num_threads(1)
    torch.zeros(1).clone()
    confine(source.stat().st_size)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        tensors = _state_dict(loaded)
        check_tensors(tensors, 2 * source.stat().st_size)
        write_plain(tensors, target)
    except (CheckpointError, pickle.UnpicklingError, *REFUSALS) as e:
        return refused(e)
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
