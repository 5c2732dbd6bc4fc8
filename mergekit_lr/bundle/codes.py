"""How a task's tensor comes from stored ones: one `Code` for each way, found by the name that bundle.json gives.

A code sees no files. It gets a `mergekit_lr.rewrite.Desk`: the tensor's parts to read by number, one output (0) to
write, and how many elements it may hold of each at a time. The engine gives it one that reads and writes shards,
`open_bundle` one that works in memory.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.errors import CheckpointError
from mergekit_lr.rewrite import Desk


class Code(ABC):
    """One way to give a tensor back. ``whole``: it must hold its tensor whole; otherwise it keeps to ``desk.step``."""

    name: ClassVar[str]
    whole: ClassVar[bool] = False

    @abstractmethod
    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        """Write elements ``start .. stop`` of output 0: all of them where the code is `whole`.

        ``start`` is a multiple of 65,536.
        """

    def fixed(self, wanted: Recovered) -> int:
        """Bytes held beside 4 fp32 pieces of ``desk.step`` elements: for what must be whole."""
        return 20 * wanted.numel if self.whole else 0


class Copy(Code):
    """``out = part 0``: a tensor that is stored as it is, for one task or for all."""

    name = "copy"

    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        for a, b in steps(desk, start, wanted.numel if stop is None else stop):
            desk.write(0, desk.read(0, a, b, dtype=torch_dtype(wanted.dtype)), a)


@contextmanager
def fitting(wanted: Recovered, where: str) -> Iterator[None]:
    """Decoding what bundle.json describes: numbers of it that its tensors do not bear out become a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError) as e:
        raise CheckpointError(
            f"what bundle.json says of {wanted.name!r} does not fit what is stored",
            where=where,
            why=f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0][:200]}",
            fix="pack or copy the bundle again",
        ) from e


def steps(desk: Desk, start: int, stop: int) -> list[tuple[int, int]]:
    """Consecutive runs of at most ``desk.step`` elements; one empty run for an empty tensor."""
    return [(a, min(stop, a + desk.step)) for a in range(start, stop, desk.step)] or [(start, start)]


CODES = {
    "apart": "mergekit_lr.bundle.apart:Apart",
    "copy": "mergekit_lr.bundle.codes:Copy",
    "factor": "mergekit_lr.lowrank.codes:Factor",
    "low_rank": "mergekit_lr.lowrank.codes:LowRank",
    "masked": "mergekit_lr.bundle.masks:Masked",
    "offsets": "mergekit_lr.bundle.quantized:Offsets",
    "select": "mergekit_lr.bundle.two_values:Select",
}
"""Where each code lives. A new one is a line here and a class there."""


@cache
def get_code(name: str) -> Code:
    """The code called ``name``.

    Raises:
        CheckpointError: there is none, so the bundle is of a newer kind.
    """
    home = CODES.get(name)
    if home is None:
        raise CheckpointError(
            f"the bundle uses the code {name[:60]!r}", why="this mergekit_lr does not know it", fix="update mergekit_lr"
        )
    module, _, attribute = home.partition(":")
    found = getattr(importlib.import_module(module), attribute)()
    assert isinstance(found, Code)
    return found
