"""Test matrices for randomised iterations: +-1 entries from a counter, not from a stream."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mergekit_lr.philox import philox_words

_BITS = 32  # signs taken from one 64-bit word: its low half, where shifts of signed integers agree


def rademacher(
    rows: int,
    columns: int,
    *,
    seed: int = 0,
    name: str = "",
    purpose: str = "range",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Matrix of independent signs, ``[rows, columns]``, each +1 or -1 with probability 1/2.

    Entry ``(i, j)`` is a bit of Philox4x64-10 (Salmon et al., SC 2011) at a counter that depends on
    ``i * columns + j`` alone, under a key hashed from ``(seed, name, purpose)``. So the matrix does not depend
    on batches, threads or the order of tensors; it is the same to the bit on CPU and GPU, and exact in
    every floating dtype.

    Args:
        seed: the run's seed.
        name: the tensor's name, so that no two tensors share a test matrix.
        purpose: what the matrix is for; range finding and certificates must be independent.
    """
    text = "\0".join(("rademacher", str(seed), name, purpose))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    count = rows * columns
    words = philox_words(key, 1, -(-count // (4 * _BITS)), device).reshape(-1, 1)
    shifts = torch.arange(_BITS, dtype=torch.int64, device=device)
    bits = ((words >> shifts) & 1).reshape(-1)[:count]
    return (2 * bits - 1).to(dtype).reshape(rows, columns)
