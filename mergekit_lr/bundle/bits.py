"""Numbers of one to eight bits, packed without waste.

Element i of the flattened, row-major tensor takes the bits ``b i .. b i + b - 1`` of the stream, lowest bit first;
bit j of the stream is bit ``j % 8``, counted from the least significant, of byte ``j // 8``. The last byte is filled up
with zeros. With one bit that is a mask (`mergekit_lr.bundle.masks`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergekit_lr import host
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def stream_bytes(elements: int, bits: int) -> int:
    """``ceil(bits * elements / 8)``."""
    return -(-elements * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``uint8 [n]``, each below ``2 ** bits``, to ``uint8 [ceil(bits n / 8)]``."""
    flat = codes.reshape(-1).cpu().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    every = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(every, bitorder="little"))


def unpack_codes(packed: Tensor, elements: int, bits: int) -> Tensor:
    """The inverse: ``uint8 [ceil(bits n / 8)]`` to integers ``[n]``, on the device of ``packed``.

    Eight numbers are ``bits`` whole bytes: one 64-bit word, out of which they are shifted.
    """
    if bits == 8:
        return packed[:elements]
    words = -(-elements // 8)
    whole = torch.nn.functional.pad(packed, (0, words * bits - packed.numel())).view(words, bits)
    word = whole[:, 0].to(torch.int64)
    for k in range(1, bits):
        word |= whole[:, k].to(torch.int64) << 8 * k
    found = torch.empty((words, 8), dtype=torch.uint8, device=packed.device)
    for k in range(8):
        found[:, k] = (word >> bits * k) & (1 << bits) - 1
    return found.view(-1)[:elements]


def levels_of(packed: Tensor, elements: int, bits: int, zero: float) -> Tensor:
    """``code - zero`` of every element, ``bf16 [n]``: exact for the zeros of `mergekit_lr.bundle.quantized`.

    On a CPU two to eight at a time, from a table that stays in a core's first caches: several times faster than
    shifting each out of its bytes and converting it.
    """
    if bits == 8 or not host.through_numpy(packed):
        return unpack_codes(packed, elements, bits).to(torch.float32).sub_(zero).to(torch.bfloat16)
    rows, several = _table(bits, zero)
    if 8 % bits == 0:
        places: npt.NDArray[Any] = packed.numpy()
    else:
        words = -(-elements // 8)
        room = np.zeros(words * bits + 8, np.uint8)  # words are read eight bytes wide
        room[: packed.numel()] = packed.numpy()
        word = np.ndarray((words,), "<u8", room, strides=(bits,)).copy()
        places = np.empty((words, 8 // several), np.uint16)
        for k in range(8 // several):
            places[:, k] = (word >> np.uint64(k * several * bits)) & np.uint64((1 << several * bits) - 1)
    out = torch.empty(places.size * several, dtype=torch.bfloat16)
    # "clip" writes straight into `out`; a place is never outside the table.
    np.take(rows, places.reshape(-1), out=out.view(torch.int16).numpy().view(rows.dtype), mode="clip")
    return out[:elements]


@cache
def _table(bits: int, zero: float) -> tuple[npt.NDArray[Any], int]:
    """Every run of codes that a place of 8 to 14 bits can hold, as levels in bf16, one row a number; and how many."""
    several = {1: 8, 2: 4, 3: 4}.get(bits, 2)
    every = torch.arange(1 << bits * several)[:, None] >> bits * torch.arange(several) & (1 << bits) - 1
    levels = (every.to(torch.float32) - zero).to(torch.bfloat16).contiguous()
    wide = {4: np.int32, 8: np.int64, 16: np.complex128}[2 * several]
    return levels.view(torch.int16).numpy().view(wide).reshape(-1), several
