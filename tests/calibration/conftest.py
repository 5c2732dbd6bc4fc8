"""Tiny models and texts, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging

from . import families

HELDOUT = Path(__file__).parents[2] / "examples" / "text" / "heldout"


@pytest.fixture(scope="session", autouse=True)
def silence() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model("mixtral")``: the folder of a tiny random model."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = families.make_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two texts of a few thousand bytes, and one of less than a window."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("c", "german"):
        (folder / f"{name}.txt").write_text((HELDOUT / f"{name}.txt").read_text()[:4000])
    (folder / "short.txt").write_text("a text of very few words")
    return [folder / "c.txt", folder / "german.txt", folder / "short.txt"]
