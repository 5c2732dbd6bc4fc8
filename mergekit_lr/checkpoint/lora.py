"""A model with a LoRA adapter on it, seen as one checkpoint: every read computes W + scale * B A for its range.

Nothing is merged ahead and nothing is cached but a few factors. Products are formed in blocks of rows that are
anchored at row 0 and whose size depends on the tensor's shape alone, so that an element has the same bits whichever
range it is read in.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.adapter import (
    AdapterConfig,
    Update,
    plan_updates,
    read_config,
    tied_embedding,
)
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint, Stamp
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Elements of a row block: 1 MB in fp32, which stays in cache between product and sum."""

_KEPT_FACTORS = 8
HEAD = "lm_head.weight"


@dataclass
class AdaptedCheckpoint(Checkpoint):
    """A `Checkpoint` whose ``updates`` are applied while it is read.

    An adapted tensor reads as float32, whatever its ``tensors`` entry says: that entry keeps the base's storage
    dtype, which is what an output that keeps dtypes is written in. All other tensors read as the base stores them.
    """

    base: Checkpoint = field(kw_only=True, repr=False)
    adapter: Checkpoint = field(kw_only=True, repr=False)
    updates: dict[str, Update] = field(kw_only=True, repr=False)
    adapter_folder: Path = field(kw_only=True)
    _factors: OrderedDict[str, tuple[Tensor, Tensor]] = field(default_factory=OrderedDict, repr=False)
    _magnitudes: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Elements ``start .. stop`` of the flattened tensor: float32 where the adapter changes it.

        Raises:
            CheckpointError: a file of the base or of the adapter is shorter than its header said.
        """
        update = self.updates.get(name)
        if update is None:
            return self.base.read(name, start, stop, buffer)
        nbytes = (stop - start) * 4
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        out = buffer[:nbytes].view(torch.float32) if nbytes else torch.empty(0)
        if update.a is None:
            self._start(update, start, stop, out)
        elif start < stop:
            self._product(name, update, start, stop, out)
        if update.added is not None:
            out += self._vector(update.added)[start:stop].mul_(update.scale)
        return out

    def reads(self, name: str) -> tuple[Path, ...]:
        """The base's file and, where the update starts from another tensor, that one's."""
        update = self.updates.get(name)
        start = None if update is None else update.start
        return (self.files[name],) if start is None else (self.files[name], *self.base.reads(start))

    def _start(self, update: Update, start: int, stop: int, out: Tensor) -> None:
        """What the update starts from, in fp32."""
        if update.replaced is not None:
            out.copy_(self.adapter.read(update.replaced, start, stop))
        else:
            assert update.start is not None
            out.copy_(self.base.read(update.start, start, stop))

    def _product(self, name: str, update: Update, start: int, stop: int, out: Tensor) -> None:
        rows, columns = self.tensors[name].shape
        left, right = self._pair(update)
        step = block_rows(columns)
        for top in range(start // columns // step * step, rows, step):
            bottom = min(top + step, rows)
            first, last = max(start, top * columns), min(stop, bottom * columns)
            if first >= last:
                break
            # One operation at a time: a fused multiply-add could round a vector's tail differently.
            change = _matmul(left[top:bottom], right).mul_(update.scale)
            target = out[first - start : last - start]
            if update.magnitude is None:
                self._start(update, first, last, target)
                target += change.view(-1)[first - top * columns : last - top * columns]
                continue
            whole = torch.empty((bottom - top) * columns)
            self._start(update, top * columns, bottom * columns, whole)
            value = whole.view(-1, columns).add_(change)
            self._rescale(name, update, value, top, bottom)
            target.copy_(value.view(-1)[first - top * columns : last - top * columns])

    def _rescale(self, name: str, update: Update, value: Tensor, top: int, bottom: int) -> None:
        """DoRA: give each row (or column) of ``value``, V = W + scale B A, the norm that its magnitude says."""
        assert update.magnitude is not None
        if update.by_column:
            value.mul_(self._column_factors(name, update))
            return
        magnitude = self._vector(update.magnitude)[top:bottom]
        norms = value.double().square_().sum(1).sqrt_().float()
        value.mul_((magnitude / norms)[:, None])

    def _column_factors(self, name: str, update: Update) -> Tensor:
        """magnitude / ||V||_column, one pass over the tensor the first time it is asked for."""
        with self._lock:
            if name not in self._magnitudes:
                assert update.magnitude is not None
                rows, columns = self.tensors[name].shape
                left, right = self._load_pair(update)
                step = block_rows(columns)
                squares = torch.zeros(columns, dtype=torch.float64)
                for top in range(0, rows, step):
                    bottom = min(top + step, rows)
                    change = _matmul(left[top:bottom], right).mul_(update.scale)
                    whole = torch.empty((bottom - top) * columns)
                    self._start(update, top * columns, bottom * columns, whole)
                    squares += whole.view(-1, columns).add_(change).double().square_().sum(0)
                self._magnitudes[name] = self._vector(update.magnitude) / squares.sqrt_().float()
            return self._magnitudes[name]

    def _vector(self, name: str) -> Tensor:
        return self.adapter.read(name, 0, self.adapter.tensors[name].numel).float()

    def _pair(self, update: Update) -> tuple[Tensor, Tensor]:
        """Left (rows x rank) and right (rank x columns) factor in fp32; the last few are kept."""
        assert update.a is not None
        with self._lock:
            pair = self._factors.pop(update.a, None) or self._load_pair(update)
            self._factors[update.a] = pair
            while len(self._factors) > _KEPT_FACTORS:
                self._factors.popitem(last=False)
            return pair

    def _load_pair(self, update: Update) -> tuple[Tensor, Tensor]:
        assert update.a is not None and update.b is not None
        a, b = (self._vector(n).view(self.adapter.tensors[n].shape) for n in (update.a, update.b))
        return (a.T.contiguous(), b.T.contiguous()) if update.transposed else (b.contiguous(), a.contiguous())

    @property
    def bytes_held(self) -> int:
        """What a process holds for the adapter at most: the factors that are kept, those being loaded, two blocks.

        Twice the factors: they come and go in several sizes, and the allocator keeps the holes between them.
        """
        sizes = [self.adapter.tensors[n] for u in self.updates.values() if u.a and u.b for n in (u.a, u.b)]
        pairs = sorted((4 * (a.numel + b.numel) for a, b in zip(sizes[::2], sizes[1::2], strict=True)), reverse=True)
        return 2 * (sum(pairs[:_KEPT_FACTORS]) + max(pairs, default=0)) + 2 * 4 * BLOCK_ELEMENTS

    def file_position(self, name: str) -> tuple[str, int]:
        """Sort key that follows the bytes on disk."""
        update = self.updates.get(name)
        if update is not None and update.replaced is not None:
            return self.adapter.file_position(update.replaced)
        return self.base.file_position(update.start if update is not None and update.start else name)

    def identity(self) -> list[list[Any]]:
        """The base's, which may be no file, then the adapter's."""
        own = self.stamps[len(self.base.stamps) :]
        return self.base.identity() + [[Path(s.path).name, s.size, s.mtime_ns, s.header] for s in own]

    def places(self) -> list[Path]:
        return [*super().places(), self.adapter_folder]

    @property
    def beneath(self) -> tuple[Checkpoint, ...]:
        return (self.base, self.adapter)

    def close(self) -> None:
        self._factors.clear()
        self.base.close()
        self.adapter.close()


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` on one thread, as a merge runs it anyway: on some processors MKL's bits depend on the number."""
    threads = torch.get_num_threads()
    if threads == 1:
        return torch.mm(left, right)
    torch.set_num_threads(1)
    try:
        return torch.mm(left, right)
    finally:
        torch.set_num_threads(threads)


def block_rows(columns: int) -> int:
    """Rows of a block: a function of the tensor's width alone."""
    return max(8, BLOCK_ELEMENTS // max(columns, 1))


def adapt(base: Checkpoint, adapter: Checkpoint, folder: Path, reference: str) -> AdaptedCheckpoint:
    """``base`` with the adapter in ``folder`` on it, whose tensors are open as ``adapter``.

    A base that ties its output head to its input embedding, and an adapter that changes only one of the two, give
    an untied model: that is what was trained. It then has an ``lm_head.weight`` of its own, and its config says so.

    Raises:
        CheckpointError: an adapter tensor has no place in the base, does not fit, or a setting is not supported.
    """
    config = read_config(folder)
    updates = plan_updates(base, adapter, config)
    warnings = [*base.warnings, *adapter.warnings]
    model_config = _untie(base, adapter, config, updates, warnings)
    tensors, files = dict(base.tensors), dict(base.files)
    for name, update in updates.items():
        info = _described(name, update, base, adapter)
        if update.replaced is not None:
            model_config = _resized(name, info, base, model_config, warnings)
            files[name] = adapter.files[update.replaced]
        elif name not in files:
            assert update.start is not None
            files[name] = base.files[update.start]
        tensors[name] = info
    return AdaptedCheckpoint(
        reference,
        base.folder,
        model_config,
        tensors,
        files,
        (*base.stamps, *adapter.stamps, _config_stamp(folder / "adapter_config.json")),
        warnings,
        base.revision,
        base=base,
        adapter=adapter,
        updates=updates,
        adapter_folder=folder,
    )


def _described(name: str, update: Update, base: Checkpoint, adapter: Checkpoint) -> TensorInfo:
    """The adapted tensor: shape as it will be read, dtype as the base stores it."""
    source = adapter.tensors[update.replaced] if update.replaced else base.tensors[update.start or name]
    like = base.tensors.get(name) or base.tensors.get(update.start or "") or source
    numel = source.numel
    return TensorInfo(name, like.dtype, source.shape, source.offset, numel * ITEM_BYTES[like.dtype])


def _untie(
    base: Checkpoint,
    adapter: Checkpoint,
    config: AdapterConfig,
    updates: dict[str, Update],
    warnings: list[str],
) -> dict[str, Any] | None:
    embedding = tied_embedding(base)
    heads = [n for n in updates if n not in base.tensors]
    if embedding is None or (embedding not in updates and not heads):
        return base.config
    changed = updates.get(embedding)
    if heads and changed is not None and _same_replacement(adapter, updates[heads[0]], changed):
        del updates[heads[0]]
        return base.config
    if heads and changed is not None and config.ties_embeddings and changed.a and updates[heads[0]].a:
        del updates[heads[0]]  # PEFT ties the head's factors to the embedding's: they are one pair
        return base.config
    if not heads:
        resized = changed is not None and changed.replaced is not None
        resized = resized and adapter.tensors[changed.replaced].shape != base.tensors[embedding].shape  # type: ignore[union-attr,index]
        if config.ties_embeddings or resized:
            return base.config
        updates[HEAD] = Update(start=embedding)
    warnings.append(
        f"{adapter.reference}: the adapter changes only one of the tied {embedding!r} and output head, "
        "so the adapted model is untied"
    )
    return {**(base.config or {}), "tie_word_embeddings": False}


def _same_replacement(adapter: Checkpoint, first: Update, second: Update) -> bool:
    if first.replaced is None or second.replaced is None or first.a is not None or second.a is not None:
        return False
    one, two = adapter.tensors[first.replaced], adapter.tensors[second.replaced]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    step = 1 << 22
    return all(
        torch.equal(
            adapter.read(first.replaced, i, min(i + step, one.numel)),
            adapter.read(second.replaced, i, min(i + step, one.numel)),
        )
        for i in range(0, one.numel, step)
    )


def _resized(
    name: str, info: TensorInfo, base: Checkpoint, config: dict[str, Any] | None, warnings: list[str]
) -> dict[str, Any] | None:
    """Config for a replaced tensor: a vocabulary may have grown; nothing else may change its shape."""
    old = base.tensors.get(name)
    if old is None or old.shape == info.shape:
        return config
    grown = len(old.shape) == 2 and old.shape[1:] == info.shape[1:]
    if not grown or config is None or config.get("vocab_size") not in (old.shape[0], info.shape[0]):
        raise CheckpointError(
            f"the adapter replaces {name!r} {list(old.shape)} by another shape {list(info.shape)}",
            where=base.reference,
            fix="use the base model that the adapter was trained on",
        )
    if config["vocab_size"] != info.shape[0]:
        warnings.append(
            f"{base.reference}: the adapter resizes the vocabulary from {old.shape[0]} to {info.shape[0]} rows"
        )
    return {**config, "vocab_size": info.shape[0]}


def _config_stamp(path: Path) -> Stamp:
    status = path.stat()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Stamp(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, digest)
