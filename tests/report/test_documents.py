"""docs/models.md and SECURITY.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_lr.checkpoint import adapter, header, hub, open
from mergekit_lr.engine.digest import ALGORITHM
from mergekit_lr.report.consistency import PLAIN_FAMILIES

ROOT = Path(__file__).parents[2]
MODELS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_fetched_files_are_listed() -> None:
    for pattern in hub.SMALL_FILES:
        assert f"`{pattern}`" in MODELS


def test_pickle_suffixes_are_listed() -> None:
    for suffix in open.PICKLE_SUFFIXES:
        assert suffix in MODELS


def test_adapter_settings_are_named() -> None:
    told = {"peft_type", "r", "lora_alpha", "init_lora_weights"}
    for setting in adapter._USED - told:
        assert f"`{setting}`" in MODELS, setting
    for refused in ("target_parameters", "layer_replication", "trainable_token_indices"):
        assert f"`{refused}`" in MODELS and refused not in adapter._USED | adapter._NEUTRAL


def test_digest_is_described_as_it_is() -> None:
    assert "xxh3_128" in ALGORITHM and "32 MiB" in ALGORITHM
    assert "xxh3_128 over the xxh3_128 digests of consecutive 32 MiB" in MODELS


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gemma", "olmo", "granite", "cohere", "smollm3"])
def test_plain_families_are_named(family: str) -> None:
    assert family in PLAIN_FAMILIES and family in MODELS.lower()


def test_caps_are_what_the_reader_has() -> None:
    caps = (header.MAX_HEADER, header.MAX_RANK, header.MAX_DIMENSION, header.MAX_TENSORS)
    assert caps == (100_000_000, 16, 1 << 48, 2_000_000)
    assert "caps: 100 MB, rank 16, 2^48 per dimension, 2 M tensors" in SECURITY


def test_every_file_that_is_named_exists() -> None:
    for path in re.findall(r"`(tests/[\w/.]+)`", SECURITY):
        assert (ROOT / path).exists(), path
