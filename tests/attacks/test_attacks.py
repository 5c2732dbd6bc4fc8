"""Every attack of this folder is tried, and fails."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from staging import ATTACKS, Attack

HERE = Path(__file__).parent
FILES = sorted(p.stem for p in HERE.glob("attack_*.py"))
for name in FILES:
    importlib.import_module(name)


@pytest.mark.parametrize("one", ATTACKS, ids=lambda a: a.name.removeprefix("attack_"))
def test_attack(one: Attack, tmp_path: Path) -> None:
    outcome = one.body(tmp_path)
    assert outcome and "\n" not in outcome


def test_attacks_say_what_they_try() -> None:
    assert len(FILES) >= 8 and len(ATTACKS) >= 60
    assert all(a.tries and 1 <= a.row <= 35 for a in ATTACKS)


def test_an_attack_file_is_a_script() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "attack_recipes.py")], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0 and "attacks failed" in done.stdout.splitlines()[-1], done.stdout + done.stderr
