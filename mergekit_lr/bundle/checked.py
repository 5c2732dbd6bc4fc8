"""A desk that compares what is read with the digests that bundle.json has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lr.engine.digest import ChunkDigests, combine
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch
from mergekit_lr.pieces import element_count
from mergekit_lr.rewrite import Desk

if TYPE_CHECKING:
    from torch import Tensor


class CheckedDesk:
    """Another desk's inputs and outputs. Inputs that are read once through, as they are stored, are digested.

    ``digests``: for each input the digest it must have, or None; ``dtypes``: its stored dtype; ``names`` for errors.
    """

    def __init__(
        self, desk: Desk, names: Sequence[str], dtypes: Sequence[torch.dtype], digests: Sequence[str | None], where: str
    ) -> None:
        self._desk, self._names, self._dtypes, self._where = desk, names, dtypes, where
        self._wanted = digests
        self._found = [ChunkDigests() for _ in names]
        self._next = [0] * len(names)
        self.step, self.device = desk.step, desk.device

    def shape(self, index: int) -> tuple[int, ...]:
        return self._desk.shape(index)

    def read(
        self, index: int, start: int | None = None, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        stored = self._dtypes[index]
        raw = self._desk.read(index, start, stop, dtype=stored)
        if (start or 0) == self._next[index]:
            self._found[index].update(raw.cpu().reshape(-1).view(torch.uint8).numpy().data)
            self._next[index] += raw.numel()
        return raw.to(torch.float32 if dtype is None else dtype)

    def room(self, index: int, start: int, stop: int) -> Tensor:
        return self._desk.room(index, start, stop)

    def write(self, index: int, tensor: Tensor, start: int = 0) -> None:
        self._desk.write(index, tensor, start)

    def note(self, facts: Mapping[str, Any]) -> None:
        self._desk.note(facts)

    def check(self) -> None:
        """Compare every input that was read to its end.

        Raises:
            CheckpointError: one is not what was stored.
        """
        for i, wanted in enumerate(self._wanted):
            if wanted is None or self._next[i] != element_count(self.shape(i)):
                continue
            if combine(self._found[i].finish()) != wanted:
                raise CheckpointError(
                    f"stored tensor {self._names[i]!r} is not as it was written",
                    where=self._where,
                    why="its digest differs from the one in bundle.json",
                    fix="copy or pack the bundle again",
                )
