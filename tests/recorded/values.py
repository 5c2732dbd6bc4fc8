"""The file of recorded values: one flat bf16 tensor per recipe, its tensors joined in name order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
RECORDED = HERE / "mergekit-0.1.5.safetensors"


def recipe_names() -> list[str]:
    """Every recorded recipe as ``family/name``, in order."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in RECIPES.glob("*/*.yml"))


def recipe_path(name: str) -> Path:
    """The recipe file of ``family/name``."""
    return RECIPES / f"{name}.yml"


def flatten(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The floating-point tensors in name order as one vector."""
    return torch.cat([state[name].reshape(-1) for name in sorted(state) if state[name].is_floating_point()])


def layout_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names and shapes that :func:`flatten` joined, in its order."""
    lines = [f"{n} {tuple(state[n].shape)}\n" for n in sorted(state) if state[n].is_floating_point()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def bf16_steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable bf16 values lie between ``a`` and ``b``, elementwise (int32; 0 where equal, -0 is 0).

    bf16's bit patterns, read as sign and magnitude, count the values in order, so the distance is a difference of
    integers. A NaN on one side only counts as 2^16; NaN on both sides as 0.
    """
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        raise TypeError(f"two bf16 tensors wanted, got {a.dtype} and {b.dtype}")
    ranks = []
    for tensor in (a, b):
        bits = tensor.contiguous().view(torch.int16).to(torch.int32)
        ranks.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    steps = (ranks[0] - ranks[1]).abs()
    both, either = a.isnan() & b.isnan(), a.isnan() | b.isnan()
    return torch.where(both, 0, torch.where(either, 1 << 16, steps))
