"""SECURITY.md says what is tested, and nothing else: each of its 35 rows names tests that exist."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
from removal import REMOVALS, Removal, fails_without
from staging import ATTACKS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ROWS = {int(m[1]): m[0] for m in re.finditer(r"^\| (\d+) \|.*$", TEXT, re.M)}

for path in sorted(Path(__file__).parent.glob("attack_*.py")):
    importlib.import_module(path.stem)
NAMES = {a.name: a.row for a in ATTACKS}


@cache
def collected_from(file: str) -> dict[str, bool]:
    """Names of the tests that pytest collects from a file, and whether all of their cases are slow."""
    assert Path(file).name.startswith("test_"), file
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    return {n.name: any(ast.unparse(d) == "pytest.mark.slow" for d in n.decorator_list) for n in found}


def test_there_are_thirty_five_rows() -> None:
    assert list(ROWS) == list(range(1, 36))
    assert all(row.count(" | ") == 3 for row in ROWS.values())


@pytest.mark.parametrize("row", range(1, 36))
def test_every_row_names_tests_that_exist(row: int) -> None:
    named = re.findall(r"`([^`]+)`", ROWS[row].rsplit(" | ", 1)[1])
    attacks = [n for n in named if n.startswith("attack_")]
    tests = [n for n in named if n.startswith("tests/")]
    assert named and len(attacks) + len(tests) == len(named), named
    for name in attacks:
        assert NAMES.get(name) == row, f"{name} is no attack of row {row}"
    quick = len(attacks)
    for name in tests:
        file, _, function = name.partition("::")
        assert function in collected_from(file), f"{name} does not exist"
        quick += not collected_from(file)[function]
    assert quick, "the suite that runs every day does not look at this row"


def test_every_attack_belongs_to_a_row_that_is_described() -> None:
    assert set(NAMES.values()) <= set(ROWS)


def test_of_every_row_a_protection_is_taken_out() -> None:
    """And a test fails then that the row names."""
    assert sorted({r.row for r in REMOVALS}) == list(ROWS)
    for removal in REMOVALS:
        named = re.findall(r"`([^`]+)`", ROWS[removal.row].rsplit(" | ", 1)[1])
        file, _, words = removal.test.partition(" ")
        word = words.partition("-k ")[2]
        wanted = f"attack_{word}" if file.endswith("test_attacks.py") else file
        fitting = [n for n in named if n.startswith(wanted) and (word in n or n == wanted)]
        assert word and fitting, f"row {removal.row} does not name {removal.test}"


def test_what_is_taken_out_is_still_there() -> None:
    """The places that `removal` changes, each exactly once in the source."""
    for removal in REMOVALS:
        file = ROOT / removal.file
        assert file.read_text(encoding="utf-8").count(removal.old) == 1, f"row {removal.row}: {removal.old!r}"
        words = removal.test.partition("-k ")[2]
        assert "test_attacks.py" not in removal.test or f"attack_{words}" in NAMES, words


@pytest.mark.slow
@pytest.mark.parametrize("removal", REMOVALS, ids=lambda r: f"{r.row}-{r.protection.replace(' ', '_')}")
def test_without_its_protection_a_row_fails(removal: Removal) -> None:
    assert fails_without(removal)


@pytest.mark.slow
@pytest.mark.parametrize("test", dict.fromkeys(r.test for r in REMOVALS))
def test_with_every_protection_a_copy_passes(test: str) -> None:
    assert not fails_without(None, test)
