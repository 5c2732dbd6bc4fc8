"""docs/calibration.md lists what the file holds, with the formulas that the code gives, and the families."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lr.arch import moe_families
from mergekit_lr.arch.experts import FAMILIES
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
    assert {t for f in FAMILIES for t in f.model_types} == set(MAKERS) - {"llama"}


def test_both_tables_of_families_agree() -> None:
    """One table says how files become modules, the other what a reduced model's files are."""
    on_disk = {t: f for f in moe_families.FAMILIES for t in f.model_types}
    for family in FAMILIES:
        for model_type in family.model_types:
            other = on_disk[model_type]
            assert other.block == family.block, model_type
            names = [f"experts.{{e}}.{n}" for n in (family.gate, family.up, family.down)]
            assert family.fused == any(s.fused for s in other.slots), model_type
            if not family.fused:
                assert [s.name for s in other.slots] == names, model_type
            elif family.renamed:
                assert {s.name for s in other.slots} <= {disk for disk, _ in family.renamed}, model_type
