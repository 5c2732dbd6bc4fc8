"""A desk in memory: parts read from files or from tensors that are held, the output a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lr.checkpoint.dtypes import dtype_code, torch_dtype
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

STEP = 1 << 20
"""Elements at a time: a few hundred microseconds an operation, so that threads seldom meet, and yet in cache."""


class Part(Protocol):
    """A stored tensor that elements can be taken from."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str:
        """Its safetensors code."""
        ...

    def take(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, as stored; not to be changed."""
        ...


class FilePart:
    """A tensor of a checkpoint, read when it is wanted."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.info: TensorInfo = checkpoint.tensors[name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> str:
        return self.info.dtype

    def take(self, start: int, stop: int) -> Tensor:
        return self.checkpoint.read(self.name, start, stop)


class HeldPart:
    """A tensor in memory, on any device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._flat = tensor, tensor.reshape(-1)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return dtype_code(self.tensor.dtype)

    def take(self, start: int, stop: int) -> Tensor:
        return self._flat[start:stop]


class MemoryDesk:
    """See `mergekit_lr.rewrite.Desk`. ``out`` is written; its dtype is the output's or a wider one."""

    def __init__(self, parts: Sequence[Part], out: Tensor, dtype: str, step: int = STEP) -> None:
        self.parts, self.out, self.dtype, self.step = parts, out, torch_dtype(dtype), step
        self.device = str(out.device)
        self._flat = out.view(-1)

    def shape(self, index: int) -> tuple[int, ...]:
        return self.parts[index].shape

    def read(
        self, index: int, start: int | None = None, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        part = self.parts[index]
        a, b = start or 0, math.prod(part.shape) if stop is None else stop
        found = part.take(a, b)
        if start is None and stop is None:
            found = found.view(part.shape)
        return found.to(self.out.device, torch.float32 if dtype is None else dtype)

    def room(self, index: int, start: int, stop: int) -> Tensor:
        if self.out.dtype == self.dtype:
            return self._flat[start:stop]
        return torch.empty(stop - start, dtype=self.dtype, device=self.out.device)

    def note(self, facts: Mapping[str, Any]) -> None:
        """Nobody reads them here."""

    def write(self, index: int, tensor: Tensor, start: int = 0) -> None:
        """``tensor`` is rounded to the bundle's dtype first, so that a wider ``out`` holds what a file would."""
        flat = tensor.reshape(-1)
        if flat.data_ptr() == self._flat.data_ptr() + start * self._flat.element_size():
            return  # it was computed where it belongs
        self._flat[start : start + flat.numel()].copy_(flat.to(self.dtype))


def held(parts: Mapping[str, Part], device: str) -> dict[str, Part]:
    """Every part in memory on ``device``."""
    found: dict[str, Part] = {}
    for name, part in parts.items():
        whole = part.take(0, math.prod(part.shape)).view(part.shape)
        found[name] = HeldPart(whole.to(device))
    return found
