"""Block-scaled FP8 and MXFP4 weights, decoded to be merged; FP8 encoded again where that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lr.arch.moe import FP8_BLOCK
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FP8_MAX = 448.0
"""Largest finite magnitude of float8 e4m3fn."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """``W = q s`` with one scale for each block of 128 x 128: fp32 ``[out, in]``.

    ``values`` is F8_E4M3 ``[out, in]``, ``scales`` (``weight_scale_inv`` on disk) ``[ceil(out/128), ceil(in/128)]``.
    """
    rows, columns = values.shape
    wide = scales.float().repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return values.float() * wide


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """F8_E4M3 values and fp32 block scales of ``[out, in]``: the largest magnitude of a block becomes 448.

    A block of zeros has scale 1. The relative error of an entry is at most 2^-4 unless it is under 2^-15 of its
    block's largest.
    """
    rows, columns = weight.shape
    down, across = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = torch.zeros(down * FP8_BLOCK, across * FP8_BLOCK, dtype=torch.float32, device=weight.device)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, FP8_BLOCK, across, FP8_BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    values = (blocks / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).reshape(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scales


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """fp32 ``[out, in]`` of U8 ``blocks`` ``[out, in/32, 16]`` and U8 ``scales`` ``[out, in/32]``.

    A byte holds two values, the low half first: sign, two bits of exponent, one of mantissa (e2m1), times ``2^(scale
    - 127)`` of their block of 32. Exact in fp32.
    """
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], dtype=torch.float32, device=blocks.device)
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
    groups = pairs.reshape(*blocks.shape[:-1], 2 * blocks.shape[-1])
    exponent = scales.to(torch.int32)[..., None] - 127
    return torch.ldexp(groups, exponent).reshape(*blocks.shape[:-2], -1)
