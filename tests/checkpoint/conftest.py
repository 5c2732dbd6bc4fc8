"""Small checkpoints, written with the safetensors library, that the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.lazy import torch

Folder = Callable[..., Path]


def seeded(seed: int, *shape: int, dtype: Any = None) -> Any:
    """Normal values that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype or torch.float32)


def reference(path: Path | str, adapter: Path | str | None = None) -> ModelReference:
    return ModelReference(Place(str(path)), None if adapter is None else Place(str(adapter)))


@pytest.fixture
def make_folder(tmp_path: Path) -> Folder:
    """Write a folder: ``make_folder(name, shards={file: {tensor name: tensor}}, config={...}, index=...)``.

    ``index`` is True for a right index, a mapping for a hand-made weight_map, None for none.
    """

    def make(
        name: str = "model",
        shards: Mapping[str, Mapping[str, Any]] | None = None,
        config: Mapping[str, Any] | None = None,
        index: bool | Mapping[str, str] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shards = {"model.safetensors": {"w": seeded(1, 4, 3), "b": seeded(2, 4)}} if shards is None else shards
        for file, tensors in shards.items():
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / file)
            (folder / file).chmod(0o644)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if index is not None and index is not False:
            weight_map = {n: f for f, ts in shards.items() for n in ts} if index is True else dict(index)
            content = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return folder

    return make
