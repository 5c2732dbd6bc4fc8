"""Adapters and bases of a few tensors, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.lazy import torch

from .conftest import seeded


def whole(checkpoint: Checkpoint, name: str) -> Any:
    info = checkpoint.tensors[name]
    return checkpoint.read(name, 0, info.numel).view(info.shape)


def hand_made(
    folder: Path, base: Mapping[str, Any], adapter: Mapping[str, Any], config: Any = None, **settings: Any
) -> tuple[Path, Path]:
    """A base and an adapter with just these tensors and settings."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "adapter").mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in base.items()}, folder / "base" / "model.safetensors")
    prefixed = {f"base_model.model.{k}": v.clone().contiguous() for k, v in adapter.items()}
    save_file(prefixed, folder / "adapter" / "adapter_model.safetensors")
    if config is not None:
        (folder / "base" / "config.json").write_text(json.dumps(config))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "base", folder / "adapter"


def pair(rows: int, columns: int, rank: int = 2, seed: int = 0) -> tuple[Any, Any]:
    return seeded(seed + 1, rank, columns), seeded(seed + 2, rows, rank)


def big(folder: Path, rows: int, columns: int, **settings: Any) -> tuple[Path, Path]:
    rank = settings.setdefault("r", 16)
    a, b = pair(rows, columns, rank)
    adapter = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    if settings.get("use_dora"):
        adapter["m.lora_magnitude_vector"] = seeded(9, rows).abs() + 1
    base = {"m.weight": seeded(3, rows, columns, dtype=torch.bfloat16)}
    return hand_made(folder, base, adapter, **settings)
