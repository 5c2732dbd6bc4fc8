"""Killed while calibrating, deciding, fitting or writing: the same command ends with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..killing import killed_everywhere
from .conftest import TEXTS, write_model
from .moe_models import tiny
from .test_outputs import Recipes

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


def test_killed_at_every_operation_of_a_merge(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of("gpt_oss", "sub_moe", 4)
    assert killed_everywhere(ACTION.format(method="sub_moe", recipe=recipe), tmp_path / "work") > 40


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
    assert killed_everywhere(ACTION.format(method=method, recipe=recipe), tmp_path / "work", timeout=1500) > 60
