"""Numbers of one to eight bits, packed without waste.

Element i of the flattened, row-major tensor takes the bits ``b i .. b i + b - 1`` of the stream, lowest bit first;
bit j of the stream is bit ``j % 8``, counted from the least significant, of byte ``j // 8``. The last byte is filled up
with zeros. With one bit that is a mask (`mergekit_lr.bundle.masks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
