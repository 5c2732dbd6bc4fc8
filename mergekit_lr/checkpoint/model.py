"""Opens a model on disk: headers only, the index as the one authority, nothing followed out of its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.header import Header, TensorInfo, read_header
from mergekit_lr.checkpoint.small_files import inside, read_config, read_json
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.(safetensors|bin)")
HUB = "hf://"
"""How the path of a file begins that is on the Hub only."""


@dataclass(frozen=True)
class Stamp:
    """Identity of an input file when it was opened: if any of it changes, the run's inputs changed."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    header: str

    @property
    def identity(self) -> list[Any]:
        if self.path.startswith(HUB) or Path(self.path).parent.name == "blobs":
            return ["", self.size, 0, self.header]
        return [Path(self.path).name, self.size, self.mtime_ns, self.header]

    def still_holds(self) -> bool:
        try:
            s = Path(self.path).stat()
        except OSError:
            return False
        return (s.st_size, s.st_mtime_ns, s.st_ino) == (self.size, self.mtime_ns, self.inode)


@dataclass
class Checkpoint:
    """A model opened for reading. Holds file descriptors; close it, or use it as a context manager.

    ``reference`` is what the recipe says, ``folder`` the model folder (None for a single file), ``config``
    its parsed config.json (None where there is none), ``tensors`` every tensor by name in file order,
    ``revision`` the commit that a Hub model was taken at. ``stage`` is the plan of the stage that makes it, where one
    does, and ``made_by`` the digest of the run that did: its bytes then say more than its files' times.
    """

    reference: str
    folder: Path | None
    config: dict[str, Any] | None
    tensors: dict[str, TensorInfo]
    files: dict[str, Path] = field(repr=False)
    stamps: tuple[Stamp, ...] = field(repr=False)
    warnings: list[str] = field(default_factory=list)
    revision: str | None = None
    made_by: str | None = None
    stage: Any = field(default=None, repr=False)
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False)
    _opening: Lock = field(default_factory=Lock, repr=False)

    def file_position(self, name: str) -> tuple[str, int]:
        """Sort key that follows the bytes on disk; where the files lie, in a cache or beside the output, has no say."""
        return f"{self.reference}/{self.files[name].name}", self.tensors[name].offset

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Elements ``start .. stop`` of the flattened tensor, 1-D, in the stored dtype.

        ``buffer`` is uint8 scratch that the result may alias; without one, fresh memory is used.

        Raises:
            CheckpointError: the file is shorter than its header said.
        """
        info = self.tensors[name]
        dtype = torch_dtype(info.dtype)
        item = dtype.itemsize
        nbytes = (stop - start) * item
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        raw = buffer[:nbytes]
        self._read_into(name, memoryview(raw.numpy().data), info.offset + start * item)
        return raw.view(dtype) if nbytes else raw.new_empty(0, dtype=dtype)

    def _read_into(self, name: str, view: memoryview, offset: int) -> None:
        path = self.files[name]
        fd = self._descriptor(path)
        done = 0
        while done < len(view):
            try:
                fs.reading("read", path)
                got = os.preadv(fd, [view[done:]], offset + done)
            except OSError as e:
                raise CheckpointError(f"cannot read tensor {name!r}", where=str(path), why=e.strerror or str(e)) from e
            if got == 0:
                raise CheckpointError(
                    f"the file ended inside tensor {name!r}",
                    where=str(path),
                    why="it was truncated or replaced during the run",
                    fix="restore the file and run again",
                )
            done += got

    def _descriptor(self, path: Path) -> int:
        fd = self._descriptors.get(path)
        if fd is not None:
            return fd
        with self._opening:
            if path not in self._descriptors:
                try:
                    fs.reading("open", path)
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as e:
                    why = e.strerror or str(e)
                    raise CheckpointError("cannot open the file", where=str(path), why=why) from e
            return self._descriptors[path]

    @property
    def beneath(self) -> tuple[Checkpoint, ...]:
        """The models that this one is a view of."""
        return ()

    def reads(self, name: str) -> tuple[Path, ...]:
        """Every file that reading a tensor may touch."""
        return (self.files[name],)

    def changed(self) -> list[str]:
        """Input files that are not what they were when they were opened: by size, time, inode and header."""
        theirs = {stamp for inner in self.beneath for stamp in inner.stamps}
        headers = {str(p.resolve()): p for p in set(self.files.values())}
        own = [
            s.path
            for s in self.stamps
            if s not in theirs and not (s.still_holds() and _same_header(headers.get(s.path), s.header))
        ]
        return list(dict.fromkeys([*own, *(path for inner in self.beneath for path in inner.changed())]))

    def identity(self) -> list[list[Any]]:
        """What decides whether a later run reads the same bytes: names, sizes, times and header digests.

        A file of the Hub is the same wherever it was put and whenever.
        """
        if self.made_by is not None:
            return [[Path(s.path).name, s.size, 0, self.made_by] for s in self.stamps]
        return [s.identity for s in self.stamps]

    def places(self) -> list[Path]:
        """Folders and files that it is read from, as far as an output must not be one of them."""
        own = [] if self.folder is None else [self.folder]
        found = [*own, *(Path(s.path) for s in self.stamps), *(p for inner in self.beneath for p in inner.places())]
        return list(dict.fromkeys(found))

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _same_header(path: Path | None, digest: str) -> bool:
    """Whether a safetensors file still has the header that it was opened with; other files are not looked into."""
    try:
        return path is None or read_header(path).digest == digest
    except CheckpointError as e:
        if isinstance(e.__cause__, OSError):
            raise  # it cannot be read: that is another thing than a change
        return False


AnyCheckpoint = TypeVar("AnyCheckpoint", bound=Checkpoint)


def open_folder(folder: Path, reference: str) -> Checkpoint:
    """Open a Hugging Face folder, or a folder that holds only safetensors."""
    config_path = inside(folder, "config.json")
    config = read_config(config_path) if config_path.exists() else None
    index = inside(folder, "model.safetensors.index.json")
    single = folder / "model.safetensors"
    if index.exists():
        chosen = _indexed(folder, index)
    elif single.exists():
        chosen = {"model.safetensors": None}
    else:
        found = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
        if not found:
            raise _no_weights(folder)
        chosen = dict.fromkeys(found)
    return _assemble(reference, folder, config, {n: inside(folder, n) for n in chosen}, chosen)


def open_file(path: Path, reference: str) -> Checkpoint:
    """Open one safetensors file as a raw state dict: no config, no tokenizer."""
    return _assemble(reference, None, None, {path.name: path}, {path.name: None})


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled:
        return CheckpointError(
            "holds no safetensors",
            where=str(folder),
            why=f"its weights are pickled ({pickled[0]}), and a pickle can run code",
            fix="convert it to safetensors, or allow pickle for this run",
        )
    fix = "point to a folder with .safetensors files"
    return CheckpointError("holds no weights", where=str(folder), fix=fix)


def read_weight_map(index: Path, suffix: str = "safetensors") -> dict[str, set[str]]:
    """The index of a sharded model: shard file -> names of the tensors it places there.

    Raises:
        CheckpointError: it is no index, or a shard is not a plain file name ending in ``suffix``.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=str(index), fix="download the file again")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in shards:
            shards[shard].add(name)
            continue
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard) or not shard.endswith("." + suffix):
            raise CheckpointError(
                f"the index places tensor {name[:80]!r} in {str(shard)[:80]!r}",
                where=str(index),
                why=f"a shard must be a plain .{suffix} file name",
                fix="do not use this checkpoint, or mend its index",
            )
        shards[shard] = {name}
    return shards


def _indexed(folder: Path, index: Path) -> dict[str, set[str] | None]:
    shards = read_weight_map(index)
    missing = [s for s in shards if not (folder / s).exists()]
    if missing:
        raise CheckpointError(
            f"shard {missing[0]!r} is missing",
            where=str(folder),
            why=f"{len(missing)} of the {len(shards)} shards in the index are not there",
            fix="download the checkpoint again",
        )
    return {**shards}


def _assemble(
    reference: str,
    folder: Path | None,
    config: dict[str, Any] | None,
    paths: dict[str, Path],
    chosen: dict[str, set[str] | None],
) -> Checkpoint:
    parts = []
    for shard in sorted(paths):
        header = read_header(paths[shard])
        parts.append(Part(paths[shard], header, stamp_of(paths[shard], header), chosen[shard]))
    return assemble(Checkpoint(reference, folder, config, {}, {}, ()), parts)


class Part(NamedTuple):
    """One file of a model: where it is, its header, its identity, and the names that the index places in it."""

    path: Path
    header: Header
    stamp: Stamp
    wanted: set[str] | None


def assemble(checkpoint: AnyCheckpoint, parts: Iterable[Part]) -> AnyCheckpoint:
    """Fill an empty checkpoint with the tensors of its files.

    Raises:
        CheckpointError: a file lacks a tensor that the index places in it, or two files hold the same one.
    """
    for path, header, stamp, wanted in parts:
        checkpoint.stamps = (*checkpoint.stamps, stamp)
        absent = sorted((wanted or set()) - set(header.tensors))
        if absent:
            raise CheckpointError(
                f"tensor {absent[0]!r} is not in the shard that the index names",
                where=str(path),
                why=f"{len(absent)} such tensors",
                fix="download the checkpoint again",
            )
        extra = set(header.tensors) - wanted if wanted is not None else set()
        if extra:
            checkpoint.warnings.append(f"{path.name}: {len(extra)} tensors that the index does not list are ignored")
        for name, info in header.tensors.items():
            if name in extra:
                continue
            if name in checkpoint.tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in two files",
                    where=str(checkpoint.folder or path),
                    why=f"{checkpoint.files[name].name} and {path.name}, and no index says which one counts",
                    fix="remove the stray file",
                )
            checkpoint.tensors[name], checkpoint.files[name] = info, path
    return checkpoint


def stamp_of(path: Path, header: Header) -> Stamp:
    s = path.stat()
    if s.st_size != header.file_size:
        raise CheckpointError("the file changed while it was opened", where=str(path), fix="run again")
    return Stamp(str(path.resolve()), s.st_size, s.st_mtime_ns, s.st_ino, header.digest)
