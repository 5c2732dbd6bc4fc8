"""docs/quality_compat.md shows what was measured, of recipes that are in ``configs``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from mergekit_lr import load_recipe

ROOT = Path(__file__).parents[2]


def measuring() -> Any:
    spec = importlib.util.spec_from_file_location("compat_quality", ROOT / "benchmarks" / "compat_quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUALITY = measuring()
RESULT = json.loads(QUALITY.RESULT.read_bytes())


def test_the_table_is_that_of_the_result() -> None:
    page = QUALITY.PAGE.read_text()
    assert QUALITY.renewed(page, RESULT) == page, "run `python benchmarks/compat_quality.py`"


def test_all_recipes_are_measured_and_name_the_example_models() -> None:
    assert {f"`configs/{name}.yml`" for name in QUALITY.RECIPES} <= set(RESULT["models"])
    for name in QUALITY.RECIPES:
        recipe = load_recipe(QUALITY.recipe_of(name))
        assert all(str(r).startswith(str(ROOT)) for r in recipe.leaves())


def test_what_the_page_says_of_the_numbers() -> None:
    rows = {name: row["loss"] for name, row in RESULT["models"].items()}
    mean = {name: sum(row.values()) / 4 for name, row in rows.items()}
    base, stages, stack = rows["base"], mean["`configs/multi_stage.yml`"], rows["`configs/frankenmerge.yml`"]
    assert stages == min(mean.values())
    assert round(mean["base"] - stages, 2) == 0.13
    assert 0.04 <= mean["base"] - mean["`configs/moe_build.yml`"] < 0.05
    change = {d: round(rows["`configs/lora.yml`"][d] - base[d], 3) for d in base}
    assert change == {"english": 0.063, "python": -0.005, "c": 0.028, "german": -0.010}
    assert mean["`configs/frankenmerge.yml`"] > max(mean[n] for n in ("base", "python", "c", "german"))
    assert rows["python"]["python"] < stack["python"] < min(base["python"], rows["c"]["python"])
    assert RESULT["models"]["`configs/frankenmerge.yml`"]["layers"] == 5
