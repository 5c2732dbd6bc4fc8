"""Opens a bundle for reading: lazily, one task or tensor at a time."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.bundle.apart import prepared
from mergekit_lr.bundle.codes import fitting, get_code
from mergekit_lr.bundle.manifest import BASE, Entry, Manifest, Recovered, read_manifest
from mergekit_lr.bundle.memory import FilePart, MemoryDesk, Part, held
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint, assemble, stamp_of
from mergekit_lr.checkpoint.model import Part as FileOfModel
from mergekit_lr.checkpoint.small_files import inside
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergekit_lr.bundle.live import Swap
    from mergekit_lr.engine.run import MergeResult


def open_bundle(path: str | Path, *, base: str | Path | None = None) -> Bundle:
    """Open a bundle folder, reading headers only.

    ``base``: where the model is that the tasks' deltas were taken from, for a bundle that does not hold it; by
    default where it was when the bundle was packed.

    Raises:
        CheckpointError: not a bundle, of a newer version, or a shard is missing or not the one that was written.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    return Bundle(folder, manifest, _open_stored(folder, manifest), base=None if base is None else str(base))


def _open_stored(folder: Path, manifest: Manifest) -> Checkpoint:
    missing = [f["file"] for f in manifest.files if not (folder / f["file"]).exists()]
    if missing:
        raise CheckpointError(
            f"shard {missing[0]!r} is missing",
            where=str(folder),
            why=f"{len(missing)} of the {len(manifest.files)} shards in bundle.json are not there",
            fix="copy the bundle again",
        )
    parts = []
    for file in manifest.files:
        path = inside(folder, file["file"])
        header = read_header(path)
        if header.digest != file["header_sha256"] or header.file_size != file["bytes"]:
            raise CheckpointError(
                f"shard {file['file']!r} is not the one that was written",
                where=str(folder),
                why="its header or size differs from what bundle.json says",
                fix="copy the bundle again",
            )
        parts.append(FileOfModel(path, header, stamp_of(path, header), None))
    stored = assemble(Checkpoint(str(folder), folder, None, {}, {}, ()), parts)
    wanted = {p for e in _every_entry(manifest) for own in e.own.values() for p in (*e.shared, *own)}
    absent = sorted(p for p in wanted if not p.startswith(BASE) and p not in stored.tensors)
    if absent:
        raise CheckpointError(f"the bundle does not hold {absent[0][:80]!r}", where=str(folder), fix="pack it again")
    return stored


def _every_entry(manifest: Manifest) -> tuple[Entry, ...]:
    return (*manifest.entries, *(manifest.adapters.entries if manifest.adapters else ()))


class Bundle:
    """An opened bundle. Holds file descriptors; close it, or use it as a context manager.

    ``tasks`` are the names of the packed models, ``manifest`` what bundle.json says, ``stored`` the bundle's own
    tensors.
    """

    def __init__(self, folder: Path, manifest: Manifest, stored: Checkpoint, *, base: str | None = None) -> None:
        self.folder, self.manifest, self.stored = folder, manifest, stored
        self._base_place = base
        self._entries = manifest.entries
        self._held: dict[str, Part] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.manifest.tasks)

    def check_task(self, task: str) -> str:
        """``task``, which must be in the bundle; the error shows the nearest names."""
        if task in self.tasks:
            return task
        near = difflib.get_close_matches(task, self.tasks, n=3, cutoff=0.5)
        fix = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(self.tasks)}"
        raise UsageError(f"the bundle has no task {task!r}", where=str(self.folder), fix=fix)

    def tensors(self, task: str) -> dict[str, Recovered]:
        """What the recovered model has, by name: dtype, shape, and what it comes from."""
        self.check_task(task)
        return {e.name: e.of(task) for e in self._entries if task in e.own}

    def adapter_tensors(self, task: str) -> dict[str, Recovered]:
        """The same for the task as a LoRA adapter; empty where it cannot be given as one."""
        self.check_task(task)
        found = self.manifest.adapters
        return {} if found is None else {e.name: e.of(task) for e in found.entries if task in e.own}

    def state_dict(self, task: str) -> StateDict:
        """The task's weights as a mapping that computes a tensor when it is asked for."""
        return StateDict(self, self.tensors(task))

    def materialize(self, task: str, out: str | Path, **options: Any) -> MergeResult:
        """Write the task's model to the folder ``out``: `mergekit_lr.recover` with the same options."""
        from mergekit_lr.bundle.recover import recover

        return recover(self.folder, task, out, base=self._base_place, **options)

    def adapter(self, task: str, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the task as a PEFT adapter to the folder ``out``.

        Raises:
            UsageError: the task is not low-rank in this bundle.
        """
        from mergekit_lr.bundle.adapters import write_adapter

        return write_adapter(self, task, Path(out), overwrite=overwrite)

    def load_into(self, module: nn.Module, task: str, *, threads: int | None = None) -> Swap:
        """Give a live torch module the task's weights, in place. See `mergekit_lr.bundle.live`."""
        from mergekit_lr.bundle.live import load_into

        return load_into(self, module, task, threads=threads)

    def hold(self, device: str = "cpu") -> Bundle:
        """Keep everything that is stored in memory on ``device`` from now on, so that swaps read no file."""
        everything: dict[str, Part] = {n: FilePart(self.stored, n) for n in self.stored.tensors}
        outside = {p for e in self.manifest.entries for p in e.shared if p.startswith(BASE)}
        everything |= {p: FilePart(self.base, p.removeprefix(BASE)) for p in outside}
        self._held = held(everything, device)
        uses = Counter(p for e in _every_entry(self.manifest) for p in {*e.shared, *chain(*e.own.values())})
        self._entries = tuple(
            e if any(uses[p] > 1 for p in e.shared) else prepared(e, self._held) for e in self.manifest.entries
        )
        return self

    def part(self, name: str) -> Part:
        """One stored tensor, or one of the base model (`BASE`)."""
        if name in self._held:
            return self._held[name]
        if name.startswith(BASE):
            return FilePart(self.base, name.removeprefix(BASE))
        return FilePart(self.stored, name)

    def decode(self, wanted: Recovered, out: Tensor) -> None:
        """Compute one tensor into ``out``, which has its shape, is contiguous and at least as wide."""
        desk = MemoryDesk([self.part(p) for p in wanted.parts], out, wanted.dtype)
        with fitting(wanted, str(self.folder)):
            get_code(wanted.code).decode(wanted, desk)

    @cached_property
    def base(self) -> Checkpoint:
        """The base model of a bundle that does not hold it, checked against what it was packed with.

        Raises:
            CheckpointError: it is not there, or it is another one.
        """
        from mergekit_lr.checkpoint.open import open_model
        from mergekit_lr.checkpoint.reference import ModelReference

        place = self._base_place or self.manifest.base["model"]
        checkpoint = open_model(ModelReference.parse(place))
        found = [[file, size, header] for file, size, _, header in checkpoint.identity()]
        if found != [list(f) for f in self.manifest.base["files"]]:
            checkpoint.close()
            raise CheckpointError(
                "this is not the base that the bundle was packed with",
                where=place,
                why="its files differ in name, size or header digest",
                fix="give the right one as base",
            )
        return checkpoint

    def close(self) -> None:
        self.stored.close()
        if "base" in self.__dict__:
            self.base.close()
        self._entries, self._held = self.manifest.entries, {}

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StateDict(Mapping[str, "Tensor"]):
    """A task's tensors by name, each computed anew when it is looked up; on the CPU unless the bundle is held."""

    def __init__(self, bundle: Bundle, tensors: Mapping[str, Recovered]) -> None:
        self._bundle, self.tensors = bundle, tensors

    def __getitem__(self, name: str) -> Tensor:
        wanted = self.tensors[name]
        out = torch.empty(wanted.shape, dtype=torch_dtype(wanted.dtype))
        with torch.inference_mode():
            self._bundle.decode(wanted, out)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
