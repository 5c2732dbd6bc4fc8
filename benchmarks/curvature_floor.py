"""`ota` of three fine-tunes with their second moments against reading its inputs and writing its output.

    python benchmarks/curvature_floor.py [RESULT.json] [--rounds N]

Makes Llama-shaped bf16 checkpoints of 46 M parameters and fp32 moments. In one process, in turn: the floor (every
input byte read into one reused buffer, one output written and synced, one thread) and merges; the first merge warms up
and is not counted. Wall and CPU seconds, medians. Targets: at most 4 times the floor with moments; rank-1 moments add
at most one percent of the models' bytes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoints import LlamaShape, make_family
from measure import machine
from safetensors.torch import load_file, save_file

import mergekit_lr

SHAPE = LlamaShape(hidden=768, intermediate=2048, layers=6, heads=12, vocabulary=4096, shards=1)
RESULT = Path(__file__).parent / "results" / "curvature-floor.json"
MODELS = ("ft_1", "ft_2", "ft_3")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ota, no mask": ("full", {}),
    "ota, density 0.4 of each tensor": ("full", {"density": 0.4, "density_scope": "tensor"}),
    "ota, density 0.4 of the model": ("full", {"density": 0.4}),
    "ota, rank-1 moments, no mask": ("rank1", {}),
}


def cpu() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in both)


def floor(files: list[Path], out: Path, size: int) -> None:
    buffer = bytearray(4 << 20)
    for path in files:
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    with out.open("wb", buffering=0) as f:
        for start in range(0, size, len(buffer)):
            f.write(memoryview(buffer)[: min(len(buffer), size - start)])
        os.fsync(f.fileno())


def main() -> None:
    named = [a for a in sys.argv[1:] if a.endswith(".json")]
    rounds = next((int(b) for a, b in zip(sys.argv, sys.argv[1:], strict=False) if a == "--rounds"), 3)
    root = Path(tempfile.mkdtemp(prefix="curvature-floor-"))
    try:
        make_family(root, SHAPE, 3)
        sizes: dict[str, int] = {}
        for k, name in enumerate(MODELS):
            weights = load_file(next((root / name).glob("*.safetensors")))
            g = torch.Generator().manual_seed(k)
            moments = {n: torch.randn(w.shape, generator=g).square_().mul_(1e-12) for n, w in weights.items()}
            save_file(moments, root / f"{name}-full.safetensors")
            mergekit_lr.curvature(root / f"{name}-full.safetensors", root / f"{name}-rank1.safetensors", form="rank1")
            sizes[name] = sum(w.numel() * 2 for w in weights.values())
        measured = {case: one(root, form, shared, rounds, sizes["ft_1"]) for case, (form, shared) in CASES.items()}
        rank1 = sum((root / f"{n}-rank1.safetensors").stat().st_size for n in MODELS) / sum(sizes.values())
        data = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "parameters": SHAPE.parameters(),
                "cases": measured, "rank1_share_of_bytes": round(rank1, 5)}  # fmt: skip
        (Path(named[0]) if named else RESULT).write_text(json.dumps(data, indent=1) + "\n")
    finally:
        shutil.rmtree(root)


def one(root: Path, form: str, shared: dict[str, Any], rounds: int, size: int) -> dict[str, float]:
    """Floor and merge in turn."""
    entries = [
        {"model": str(root / n), "parameters": {"curvature": str(root / f"{n}-{form}.safetensors")}} for n in MODELS
    ]
    recipe = {"merge_method": "ota", "base_model": str(root / "base"), "models": entries, "parameters": shared}
    files = [p for n in (*MODELS, "base") for p in (root / n).glob("*.safetensors")]
    files += [root / f"{n}-{form}.safetensors" for n in MODELS]
    took: dict[str, list[float]] = {"floor_s": [], "floor_cpu_s": [], "merge_s": [], "merge_cpu_s": []}
    for k in range(rounds + 1):
        for what in ("floor", "merge"):
            out = root / "out"
            shutil.rmtree(out, ignore_errors=True)
            began, used = time.perf_counter(), cpu()
            if what == "floor":
                floor(files, root / "out.bin", size)
            else:
                mergekit_lr.merge(recipe, out, device="cpu")
            if k:
                took[f"{what}_s"].append(time.perf_counter() - began)
                took[f"{what}_cpu_s"].append(cpu() - used)
    found = {name: round(median(values), 3) for name, values in took.items()}
    found["ratio"] = round(found["merge_s"] / found["floor_s"], 2)
    found["bytes_in"] = sum(p.stat().st_size for p in files)
    print(form, shared, found, flush=True)
    return found


if __name__ == "__main__":
    main()
