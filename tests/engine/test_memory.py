"""What `plan` says that the processes of a run will take: its arithmetic here, against the system in the slow test."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lr import plan
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.engine import memory
from mergekit_lr.engine.footprint import FORKED, INTERPRETER, PER_TENSOR, SEARCH

ROOT = Path(__file__).parents[2]


@contextmanager
def measuring() -> Iterator[Any]:
    """benchmarks/memory.py, whose siblings are found only from its folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("memory")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def of(recipe: dict[str, Any], **options: Any) -> dict[str, Any]:
    return plan(recipe, device="cpu", **options).to_dict()


def test_what_is_counted_beside_the_tensors(make, random_tensors):
    a, b = (str(make(f"m{i}", random_tensors(i))) for i in range(2))
    models = [{"model": a}, {"model": b}]
    plain = of({"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}, threads=1)
    beside = INTERPRETER + PER_TENSOR * plain["tensors"]
    assert plain["peak_process_memory"] == beside + plain["peak_memory"]
    ties = {"merge_method": "ties", "base_model": a, "models": [{"model": b}], "parameters": {"density": 0.5}}
    ties["parameters"] |= {"weight": 1.0}
    searching = of(ties, threads=1)
    assert searching["peak_process_memory"] == beside + searching["peak_memory"] + 5 * SEARCH


def test_workers_are_processes_only_where_there_is_enough_to_do(make, random_tensors, monkeypatch):
    a, b = (str(make(f"m{i}", random_tensors(i))) for i in range(2))
    recipe = {"merge_method": "linear", "models": [{"model": a}, {"model": b}], "parameters": {"weight": 0.5}}
    threads = of(recipe, threads=2)
    monkeypatch.setattr("mergekit_lr.engine.processes.FORK_FROM", 0)
    forks = of(recipe, threads=2)
    more = forks["peak_process_memory"] - threads["peak_process_memory"]
    assert more == (2 * FORKED if sys.platform == "linux" else 0)


def test_a_gpu_has_memory_that_is_not_counted(make, random_tensors):
    laid_out = plan(
        {"merge_method": "passthrough", "models": [{"model": str(make("m", random_tensors(0)))}]}, device="cpu"
    )
    assert any("processes themselves" in line for line in laid_out.summary_lines())
    laid_out.device = "cuda:0"
    assert laid_out.to_dict()["peak_process_memory"] is None
    assert not any("processes themselves" in line for line in laid_out.summary_lines())


def test_an_adapter_holds_the_factors_that_it_keeps(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    save_file({f"{n}.weight": torch.zeros(6, 10) for n in names}, base / "model.safetensors")
    factors = {f"base_model.model.{n}.lora_A.weight": torch.zeros(2, 10) for n in names}
    factors |= {f"base_model.model.{n}.lora_B.weight": torch.zeros(6, 2) for n in names}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with open_model(ModelReference.parse(f"{base}+{adapter}")) as opened:
        pair, blocks = 4 * (2 * 10 + 6 * 2), 2 * 2**20
        assert opened.bytes_held == 2 * 9 * pair + blocks  # 8 are kept while one is loaded


HOLES = """
import numpy as np
from mergekit_lr.engine.memory import keep_freed_memory, return_surplus

def anonymous():
    line = next(s for s in open("/proc/self/status") if s.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

keep_freed_memory()
large, small = [], []
for _ in range(96):
    large.append(np.ones(1 << 17))  # 1 MiB
    small.append(np.ones(1 << 10))
full = anonymous()
del large
kept = anonymous()
return_surplus(128 << 20)
below = anonymous()
return_surplus()
print(full - kept, full - below, full - anonymous())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_free_goes_back_once_it_is_much():
    done = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True, cwd=ROOT)
    kept, below, returned = map(int, done.stdout.split())
    assert (kept, below) == (0, 0)
    assert returned >= 90


def test_the_table_is_that_of_the_result():
    with measuring() as measure:
        result = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_bytes())
        page = (ROOT / "docs" / "performance.md").read_text()
        assert measure.renewed(page, result) == page, "run `python benchmarks/memory.py`"
    assert max(r["ratio"] for r in result["rows"]) <= result["target"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plans_bear_out(tmp_path):
    with measuring() as measure:
        measure.build(tmp_path / "models")
        for drawn in measure.draw(tmp_path / "models", 6):
            row = measure.measured(drawn, tmp_path)
            assert row["ratio"] <= measure.TARGET, row
            assert row["ratio"] >= 0.5, row


def test_another_allocator_is_left_alone(monkeypatch):
    """On musl or macOS there is no mallopt, no mallinfo2 and nothing to trim, which is no error."""

    class Other:
        def __init__(self, name: str | None) -> None:
            pass

    memory._glibc.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", Other)
    try:
        memory.keep_freed_memory()
        memory.return_surplus(0)
        assert memory._glibc() is None
    finally:
        memory._glibc.cache_clear()
