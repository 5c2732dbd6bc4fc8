"""Masks of one bit an element, and the tensor that a masked multi-task vector gives back.

Packing: element i of the flattened, row-major tensor is bit ``i % 8``, counted from the least significant, of byte
``i // 8``; the last byte is filled up with zeros. ``ceil(n / 8)`` bytes for n elements, and n is always known from
the tensor's shape, so padding is never taken for elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from mergekit_lr import host
from mergekit_lr.bundle.codes import Code, steps
from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.lazy import torch
from mergekit_lr.rewrite import Desk

if TYPE_CHECKING:
    from torch import Tensor


def packed_bytes(elements: int) -> int:
    """Bytes that a mask of so many elements takes."""
    return -(-elements // 8)


def pack(mask: Tensor) -> Tensor:
    """``bool [n]`` to ``uint8 [ceil(n / 8)]``, little-endian bits."""
    bits = np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little")
    return torch.from_numpy(bits)


def unpack(packed: Tensor, elements: int) -> Tensor:
    """``uint8 [ceil(n / 8)]`` to ``bool [n]``."""
    bits = np.unpackbits(packed.cpu().numpy(), count=elements, bitorder="little")
    return torch.from_numpy(bits).bool()


@cache
def _table(dtype: torch.dtype, factor: float, device: str) -> Tensor:
    """All 256 bytes as 8 elements each, ``factor`` where the bit is set and zero elsewhere: ``[256, 8]``."""
    every = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (torch.from_numpy(every).to(torch.float32) * factor).to(dtype).to(device)


def spread(
    packed: Tensor, elements: int, dtype: torch.dtype, factor: float = 1.0, *, scratch: Tensor | None = None
) -> Tensor:
    """A packed mask as ``factor`` and 0 in a floating dtype (-1 and 0 for ``factor`` -1 in an integer one): ``[n]``.

    Eight elements at a time from a table that stays in a core's first cache: several times faster than unpacking
    bits and converting them. ``scratch``, of the same dtype and at least n rounded up to 8 long, is written where
    it can be: fresh memory costs more than the work.
    """
    table = _table(dtype, factor, str(packed.device))
    if host.through_numpy(packed) and dtype.itemsize == 2:
        rows = table.view(torch.int16).numpy().view(np.complex128).reshape(-1)  # a row of 8 is 16 bytes
        wide = torch.empty(8 * packed.numel(), dtype=dtype) if scratch is None else scratch[: 8 * packed.numel()]
        # "clip" writes straight into `out`; a byte is never outside the table.
        np.take(rows, packed.numpy(), out=wide.view(torch.int16).numpy().view(np.complex128), mode="clip")
        return wide[:elements]
    return torch.nn.functional.embedding(packed.int(), table).reshape(-1)[:elements]


def masked_sum(
    base: Tensor,
    vector: Tensor,
    packed: Tensor,
    factor: float = 1.0,
    *,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    r"""``base + factor * m * vector`` for a packed mask m, in the dtype of ``base`` and ``vector`` (equal).

    Computed in fp32 and rounded once. ``factor`` must be a bf16 number: then for 16-bit tensors the product is
    exact in fp32, so it does not matter whether a device fuses it with the addition.
    """
    half = base.dtype in (torch.bfloat16, torch.float16)
    wide = base.dtype if half else torch.float32
    chosen = spread(packed, base.numel(), wide, factor if half else 1.0, scratch=scratch)
    if base.dtype == torch.bfloat16:
        # One operation that widens to fp32 inside: three passes over the piece less than the literal form.
        return torch.addcmul(base, vector, chosen, out=out)
    moved = vector.to(torch.float32) * chosen.to(torch.float32)
    if not half and factor != 1.0:
        moved.mul_(factor)
    moved.add_(base.to(torch.float32))
    return moved.to(base.dtype) if out is None else out.copy_(moved)


def mask_scratch(runs: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """Room for the widest of the masks that `spread` makes of some runs of elements."""
    return torch.empty(8 * packed_bytes(max(b - a for a, b in runs)), dtype=dtype)


class Masked(Code):
    r"""``W = base + f * m * tau``: the TALL-mask reconstruction of one task.

    Parts: base, tau (both of the output's dtype), the packed mask of the task and, where a factor was fitted,
    ``fit [tasks, 2]`` of which row ``call["row"]`` holds lambda and f; f is 1 without it. Elementwise in fp32,
    cast once.
    """

    name = "masked"

    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        factor = 1.0
        if len(wanted.parts) > 3:
            factor = float(desk.read(3)[wanted.call["row"], 1])
        dtype = torch_dtype(wanted.dtype)
        runs = steps(desk, start, wanted.numel if stop is None else stop)
        scratch = mask_scratch(runs, dtype)
        for a, b in runs:
            base, vector = (desk.read(i, a, b, dtype=dtype) for i in (0, 1))
            packed = desk.read(2, a // 8, packed_bytes(b), dtype=torch.uint8)
            out = masked_sum(base, vector, packed, factor, out=desk.room(0, a, b), scratch=scratch)
            desk.write(0, out, a)
