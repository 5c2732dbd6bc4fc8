"""What merging experts costs once statistics are there: against reading the model and writing the output.

A model of random numbers in Qwen3-MoE's layout and statistics of random numbers: what is measured is bytes moved. The
floor is one thread that reads every byte of the model and writes as many as the output has, made durable
(`floor.plain`, its writing scaled to the output's size). Both run in turn, in one process each.

``python benchmarks/moe_merge.py [--repeats 3] [--out results/moe-merge.json]``
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from floor import plain

import mergekit_lr
from mergekit_lr.calibration.statistics import FORMAT, VERSION, model_digest
from mergekit_lr.checkpoint.model import open_folder
from mergekit_lr.checkpoint.writer import write_safetensors

LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 32, 1024, 512
METHODS = {
    "sub_moe": {"rank": "full"},
    "hc_smoe": {},
    "reap": {},
    "m_smoe": {},
    "sub_moe rank 0.5": {"rank": 0.5},
}


def build(folder: Path) -> None:
    """The model and, beside it, its statistics."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.randn(512, HIDDEN).bfloat16()}
    sums: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = torch.randn(EXPERTS, HIDDEN).bfloat16()
        for e in range(EXPERTS):
            for m in ("gate", "up", "down"):
                shape = (HIDDEN, WIDTH) if m == "down" else (WIDTH, HIDDEN)
                tensors[f"{block}.experts.{e}.{m}_proj.weight"] = (torch.randn(shape) * 0.02).bfloat16()
        x = torch.randn(EXPERTS, 64, dtype=torch.float64)
        gram = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(x, dim=1).T
        sums |= {
            f"{block}.experts.routing_count": torch.randint(100, 10_000, (EXPERTS,)),
            f"{block}.experts.expert_tokens": torch.tensor([1]),
            f"{block}.experts.expert_cosine_gram": gram,
            f"{block}.experts.router_gram": gram,
            f"{block}.experts.expert_output_sum": x.float(),
            f"{block}.experts.gated_norm_sum": torch.rand(EXPERTS, dtype=torch.float64),
        }
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH, "num_experts_per_tok": 4,
    }  # fmt: skip
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    with open_folder(folder, str(folder)) as opened:
        metadata = {"kind": FORMAT, "format_version": VERSION, "model_digest": model_digest(opened)}
    write_safetensors(folder.parent / "statistics.safetensors", sums, metadata)


def ours(work: Path, method: str, parameters: dict[str, object]) -> tuple[float, float]:
    """Seconds of a whole merge, and of it what came before writing: opening, deciding, laying out."""
    recipe = {
        "merge_method": method.partition(" ")[0],
        "models": [{"model": str(work / "model")}],
        "parameters": {"num_experts": EXPERTS // 2, **parameters},
        "calibration": {"statistics": str(work / "statistics.safetensors")},
    }
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    result = mergekit_lr.merge(recipe, out, device="cpu", threads=1)
    total = time.perf_counter() - began
    return total, total - float(result.report["run"]["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="where to build the model (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        build(work / "model")
        size = (work / "model" / "model.safetensors").stat().st_size
        ours(work, "reap", {})  # imports, and the model into the page cache
        written = sum(p.stat().st_size for p in (work / "out").glob("*.safetensors"))
        rows: dict[str, list[float]] = {name: [] for name in METHODS}
        before: dict[str, list[float]] = {name: [] for name in METHODS}
        floors = []
        for _ in range(arguments.repeats):
            parts = plain([work / "model"], work / "floor.bin")
            floors.append(parts["read"] + (parts["write"] + parts["fsync"]) * written / size)
            for name, parameters in METHODS.items():
                total, first = ours(work, name, parameters)
                rows[name].append(total)
                before[name].append(first)
    floor = min(floors)
    result = {
        "what": "seconds with one thread; ratio = least total / least floor",
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "model_bytes": size, "output_bytes": written, "floor": [round(f, 3) for f in floors],
        "methods": {
            name: {
                "seconds": [round(s, 3) for s in rows[name]],
                "of_it_before_writing": [round(s, 3) for s in before[name]],
                "ratio": round(min(rows[name]) / floor, 2),
                "writing_ratio": round(min(t - b for t, b in zip(rows[name], before[name], strict=True)) / floor, 2),
            }
            for name in METHODS
        },
    }  # fmt: skip
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
