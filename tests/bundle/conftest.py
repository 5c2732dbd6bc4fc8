"""Bundles written tensor by tensor, without the engine: what the readers are tested against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lr.bundle.manifest import FILE, Entry, Manifest, Task
from mergekit_lr.bundle.masks import pack
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.engine.digest import ALGORITHM, ChunkDigests, combine

Maker = Callable[..., list[str]]
SHAPES = {"model.a.weight": (33, 7), "model.b.weight": (70_001,), "model.norm.weight": (5,)}
TASKS = ("python", "german")


@pytest.fixture
def write(tmp_path: Path) -> Maker:
    """``write(models)`` writes raw state dicts, ``m0.safetensors`` and so on, and returns their paths."""

    def files(models: list[dict[str, Tensor]]) -> list[str]:
        paths = [str(tmp_path / f"m{i}.safetensors") for i in range(len(models))]
        for path, tensors in zip(paths, models, strict=True):
            save_file(tensors, path)
        return paths

    return files


def digest(tensor: Tensor) -> str:
    parts = ChunkDigests()
    parts.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data))
    return combine(parts.finish())


def write_bundle(folder: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> Path:
    """One shard and bundle.json, digests included."""
    folder.mkdir()
    shard = folder / "model.safetensors"
    write_safetensors(shard, tensors)
    header = read_header(shard)
    files = ({"file": shard.name, "bytes": header.file_size, "header_sha256": header.digest},)
    digests = {n: digest(t) for n, t in tensors.items()}
    complete = dataclasses.replace(manifest, files=files, digest_algorithm=ALGORITHM, digests=digests)
    (folder / FILE).write_bytes(complete.to_bytes())
    return folder


def draw(dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(stored tensors, what each task must come out as, by ``task/name``): the formula in float64."""
    g = torch.Generator().manual_seed(3)
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        base, vector = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
        stored |= {f"base/{name}": base, f"vector/{name}": vector}
        for task in TASKS:
            mask = torch.rand(shape, generator=g) > 0.4
            stored[f"mask/{task}/{name}"] = pack(mask)
            expected[f"{task}/{name}"] = (base.double() + mask * vector.double()).to(dtype)
    return stored, expected


def masked_entries(dtype: str = "BF16") -> tuple[Entry, ...]:
    return tuple(
        Entry(n, dtype, s, "masked", (f"base/{n}", f"vector/{n}"), {t: (f"mask/{t}/{n}",) for t in TASKS})
        for n, s in SHAPES.items()
    )


def manifest_of(entries: tuple[Entry, ...]) -> Manifest:
    return Manifest(
        "tall_masks", tuple(Task(t, f"./{t}") for t in TASKS), {}, {"model": "./base", "files": []}, entries
    )


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", manifest_of(masked_entries()), draw()[0])


@pytest.fixture
def expected() -> dict[str, Tensor]:
    return draw()[1]
