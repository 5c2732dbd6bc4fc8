"""Fifty random recipes and the synthetic checkpoints that they merge, for `memory.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import moe_merge
import torch
from checkpoints import LlamaShape, make_family
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_lr import merge

WIDE = LlamaShape(hidden=768, intermediate=2048, layers=6, heads=12, vocabulary=16384, shards=2)
"""135 MB in bf16; the embedding is 25 MB of it."""
DEEP = LlamaShape(hidden=512, intermediate=1408, layers=24, heads=8, vocabulary=4096, shards=3)
"""166 MB in 219 tensors, none above 4 MB."""
FAMILIES = {"wide": (WIDE, 5), "deep": (DEEP, 3)}
"""Shapes, and how many fine-tunes there are of each."""
RANKS = (8, 64, 16, 128)
"""Of the adapters on the wide base."""

Parameters = dict[str, Any]
DENSE: dict[str, tuple[Callable[[Random], Parameters], str, range]] = {
    "linear": (lambda _: {}, "none", range(2, 6)),
    "task_arithmetic": (lambda _: {}, "base", range(1, 6)),
    "slerp": (lambda r: {"t": round(r.random(), 2)}, "first", range(2, 3)),
    "nuslerp": (lambda _: {}, "base", range(2, 3)),
    "ties": (lambda r: {"density": r.choice([0.2, 0.5, 0.8])}, "base", range(2, 6)),
    "dare_ties": (lambda r: {"density": r.choice([0.2, 0.5, 0.8])}, "base", range(2, 6)),
    "dare_linear": (lambda r: {"density": r.choice([0.2, 0.5, 0.8])}, "base", range(2, 6)),
    "della": (lambda _: {"density": 0.6, "epsilon": 0.2}, "base", range(2, 5)),
    "breadcrumbs": (lambda _: {"density": 0.5, "gamma": 0.01}, "base", range(2, 5)),
    "model_stock": (lambda r: {"filter_wise": r.random() < 0.5}, "base", range(2, 6)),
    "karcher": (lambda _: {}, "none", range(2, 4)),
    "multislerp": (lambda _: {}, "none", range(2, 5)),
    "sce": (lambda r: {"select_topk": r.choice([0.1, 0.5])}, "base", range(2, 5)),
    "ram": (lambda _: {}, "base", range(2, 5)),
    "arcee_fusion": (lambda _: {}, "base", range(1, 2)),
    "nearswap": (lambda _: {"t": 0.0001}, "base", range(1, 2)),
}
"""Parameters, what ``base_model`` is (nothing, a base of its own, the first model), and how many models."""
WEIGHTED = {
    "breadcrumbs",
    "linear",
    "task_arithmetic",
    "nuslerp",
    "ties",
    "dare_ties",
    "dare_linear",
    "della",
    "multislerp",
}


@dataclass(frozen=True)
class Drawn:
    """One recipe, and the options that `plan` and `merge` get alike."""

    kind: str
    recipe: dict[str, Any]
    max_memory: str
    threads: int


def draw(root: Path, count: int, seed: int = 0) -> list[Drawn]:
    """``count`` recipes; the kinds take turns, everything else is chance."""
    chance = Random(seed)
    methods = list(DENSE)
    chance.shuffle(methods)
    kinds = ["dense"] * 28 + ["ota"] * 2 + ["adapter"] * 4 + ["experts"] * 5 + ["bundle"] * 4
    kinds += ["recover"] * 3 + ["slices"] * 4
    chance.shuffle(kinds)
    turns = {"dense": _turns(methods), "experts": _turns(moe_merge.METHODS), "bundle": _turns(BUNDLES)}
    found = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        method = next(turns[kind]) if kind in turns else kind
        made = MAKERS[kind](root, chance, method)
        limit = chance.choice(["256MiB", "384MiB", "512MiB", "768MiB", "1GiB"])
        found.append(Drawn(kind, made, limit, chance.choice([1, 2])))
    return found


def _turns(names: Any) -> Iterator[str]:
    while True:
        yield from names


def _family(root: Path, chance: Random) -> tuple[str, str, int, LlamaShape]:
    name = chance.choice(list(FAMILIES))
    return str(root / name / "base"), str(root / name / "ft_"), FAMILIES[name][1], FAMILIES[name][0]


def _dense(root: Path, chance: Random, method: str) -> dict[str, Any]:
    parameters, role, numbers = DENSE[method]
    base, tune, most, _ = _family(root, chance)
    n = min(most, chance.choice(numbers))
    models: list[dict[str, Any]] = [{"model": f"{tune}{i}"} for i in chance.sample(range(1, most + 1), n)]
    if method in WEIGHTED:
        for m in models:
            m["parameters"] = {"weight": round(chance.uniform(0.2, 1), 2)}
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters(chance)}
    if role != "none":
        recipe["base_model"] = base if role == "base" else models[0]["model"]
    if chance.random() < 0.5:
        recipe |= {"dtype": "float32", "out_dtype": "bfloat16"}
    return recipe


def _ota(root: Path, chance: Random, _: str) -> dict[str, Any]:
    models = [
        {
            "model": str(root / "wide" / f"ft_{i}"),
            "parameters": {"curvature": str(root / f"curvature_{i}.safetensors"), "density": 0.4, "weight": 1.0},
        }
        for i in (1, 2)
    ]
    scope = chance.choice(["model", "tensor"])
    return {
        "merge_method": "ota",
        "base_model": str(root / "wide" / "base"),
        "models": models,
        "parameters": {"power": 0.5, "density_scope": scope},
    }


def _adapter(root: Path, chance: Random, _: str) -> dict[str, Any]:
    base = str(root / "wide" / "base")
    chosen = chance.sample(range(len(RANKS)), chance.choice([1, 2, 3]))
    models = [{"model": f"{base}+{root / f'lora_{i}'}", "parameters": {"weight": 0.6}} for i in chosen]
    method = chance.choice(["task_arithmetic", "ties"])
    return {"merge_method": method, "base_model": base, "models": models, "dtype": "bfloat16"}


def _experts(root: Path, chance: Random, method: str) -> dict[str, Any]:
    return {
        "merge_method": method.partition(" ")[0],
        "models": [{"model": str(root / "moe" / "model")}],
        "parameters": {"num_experts": chance.choice([8, 16, 24]), **moe_merge.METHODS[method]},
        "calibration": {"statistics": str(root / "moe" / "statistics.safetensors")},
    }


BUNDLES: dict[str, Parameters] = {"tall_masks": {"lambda": 0.4}, "two_values": {}, "quantized": {"bits": 3}}


def _bundle(root: Path, chance: Random, method: str) -> dict[str, Any]:
    base, tune, most, _ = _family(root, chance)
    numbers = range(1, chance.choice(range(2, min(most, 4) + 1)) + 1)
    return _bundle_of(base, tune, numbers, method)


def _bundle_of(base: str, tune: str, numbers: range, method: str) -> dict[str, Any]:
    models = [{"model": f"{tune}{i}", "name": f"t{i}"} for i in numbers]
    return {"merge_method": method, "base_model": base, "models": models, "parameters": BUNDLES[method]}


def _recover(root: Path, chance: Random, _: str) -> dict[str, Any]:
    bundle, task = root / chance.choice(list(BUNDLES)), chance.choice(["t1", "t2"])
    return {"merge_method": "recover", "models": [{"model": str(bundle)}], "parameters": {"task": task}}


def _slices(root: Path, chance: Random, _: str) -> dict[str, Any]:
    _, tune, most, shape = _family(root, chance)
    slices = []
    for _ in range(chance.choice([2, 3, 4])):
        start = chance.randrange(shape.layers - 2)
        stop = chance.randrange(start + 1, shape.layers + 1)
        slices.append({"sources": [{"model": f"{tune}{chance.randint(1, most)}", "layer_range": [start, stop]}]})
    return {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}


MAKERS: dict[str, Callable[[Path, Random, str], dict[str, Any]]] = {
    "dense": _dense,
    "ota": _ota,
    "adapter": _adapter,
    "experts": _experts,
    "bundle": _bundle,
    "recover": _recover,
    "slices": _slices,
}


def build(root: Path) -> None:
    """All that the recipes merge, about 2.5 GB."""
    for name, (shape, fine_tunes) in FAMILIES.items():
        make_family(root / name, shape, fine_tunes)
    for i in (1, 2):
        _curvature(root / "wide" / f"ft_{i}", root / f"curvature_{i}.safetensors")
    for i, rank in enumerate(RANKS):
        _lora(root / f"lora_{i}", WIDE, rank, i)
    moe_merge.build(root / "moe" / "model")
    base, tune = str(root / "wide" / "base"), str(root / "wide" / "ft_")
    for method in BUNDLES:
        merge(_bundle_of(base, tune, range(1, 3), method), root / method, device="cpu", threads=1)


def _curvature(model: Path, file: Path) -> None:
    """Squares of noise under the model's names, in fp32."""
    chance = torch.Generator().manual_seed(0)
    found = {}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:  # type: ignore[no-untyped-call]
            for name in f.keys():  # noqa: SIM118  (not a mapping)
                found[name] = torch.rand(f.get_slice(name).get_shape(), generator=chance)
    save_file(found, file, {"format": "pt"})


def _lora(folder: Path, shape: LlamaShape, rank: int, seed: int) -> None:
    """An adapter of peft's form on every projection."""
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in shape.tensors().items():
        if "_proj" in name:
            key = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, size[1], generator=chance) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(size[0], rank, generator=chance) * 0.02
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
