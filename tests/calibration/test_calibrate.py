"""The command and function: memory, threads, batches, what it says of input that it cannot use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_lr
from mergekit_lr.calibration import stream, text
from mergekit_lr.errors import CheckpointError, NonFiniteError, ResourceError, UsageError

Model = Callable[[str], Path]
SETTINGS: dict[str, Any] = {"samples": 5, "sequence_length": 40, "device": "cpu"}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2"])
def test_many_batches_give_the_sums_of_one(
    model: Model, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    grams = ("linear", "input", "hidden")
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    mergekit_lr.calibrate(model(name), one, texts, **SETTINGS, grams=grams)
    monkeypatch.setattr(text, "BATCH_TOKENS", 80)
    mergekit_lr.calibrate(model(name), many, texts, **SETTINGS, grams=grams)
    wanted, found = load_file(one), load_file(many)
    assert set(wanted) == set(found)
    for entry, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[entry], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=entry)
        else:
            assert torch.equal(found[entry], value), entry


def test_threads_and_memory_change_no_byte(
    model: Model, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BATCH_TOKENS", 80)
    files = []
    for threads, memory in ((1, "1GiB"), (4, "1GiB"), (2, "2MiB")):
        monkeypatch.setattr(stream, "available_cpus", lambda threads=threads: threads)
        out = tmp_path / f"{threads}.safetensors"
        mergekit_lr.calibrate(model("mixtral"), out, texts, **SETTINGS, grams=("linear",), max_memory=memory)
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_copy_of_the_model_in_other_shards_gives_the_same_file(
    model: Model, texts: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model("mixtral"), copy)
    weights = load_file(copy / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: weights[n] for n in part}, copy / file)
    index = {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    for folder, out in ((model("mixtral"), "a"), (copy, "b")):
        mergekit_lr.calibrate(folder, tmp_path / f"{out}.safetensors", texts, **SETTINGS)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# The peak of this process alone, from a clean slate: what was freed is given back, then the kernel's mark is reset.
# glibc is told to give back every larger block at once, so that the mark is of what is alive.
RETURN_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
MEASURE = """
import ctypes, sys, torch
torch.set_num_threads(1)
from pathlib import Path
import mergekit_lr
from transformers.utils import logging
logging.disable_progress_bar()

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

small, large, text, out, limit = sys.argv[1:]
settings = dict(samples=6, sequence_length=64, device="cpu", similarity_tokens=64)
mergekit_lr.calibrate(small, out + "/small.safetensors", [text], **settings)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
mergekit_lr.calibrate(large, out + "/large.safetensors", [text], **settings, max_memory=limit)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_runs_within_a_budget_smaller_than_the_model(model: Model, texts: list[Path], tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from .families import SIZES

    sizes = {**SIZES, "hidden_size": 128, "num_hidden_layers": 10, "intermediate_size": 512}
    large = tmp_path / "large"
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=6)).save_pretrained(large)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model("mixtral") / file, large / file)
    assert (large / "model.safetensors").stat().st_size > 2 * (24 << 20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model("mixtral")), str(large), str(texts[0]), str(tmp_path), "24MiB"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **RETURN_MEMORY},
    )
    assert 4 << 20 < int(done.stdout) < 24 << 20  # more than a layer, less than the budget
    with pytest.raises(ResourceError, match=r"allow at least --max-memory \d+MiB"):
        mergekit_lr.calibrate(large, tmp_path / "x.safetensors", texts, **SETTINGS, max_memory="4MiB")
    assert not (tmp_path / "x.safetensors.partial").exists()


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of a model with other config keys; None removes one."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return copy


def refused(folder: Path, texts: list[Path], tmp_path: Path, says: str, **settings: Any) -> None:
    with pytest.raises(CheckpointError, match=says):
        mergekit_lr.calibrate(folder, tmp_path / "s.safetensors", texts, **SETTINGS, **settings)
    assert not list(tmp_path.glob("s.safetensors*"))


def test_dense_models_have_no_experts(model: Model, texts: list[Path], tmp_path: Path) -> None:
    refused(model("llama"), texts, tmp_path, r"dense: .*--grams linear")
    refused(model("llama"), texts, tmp_path, r"dense: .*--grams linear", grams=("hidden",))


def test_an_unknown_mixture_names_the_known(model: Model, texts: list[Path], tmp_path: Path) -> None:
    network_type = "jetmoe"
    folder = changed(model("qwen3_moe"), tmp_path, model_type=network_type, architectures=["JetMoeForCausalLM"])
    refused(folder, texts, tmp_path, r"'jetmoe' cannot be run.*mixtral.*qwen3_moe.*Memory")


def test_config_and_weights_that_disagree(model: Model, texts: list[Path], tmp_path: Path) -> None:
    folder = changed(model("mixtral"), tmp_path, num_local_experts=5)
    refused(folder, texts, tmp_path, r"gate\.weight has shape \(6, 32\) and the model \(5, 32\)")
    shutil.rmtree(folder)
    folder = changed(model("mixtral"), tmp_path, num_hidden_layers=3)
    refused(folder, texts, tmp_path, "the config has 3 layers and the weights no layer 2")
    shutil.rmtree(folder)
    folder = changed(model("llama"), tmp_path, intermediate_size=40)
    refused(folder, texts, tmp_path, r"has shape \(48, 32\) and the model \(40, 32\)", grams=("linear",))


def test_no_config_no_tokenizer_quantised(model: Model, texts: list[Path], tmp_path: Path) -> None:
    folder = changed(model("mixtral"), tmp_path, quantization_config={"quant_method": "fp8"})
    refused(folder, texts, tmp_path, "quantised")
    (folder / "config.json").unlink()
    refused(folder, texts, tmp_path, r"no config\.json")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    refused(folder, texts, tmp_path, "no tokenizer")


def test_activations_that_are_not_finite_name_the_layer(model: Model, texts: list[Path], tmp_path: Path) -> None:
    folder = changed(model("mixtral"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.block_sparse_moe.experts.0.w2.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1: .*not finite"):
        mergekit_lr.calibrate(folder, tmp_path / "s.safetensors", texts, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"grams": ("all",)}, "'all' is not known"),
        ({"similarity_tokens": -1}, "similarity_tokens is -1"),
        ({"dtype": "int8"}, "'int8' is not known"),
    ],
)
def test_arguments_that_make_no_sense(
    model: Model, texts: list[Path], tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        mergekit_lr.calibrate(model("mixtral"), tmp_path / "s.safetensors", texts, **settings)
    with pytest.raises(UsageError, match=r"name it OUT\.safetensors"):
        mergekit_lr.calibrate(model("mixtral"), tmp_path / "s", texts)
    with pytest.raises(UsageError, match="no text"):
        mergekit_lr.calibrate(model("mixtral"), tmp_path / "s.safetensors", [])
