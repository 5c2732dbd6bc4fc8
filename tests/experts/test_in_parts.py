"""A reduction in parts: calibrated and decided once, written by all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lr import merge
from mergekit_lr.engine import parts

from .conftest import TEXTS, write_model
from .moe_models import tiny


def test_a_reduction_in_parts_is_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tiny("qwen3_moe", vocab_size=1536), tmp_path / "m")
    recipe = {
        "merge_method": "m_smoe",
        "models": [{"model": str(model)}],
        "parameters": {"num_experts": 3},
        "calibration": {"text": [str(TEXTS[0])], "samples": 4, "sequence_length": 32},
    }
    merge(recipe, tmp_path / "whole", device="cpu", shard_size=50_000)
    ran = []
    prepare = parts.prepare_in
    monkeypatch.setattr(parts, "prepare_in", lambda *a: (ran.append(1), prepare(*a)))
    for i in (3, 1, 2):
        merge(recipe, tmp_path / "out", device="cpu", shard_size=50_000, part=f"{i}/3")
    assert len(ran) == 1
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir() if p.name != "merge_report.json"}
    found = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name != "merge_report.json"}
    assert found == wanted
    assert len([n for n in wanted if n.endswith(".safetensors")]) > 2
