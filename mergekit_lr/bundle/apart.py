"""Two values an entry as one of them and how far apart the two are in bits: what a held bundle swaps fastest.

Read as integers of its width, a weight is ``low + bit * apart`` modulo ``2^width``: one operation that is exact
whatever the weights are, where a choice between two values takes three and a sum in fp32 has to widen and round. Only
in memory: a bundle on disk keeps base and vector, which say more.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_lr.bundle.codes import Code, steps
from mergekit_lr.bundle.manifest import Entry, Recovered
from mergekit_lr.bundle.masks import masked_sum, packed_bytes, spread
from mergekit_lr.bundle.memory import STEP, HeldPart, Part
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.lazy import torch
from mergekit_lr.rewrite import Desk

if TYPE_CHECKING:
    from torch import Tensor


class Apart(Code):
    """``W = low + bit * apart`` on integers that wrap around. Parts: low, apart, the task's mask."""

    name = "apart"

    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        dtype = torch_dtype(wanted.dtype)
        kind = bits_of(dtype)
        for a, b in steps(desk, start, wanted.numel if stop is None else stop):
            low, apart = (desk.read(i, a, b, dtype=dtype).view(kind) for i in (0, 1))
            packed = desk.read(2, a // 8, packed_bytes(b), dtype=torch.uint8)
            out = desk.room(0, a, b)
            whole = out.view(kind)
            # The bits go where the weights will be: fresh memory costs more than the work.
            bits = spread(packed, b - a, kind, scratch=None if (b - a) % 8 else whole)
            torch.addcmul(low, apart, bits, out=whole)
            desk.write(0, out, a)


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype of the same width."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def prepared(entry: Entry, parts: MutableMapping[str, Part]) -> Entry:
    """An entry that swaps faster as one of `Apart`, whose parts then take the place of its two shared ones.

    Any other is given back as it is. ``parts`` are in memory, and the shared ones no other entry's.
    """
    values = VALUES.get(entry.code)
    if values is None or any(len(own) > 1 for own in entry.own.values()):  # beside the mask, a factor of its own
        return entry
    one, two = (parts.pop(p).take(0, entry.numel) for p in entry.shared)
    kind = bits_of(one.dtype)
    low, apart = torch.empty_like(one), torch.empty_like(two)
    for a in range(0, entry.numel, STEP):
        span = slice(a, a + STEP)
        low[span], high = values(one[span], two[span])
        torch.sub(high.view(kind), low[span].view(kind), out=apart[span].view(kind))
    names = tuple(f"{what}:{entry.shared[0]}" for what in ("low", "apart"))
    parts.update({n: HeldPart(x.view(entry.shape)) for n, x in zip(names, (low, apart), strict=True)})
    return replace(entry, code=Apart.name, shared=names)


def _masked(base: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """What `masked_sum` gives where the bit is not set (-0 becomes 0 there) and where it is."""
    packed = torch.zeros(packed_bytes(base.numel()), dtype=torch.uint8, device=base.device)
    return masked_sum(base, vector, packed), masked_sum(base, vector, torch.full_like(packed, 255))


VALUES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "masked": _masked,
    "select": lambda low, high: (low, high),
}
"""By code, what an element is where its bit is not set and where it is, from its two shared parts, ``[n]`` each."""
