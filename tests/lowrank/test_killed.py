"""Killed at every file operation while extracting, merging adapters and packing: the same command ends with the same
bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from ..killing import killed_everywhere
from .conftest import CONFIG, NORM, SHAPES, Q, normal, tensors_of

EXTRACT = """
import mergekit_lr.lowrank.decompose, mergekit_lr.lowrank.combine, mergekit_lr.lowrank.positions
from mergekit_lr import extract_lora
def act(out):
    extract_lora({model!r}, {base!r}, out, rank=2, embeddings="lora", device="cpu", threads=1)
"""
MERGE = """
import mergekit_lr.lowrank.decompose, mergekit_lr.lowrank.combine, mergekit_lr.lowrank.positions
from mergekit_lr import merge
def act(out):
    merge(json.loads({recipe!r}), out, device="cpu", threads=1)
"""


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tuned"
    folder.mkdir()
    moved = {n: t + 0.1 * normal(50, *SHAPES[n]) for n, t in tensors_of(base).items() if n in (Q, NORM)}
    moved = tensors_of(base) | moved
    save_file(moved, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.slow
def test_while_extracting(base: Path, tuned: Path, tmp_path: Path) -> None:
    action = EXTRACT.format(model=str(tuned), base=str(base))
    assert killed_everywhere(action, tmp_path / "work") > 15


@pytest.mark.slow
def test_while_merging_adapters(base: Path, adapter: Any, tmp_path: Path) -> None:
    models = [
        {"model": f"{base}+{adapter(n, i, weights=(Q,))}", "parameters": {"weight": 0.5}} for i, n in enumerate("ab")
    ]
    recipe = {"merge_method": "lora_merge", "base_model": str(base), "models": models}
    assert killed_everywhere(MERGE.format(recipe=json.dumps(recipe)), tmp_path / "work") > 10


@pytest.mark.slow
def test_while_packing(base: Path, tuned: Path, adapter: Any, tmp_path: Path) -> None:
    models = [{"model": f"{base}+{adapter('a', 1, weights=(Q,))}", "name": "a"}, {"model": str(tuned), "name": "t"}]
    parameters = {"max_error": 0.2, "rank": 2}
    recipe = {"merge_method": "reversible", "base_model": str(base), "models": models, "parameters": parameters}
    assert killed_everywhere(MERGE.format(recipe=json.dumps(recipe)), tmp_path / "work") > 20
