"""The JSON files of models, adapters and bundles, changed at random: ours or an error of ours, soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import mergekit_lr
from mergekit_lr.bundle.manifest import read_manifest
from mergekit_lr.checkpoint.adapter import plan_updates, read_config
from mergekit_lr.checkpoint.foreign_code import check_loadable, without_code
from mergekit_lr.checkpoint.model import open_folder, read_weight_map
from mergekit_lr.engine.side_files import carried_over, merged_config
from mergekit_lr.errors import MergekitLrError
from mergekit_lr.report.inspect import describe
from mergekit_lr.report.verify import verify
from mergekit_lr.tokenizer.compare import check_vocabularies

from .generators import json_bytes

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 8.0},
    "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "bias": "none",
    "target_modules": ["q_proj"], "base_model_name_or_path": "org/base", "modules_to_save": None, "revision": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose files may be replaced one at a time; its weights are a link inside of a copy."""
    import shutil

    target: Path = tmp_path_factory.mktemp("documents") / "model"
    shutil.copytree(EXAMPLES / "base", target)
    return target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target: Path = tmp_path_factory.mktemp("documents") / "bundle"
    recipe = {
        "merge_method": "tall_masks", "base_model": str(EXAMPLES / "base"), "parameters": {"lambda": 0.4},
        "models": [{"model": str(EXAMPLES / n), "name": n} for n in ("python", "c")],
    }  # fmt: skip
    mergekit_lr.merge(recipe, target, device="cpu", threads=1)
    return target


def try_all(path: Path, document: Any, seed: int, cases: int, read: Callable[[], object]) -> None:
    """Write changed documents to ``path`` and read them; the original is put back."""
    random, before, refusals = Random(seed), path.read_bytes() if path.exists() else None, 0
    try:
        for _ in range(cases):
            path.write_bytes(json_bytes(random, document))
            began = time.process_time()
            try:
                read()
            except MergekitLrError as e:
                refusals += 1
                assert str(e).isprintable() and len(str(e)) < 3000
            except Exception as e:
                raise AssertionError(f"{type(e).__name__}: {e}: {path.read_bytes()!r}") from e
            assert time.process_time() - began < 1.0, path.read_bytes()
    finally:
        path.unlink(missing_ok=True) if before is None else path.write_bytes(before)
    assert refusals > cases // 20  # the changes must matter


LENGTHS = pytest.mark.parametrize("cases", [120, pytest.param(3_000, marks=pytest.mark.slow)], ids=["short", "long"])


@LENGTHS
def test_config(folder: Path, cases: int) -> None:
    def read() -> None:
        verify(folder, weights=False).summary_lines()
        check_loadable(folder)
        with open_folder(folder, "m") as checkpoint:
            describe(checkpoint).summary_lines()
            content, _ = merged_config(checkpoint, {"F32"})
            without_code(json.loads(content or b"{}"))
            carried_over(checkpoint, checkpoint)

    document = json.loads((folder / "config.json").read_text())
    document |= {"text_config": {"vocab_size": 64, "rope_scaling": {"type": "x"}}, "auto_map": {"AutoConfig": "a.B"},
                 "num_experts": 4, "expert_map": {"0": [0, 1]}}  # fmt: skip
    try_all(folder / "config.json", document, 11, cases, read)


@LENGTHS
def test_index(folder: Path, cases: int) -> None:
    path = folder / "model.safetensors.index.json"

    def read() -> None:
        verify(folder, weights=False).summary_lines()
        read_weight_map(path)
        open_folder(folder, "m").close()

    with open_folder(folder, "m") as checkpoint:
        names = sorted(checkpoint.tensors)[:6]
    document = {"metadata": {"total_size": 8}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    try_all(path, document, 12, cases, read)


@LENGTHS
def test_tokenizer(folder: Path, cases: int) -> None:
    tokenizer = {
        "version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
    }  # fmt: skip

    def read() -> None:
        verify(folder, weights=False).summary_lines()
        with open_folder(folder, "m") as checkpoint, open_folder(EXAMPLES / "c", "c") as other:
            check_vocabularies([checkpoint, other])

    try_all(folder / "tokenizer.json", tokenizer, 13, cases, read)


@LENGTHS
def test_adapter_config(folder: Path, cases: int) -> None:
    def read() -> None:
        config = read_config(folder)
        with open_folder(folder, "m") as checkpoint:
            for name in ("model.layers.0.self_attn.q_proj", "model.embed_tokens"):
                config.scale_of(name, max(1, config.rank_of(name)))
            plan_updates(checkpoint, checkpoint, config)

    try_all(folder / "adapter_config.json", ADAPTER, 14, cases, read)


@LENGTHS
def test_bundle(bundle: Path, cases: int) -> None:
    def read() -> None:
        read_manifest(bundle)
        verify(bundle, weights=False).summary_lines()
        mergekit_lr.inspect(str(bundle)).summary_lines()
        with mergekit_lr.open_bundle(bundle) as opened:
            for task in opened.tasks:
                for name in list(opened.tensors(task))[:2]:
                    wanted = opened.tensors(task)[name]
                    if wanted.numel < 1 << 20:
                        opened.state_dict(task)[name]

    document = json.loads((bundle / "bundle.json").read_text())
    kept = document["tensors"][:3]
    document["tensors"] = kept
    try_all(bundle / "bundle.json", document, 15, cases, read)
