"""docs/calibration.md lists what the file holds, with the formulas that the code gives, and the families."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergekit_lr.arch.moe_families import FAMILIES
from mergekit_lr.calibration.calibrate import DTYPES
from mergekit_lr.calibration.run import GRAMS
from mergekit_lr.calibration.statistics import DIGEST_ELEMENTS, FORMAT, MIXTURE_ENTRIES, STORED, VERSION
from mergekit_lr.calibration.text import BATCH_TOKENS

from .families import MAKERS

PAGE = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
DTYPES_IN_WORDS = {"I64": "int64", "F64": "float64", "F32": "float32"}


def test_every_entry_has_its_row_and_formula() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]*, (\w+) \| (.*) \|$", PAGE, re.M)
    found = {entry: (dtype, formula.replace("\\|", "|")) for entry, dtype, formula in rows}
    assert found == {e: (DTYPES_IN_WORDS[STORED[e]], formula) for e, formula in MIXTURE_ENTRIES.items()}


def test_numbers_and_names() -> None:
    assert f"(`{FORMAT}`), `format_version` (`{VERSION}`)" in PAGE
    assert f"{DIGEST_ELEMENTS} elements from the middle" in PAGE
    assert f"at most {BATCH_TOKENS} tokens" in PAGE
    for gram in GRAMS:
        assert f"`--grams {gram}`" in PAGE
    assert "float32" in DTYPES and "`--dtype`" in PAGE


def test_every_family_is_tested() -> None:
    """All that transformers itself can build; ``kimi_k2`` comes with code of its own, which is never run."""
    runnable = {t for f in FAMILIES if f.memory is not None for t in f.model_types}
    assert runnable & set(CONFIG_MAPPING) == set(MAKERS) - {"llama"}
    assert runnable - set(CONFIG_MAPPING) == {"kimi_k2"}
