"""Random masks from a counter, not from a stream.

Element ``e`` of a mask is decided by 16 bits of Philox4x64-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) at counter ``1 + e // 16``, under a key hashed from the seed, the model and the
tensor's name. So a mask does not depend on the order of tensors, on slices or on threads, and CPU and GPU
agree to the bit. Probabilities are therefore multiples of 2^-16; `effective_probability` says which one is
used.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergekit_lr import host
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 65_536
DRAWS = 16  # 16-bit draws in one counter's 4 x 64 bits
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def level(p: float) -> int:
    """How many of 65536 equally likely draws keep an entry with probability ``p`` (at least 1 if p > 0)."""
    if p <= 0:
        return 0
    return max(1, min(LEVELS, round(p * LEVELS)))


def effective_probability(p: float) -> float:
    """The multiple of 1/65536 nearest to ``p`` (never 0 for a positive p)."""
    return level(p) / LEVELS


def _bits(key: int, start: int, count: int) -> npt.NDArray[np.uint16]:
    first, skip = divmod(start, DRAWS)
    blocks = -(-(skip + count) // DRAWS)
    words = _generator(key, first).random_raw(4 * blocks)
    return words.astype("<u8", copy=False).view(np.dtype("<u2"))[skip : skip + count]


_local = threading.local()


def _generator(key: int, counter: int) -> np.random.Philox:
    """numpy's generator at this place. One for each thread is set anew: making one costs ten times as much."""
    kept: tuple[np.random.Philox, Any] | None = getattr(_local, "kept", None)
    if kept is None:
        made = np.random.Philox(key=0)
        kept = _local.kept = made, made.state  # a state in which nothing is buffered
    found, state = kept
    state["state"]["key"][:] = key & _MASK64, key >> 64
    state["state"]["counter"][:] = counter & _MASK64, counter >> 64, 0, 0
    found.state = state
    return found


def draws(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """16-bit draws for elements ``start .. start + count``: int32 ``[count]`` in 0..65535.

    Args:
        key: 128 bits, see `Call.philox_key`.
    """
    if host.through_numpy(device):
        return torch.from_numpy(_bits(key, start, count).astype(np.int32))
    first, skip = divmod(start, DRAWS)
    blocks = -(-(skip + count) // DRAWS)
    words = philox_words(key, first + 1, blocks, device)
    parts = [(words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    return torch.stack(parts, dim=-1).reshape(-1)[skip : skip + count].to(torch.int32)


def below(draw: Tensor, levels: Tensor) -> Tensor:
    """1 where a draw lies below its level, so keeps its entry, else 0: fp32, the shape of both int32 tensors."""
    if not host.through_numpy(draw):
        return (draw < levels).to(torch.float32)
    return torch.from_numpy((draw.numpy() < levels.numpy()).astype(np.float32))


def masked(x: Tensor, key: int, start: int, probability: float) -> Tensor:
    """``x`` where its draw keeps it, else zero; P(keep) = `effective_probability`.

    A new tensor, shape and dtype of ``x`` (fp32). What is not finite stays so, kept or not.
    """
    keep_below = level(probability)
    if keep_below >= LEVELS:
        return x.clone()
    if not host.through_numpy(x):
        return x * (draws(key, start, x.numel(), x.device) < keep_below).reshape(x.shape)
    # The CPU path through numpy is four times faster: torch compares and converts booleans slowly.
    keep = (_bits(key, start, x.numel()) < keep_below).astype(np.float32)
    return torch.from_numpy(keep.reshape(x.shape)).mul_(x)


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the unsigned product a * m, with int64 tensors holding unsigned bits."""
    a_lo, a_hi = a & _MASK32, (a >> 32) & _MASK32
    m_lo, m_hi = m & _MASK32, m >> 32
    low_low = a_lo * m_lo  # each 32x32 product wraps to the right 64 bits
    mid = a_hi * m_lo + ((low_low >> 32) & _MASK32)
    carry = (mid >> 32) & _MASK32
    mid = (mid & _MASK32) + a_lo * m_hi
    high = a_hi * m_hi + carry + ((mid >> 32) & _MASK32)
    return high, (mid << 32) | (low_low & _MASK32)


def _signed(word: int) -> int:
    word &= _MASK64
    return word - (1 << 64) if word >> 63 else word


def philox_words(key: int, counter: int, blocks: int, device: torch.device | str) -> Tensor:
    """Philox4x64-10 in torch: int64 ``[blocks, 4]`` of unsigned words, counters counter, counter + 1, ...

    Equal to ``numpy.random.Philox`` bit for bit (its first output uses counter + 1).
    """
    c0 = torch.arange(blocks, dtype=torch.int64, device=device) + counter
    c1, c2, c3 = (torch.zeros_like(c0) for _ in range(3))
    k0, k1 = key & _MASK64, key >> 64
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ _signed(k0), lo1, hi0 ^ c3 ^ _signed(k1), lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK64, (k1 + _WEYL[1]) & _MASK64
    return torch.stack((c0, c1, c2, c3), dim=-1)
