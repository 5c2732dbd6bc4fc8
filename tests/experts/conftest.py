"""Tiny mixtures with a tokenizer, and their statistics, made once for each family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from mergekit_lr.calibration.calibrate import calibrate

from . import moe_models

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = [EXAMPLES / "text" / "heldout" / f"{name}.txt" for name in ("c", "german")]
TOKENS = 1536


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write_model(model: Any, folder: Path) -> Path:
    """A model with the example tokenizer, as transformers saves it."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "models" / "base" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny random model."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = write_model(
                moe_models.tiny(family, vocab_size=TOKENS), tmp_path_factory.mktemp(f"model-{family}")
            )
        return made[family]

    return find


@pytest.fixture(scope="session")
def statistics(mixture: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The statistics file of a family's tiny random model, with all Grams."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"statistics-{family}") / "s.safetensors"
            with torch.random.fork_rng():
                calibrate(
                    mixture(family), made[family], TEXTS, samples=8, sequence_length=48, device="cpu",
                    grams=() if family == "llama4_text" else ("input", "hidden"),
                )  # fmt: skip
        return made[family]

    return find


@pytest.fixture(scope="session")
def recipe_of(mixture: Callable[[str], Path], statistics: Callable[[str], Path]) -> Callable[..., dict[str, Any]]:
    """A recipe that reduces a family's tiny model on its statistics."""

    def make(family: str, method: str, num_experts: int, **parameters: Any) -> dict[str, Any]:
        return {
            "merge_method": method,
            "models": [{"model": str(mixture(family))}],
            "parameters": {"num_experts": num_experts, **parameters},
            "calibration": {"statistics": str(statistics(family))},
        }

    return make
