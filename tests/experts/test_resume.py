"""Stopped while calibrating, deciding, fitting or writing: the same command ends with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_lr.checkpoint import fs

from ..killing import killed_everywhere
from .conftest import TEXTS, write_model
from .moe_models import tiny
from .test_outputs import Recipes, run

ACTION = """
import mergekit_lr.engine.run as run
import mergekit_lr.methods.{method}
import transformers, sklearn.cluster, scipy.optimize
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
import mergekit_lr.experts.pictures as pictures
pictures.write_pictures = lambda *a: None
def act(out):
    run.merge({recipe!r}, out, device="cpu", threads=1, shard_size=50_000)
"""


def operations(recipe: dict[str, Any], out: Path, stop_at: int = 0) -> int:
    """Run a recipe; stop at operation ``stop_at`` where it is not 0. How many operations there were."""
    count = 0

    def hook(operation: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    fs.set_hook(hook)
    try:
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                run(recipe, out)
        else:
            run(recipe, out)
    finally:
        fs.set_hook(None)
    return count


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "merge_report.json"}


def test_stopped_here_and_there(recipe_of: Recipes, tmp_path: Path) -> None:
    """Among the first operations are the decision and the fits; every one is stopped at in the slow tests."""
    recipe = recipe_of("mixtral", "mergemoe", 3, ridge=0.1)
    recipe["calibration"] |= {"text": [str(TEXTS[0])], "samples": 4, "sequence_length": 32}
    total = operations(recipe, tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    out = tmp_path / "out"
    for stop_at in (8, 14, 20, total // 2, total // 4):  # each goes on from what the one before left
        operations(recipe, out, stop_at)
        assert not out.exists()
    operations(recipe, out)
    assert files(out) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), [("sub_moe", "gpt_oss"), ("reap", "deepseek_v3")])
def test_killed_at_every_operation_of_a_merge(method: str, family: str, recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of(family, method, 4)
    action = ACTION.format(method=method, recipe=recipe)
    assert killed_everywhere(action, tmp_path / "work", timeout=1500) > 40


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parameters"), [("mergemoe", {"ridge": 0.1}), ("m_smoe", {})])
def test_killed_at_every_operation_of_calibration_too(method: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tiny("qwen3_moe", vocab_size=1536), tmp_path / "m")
    recipe = {
        "merge_method": method,
        "models": [{"model": str(model)}],
        "parameters": {"num_experts": 3, **parameters},
        "calibration": {"text": [str(TEXTS[0])], "samples": 4, "sequence_length": 32},
    }
    action = ACTION.format(method=method, recipe=recipe)
    assert killed_everywhere(action, tmp_path / "work", timeout=1500) > 60
