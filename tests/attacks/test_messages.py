"""What is said of each of the 35 threats, to the letter. After a change of words: python tests/attacks/messages.py"""

from __future__ import annotations

from pathlib import Path

import pytest
from messages import PAGE, SAID, line_of

EXPECTED = {int(line[:2]): line[4:] for line in PAGE.read_text(encoding="utf-8").splitlines()}


def test_every_row_says_something() -> None:
    assert sorted(SAID) == sorted(EXPECTED) == list(range(1, 36))


@pytest.mark.parametrize("number", range(1, 36))
def test_message(number: int, tmp_path: Path) -> None:
    said = line_of(number, tmp_path)
    assert said == EXPECTED[number]
    assert said.isprintable() and len(said) < 400
    assert ";" in said  # behind it stands what to do
