"""The jobs that are stopped and failed: each on inputs of some kilobytes, made here, all imports done before any fork.

``JOBS[name](folder)`` makes the inputs in ``folder`` and returns ``act(out)``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

import mergekit_lr
from mergekit_lr import merge

Act = Callable[[Path], Any]
Job = Callable[[Path], Act]
EXAMPLES = Path(__file__).parents[2] / "examples"
JOBS: dict[str, Job] = {}
FILES = {"calibrate", "curvature", "fisher"}
"""Jobs whose output is a file."""


def job(make: Job) -> Job:
    JOBS[make.__name__] = make
    return make


def output_of(name: str, folder: Path) -> Path:
    """What a job writes in a folder of its own."""
    return folder / ("out.safetensors" if name in FILES else "out")


def models(folder: Path, count: int = 3) -> list[str]:
    """Llama-like folders of three tensors."""
    shapes = {"a.weight": (40, 30), "b.weight": (200, 64), "c.weight": (300,)}
    found = []
    for i in range(count):
        place = folder / f"m{i}"
        place.mkdir()
        g = torch.Generator().manual_seed(i)
        tensors = {n: (torch.randn(s, generator=g) * 0.05).bfloat16() for n, s in shapes.items()}
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
        found.append(str(place))
    return found


def ties(folder: Path) -> dict[str, Any]:
    base, *tuned = models(folder)
    entries = [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in tuned]
    return {"merge_method": "ties", "base_model": base, "models": entries}


@job
def dense(folder: Path) -> Act:
    """Three tensors in two shards."""
    recipe = ties(folder)
    return lambda out: merge(recipe, out, device="cpu", threads=1, shard_size=25_000)


@job
def overwrite(folder: Path) -> Act:
    recipe = ties(folder)
    return lambda out: merge(recipe, out, device="cpu", threads=1, shard_size=25_000, overwrite=True)


@job
def workers(folder: Path) -> Act:
    """With forked worker processes, as large merges have them."""
    from mergekit_lr.engine import processes

    processes.FORK_FROM = 0
    recipe = ties(folder)
    return lambda out: merge(recipe, out, device="cpu", threads=2, shard_size=25_000)


def packing(folder: Path) -> dict[str, Any]:
    base, *tuned = models(folder)
    entries = [{"model": m, "name": f"t{i}"} for i, m in enumerate(tuned)]
    return {"merge_method": "tall_masks", "base_model": base, "models": entries}


@job
def bundle(folder: Path) -> Act:
    recipe = packing(folder)
    return lambda out: merge(recipe, out, device="cpu", threads=1)


@job
def quantized(folder: Path) -> Act:
    recipe = {**packing(folder), "merge_method": "quantized", "parameters": {"bits": 3}}
    return lambda out: merge(recipe, out, device="cpu", threads=1)


@job
def trimmed(folder: Path) -> Act:
    """Thresholds over the model are found, and kept, before anything is packed."""
    wide = {"multi_task": "ties", "threshold_scope": "model"}
    recipe = {**packing(folder), "parameters": wide}
    return lambda out: merge(recipe, out, device="cpu", threads=1)


@job
def recover(folder: Path) -> Act:
    merge(packing(folder), folder / "bundle", device="cpu", threads=1)
    return lambda out: mergekit_lr.recover(folder / "bundle", "t1", out, device="cpu", threads=1)


@job
def grid(folder: Path) -> Act:
    """Lambda by held-out loss, on the committed example models."""
    return on_text(folder, {"lambda": "grid"}, samples=2)


@job
def learned(folder: Path) -> Act:
    """Masks learned on text, for two tasks one after the other."""
    return on_text(folder, {"lambda": 0.4, "masks": "learned", "steps": 2}, samples=4)


def on_text(folder: Path, parameters: dict[str, Any], samples: int) -> Act:
    import mergekit_lr.evaluation

    text = folder / "german.txt"
    text.write_text((EXAMPLES / "text" / "heldout" / "german.txt").read_text(encoding="utf-8")[:1500])
    recipe = {
        "merge_method": "tall_masks",
        "base_model": str(EXAMPLES / "models" / "base"),
        "models": [
            {"model": str(EXAMPLES / "models" / "c"), "name": "c", "parameters": {"lambda": 0.3}},
            {"model": str(EXAMPLES / "models" / "german"), "name": "german"},
        ],
        "parameters": parameters,
        "calibration": {"text": [str(text)], "samples": samples, "sequence_length": 16},
    }
    mergekit_lr.evaluation.load_for_evaluation(EXAMPLES / "models" / "base")  # imports what it needs
    return lambda out: merge(recipe, out, device="cpu", threads=1)


def mixture(folder: Path, family: str) -> Path:
    from experts.moe_models import tiny
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = folder / family
    tiny(family, vocab_size=1536).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "models" / "base" / name, place / name)
    return place


def _text(folder: Path) -> Path:
    text = folder / "c.txt"
    text.write_text((EXAMPLES / "text" / "heldout" / "c.txt").read_text(encoding="utf-8")[:4000])
    return text


@job
def moe(folder: Path) -> Act:
    """Experts merged after calibration on text, which is part of the run."""
    import scipy.optimize
    import sklearn.cluster  # noqa: F401 - before the forks

    import mergekit_lr.experts.pictures as pictures
    import mergekit_lr.methods.mergemoe  # noqa: F401

    pictures.write_pictures = lambda *a: None  # drawing takes a second; it is one file, written like the others
    assert scipy.optimize
    recipe = {
        "merge_method": "mergemoe",
        "models": [{"model": str(mixture(folder, "qwen3_moe"))}],
        "parameters": {"num_experts": 3, "ridge": 0.1},
        "calibration": {"text": [str(_text(folder))], "samples": 2, "sequence_length": 32},
    }
    return lambda out: merge(recipe, out, device="cpu", threads=1, shard_size=50_000)


@job
def calibrate(folder: Path) -> Act:
    model, text = mixture(folder, "mixtral"), _text(folder)
    settings: dict[str, Any] = {"samples": 2, "sequence_length": 32, "similarity_tokens": 20, "grams": ["linear"]}
    return lambda out: mergekit_lr.calibrate(model, out, [text], device="cpu", **settings)


def _lowrank(folder: Path) -> tuple[Path, list[Path]]:
    from lowrank.conftest import Q, make_adapter, make_base

    import mergekit_lr.lowrank.combine
    import mergekit_lr.lowrank.decompose
    import mergekit_lr.lowrank.positions  # noqa: F401

    base = make_base(folder / "base")
    return base, [make_adapter(folder / n, i, weights=(Q,)) for i, n in enumerate("ab")]


@job
def lora_merge(folder: Path) -> Act:
    base, adapters = _lowrank(folder)
    entries = [{"model": f"{base}+{a}", "parameters": {"weight": 0.5}} for a in adapters]
    recipe = {"merge_method": "lora_merge", "base_model": str(base), "models": entries}
    return lambda out: merge(recipe, out, device="cpu", threads=1)


@job
def extract(folder: Path) -> Act:
    base, (adapter, _) = _lowrank(folder)
    linear = {"merge_method": "linear", "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]}
    merge(linear, folder / "tuned", device="cpu", threads=1)
    return lambda out: mergekit_lr.extract_lora(folder / "tuned", base, out, rank=2, device="cpu", threads=1)


@job
def adapter(folder: Path) -> Act:
    """A task of a bundle, given back as the adapter that it was."""
    base, adapters = _lowrank(folder)
    entries = [{"model": f"{base}+{a}", "name": a.name} for a in adapters]
    recipe: dict[str, Any] = {"merge_method": "reversible", "base_model": str(base), "models": entries}
    recipe["parameters"] = {"max_error": 0.2}
    merge(recipe, folder / "bundle", device="cpu", threads=1)

    def act(out: Path) -> None:
        with mergekit_lr.open_bundle(folder / "bundle") as opened:
            opened.adapter("a", out)

    return act


@job
def curvature(folder: Path) -> Act:
    """Second moments that are tensors already."""
    g = torch.Generator().manual_seed(0)
    moments = {f"layer.{i}.weight": torch.rand(20, 30, generator=g) for i in range(3)}
    save_file(moments, folder / "exp_avg_sq.safetensors")
    return lambda out: mergekit_lr.curvature(folder / "exp_avg_sq.safetensors", out, form="rank1")


@job
def fisher(folder: Path) -> Act:
    """Fisher information, estimated from text."""
    text = _text(folder)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=1536, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "models" / "base" / name, folder / "llama" / name)
    settings: dict[str, Any] = {"samples": 2, "sequence_length": 16, "device": "cpu"}
    return lambda out: mergekit_lr.curvature(folder / "llama", out, text=[text], **settings)
