"""Planning time and memory against the number of tensors, from headers alone.

    python benchmarks/planning.py

Makes mixture-of-experts-shaped checkpoints whose headers are real and whose data is a hole in the file (planning must
not read it), and plans a three-model TIES merge of each size in a fresh process, interpreter and imports apart.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from measure import machine, run
from report import write_table

HERE = Path(__file__).parent
SIZES = (12_500, 25_000, 50_000, 100_000)
MODELS = ("base", "ft_1", "ft_2")
EXPERTS = 64
SHAPE = (64, 32)
PER_SHARD = 5_000
RECIPE = """\
merge_method: ties
base_model: ./base
models:
  - {model: ./ft_1, parameters: {weight: 0.5, density: [0.2, 0.8]}}
  - {model: ./ft_2, parameters: {weight: [{filter: gate_proj, value: 0.3}, {value: 0.5}], density: 0.5}}
dtype: bfloat16
"""


def tensor_names(count: int) -> list[str]:
    """Names of a mixture of experts, ``count`` of them."""
    kinds = ("gate_proj", "up_proj", "down_proj")
    per_layer = EXPERTS * len(kinds)
    return [
        f"model.layers.{i // per_layer}.mlp.experts.{i // len(kinds) % EXPERTS}.{kinds[i % len(kinds)]}.weight"
        for i in range(count)
    ]


def make_hollow(folder: Path, names: list[str]) -> None:
    """A sharded bf16 checkpoint with true headers and no data on disk."""
    folder.mkdir(parents=True)
    size = 2 * SHAPE[0] * SHAPE[1]
    groups = [names[start : start + PER_SHARD] for start in range(0, len(names), PER_SHARD)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header = {
            name: {"dtype": "BF16", "shape": SHAPE, "data_offsets": [i * size, (i + 1) * size]}
            for i, name in enumerate(group)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.truncate(8 + len(text) + size * len(group))
        weight_map |= dict.fromkeys(group, file_name)
    index = {"metadata": {"total_size": size * len(names)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = -(-len(names) // (3 * EXPERTS))
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": EXPERTS}
    (folder / "config.json").write_text(json.dumps(config))


def plan_once(recipe: str) -> None:
    """Plan in this process and print one JSON line; a first plan of a tiny merge brings in the modules."""
    from mergekit_lr import plan

    plan(str(Path("tiny") / recipe), device="cpu")
    started, cpu = time.perf_counter(), time.process_time()
    plan(recipe, device="cpu")
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}))


def measure(root: Path, count: int, repeats: int) -> dict[str, float]:
    """The fastest of ``repeats`` plans over ``count`` tensors (what differs between them is other processes)."""
    here = root / str(count)
    for folder, number in ((here, count), (here / "tiny", 12)):
        for model in MODELS:
            make_hollow(folder / model, tensor_names(number))
        (folder / "recipe.yml").write_text(RECIPE)
    tiny = (here / "tiny" / "recipe.yml").read_text().replace("./", "./tiny/")
    (here / "tiny" / "recipe.yml").write_text(tiny)
    command = [sys.executable, str(HERE / "planning.py"), "--one", "recipe.yml"]
    best = min((run(command, here, os.environ) for _ in range(repeats)), key=lambda sample: sample.seconds)
    shutil.rmtree(here)
    return {"tensors": count, **best.to_dict()}


def main() -> None:
    """Measure every size, write the result file and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "performance.md")
    options = parser.parse_args()
    if options.one:
        plan_once(options.one)
        return
    with tempfile.TemporaryDirectory(prefix="mergekit_lr-planning-") as root:
        rows = [measure(Path(root), count, options.repeats) for count in SIZES]
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "software": {"mergekit-lr": version("mergekit-lr")},
        "models": len(MODELS),
        "rows": rows,
    }
    options.results.mkdir(exist_ok=True)
    path = options.results / f"planning-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_table(options.docs, "planning", path)


if __name__ == "__main__":
    main()
