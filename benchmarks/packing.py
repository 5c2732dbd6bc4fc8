"""Packing task models: size against held-out loss, the time of a recovery, and the speed of a swap.

    python benchmarks/packing.py quality|speed [--models FOLDER] [--page docs/quality_packing.md]

``quality`` packs the example fine-tunes by every recipe of `ROWS` and measures each recovered task on the second half
of its held-out text; lambda is chosen on the first half. ``speed`` times `recover` against a floor that reads the same
bytes and writes the same model, and `load_into` against copying memory, on synthetic bf16 models. Results are merged
into ``benchmarks/results/packing.json``, from which the page's tables are written.

A row is a label and a function that gives a recipe for a folder of models; add to `ROWS` for another method.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from floor import plain
from measure import machine, read_into_cache
from safetensors.torch import save_file

from mergekit_lr import merge, open_bundle, recover
from mergekit_lr.evaluation import batch_loss, load_for_evaluation, windows

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "packing.json"
TASKS = ("python", "c", "german")
WINDOW, COUNT = 256, 48  # tokens of a window, windows measured of each half
GAIN, RECOVER, SWAP, SIZE = 0.99, 1.5, 0.6, 0.02  # targets


@dataclass(frozen=True)
class Row:
    """``recipe(models, texts)``: the packing recipe for a folder of example models."""

    label: str
    recipe: Callable[[Path, list[str]], dict[str, Any]]


def _full(method: str, **parameters: Any) -> Callable[[Path, list[str]], dict[str, Any]]:
    def recipe(models: Path, texts: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "merge_method": method,
            "base_model": str(models / "base"),
            "models": [{"model": str(models / t), "name": t} for t in TASKS],
            "parameters": parameters,
        }
        if parameters.get("lambda") == "grid" or parameters.get("masks") == "learned":
            found["calibration"] = {"text": texts, "samples": COUNT, "sequence_length": WINDOW}
        return found

    return recipe


ROWS = [
    Row("TALL, lambda 0.2", _full("tall_masks", **{"lambda": 0.2})),
    Row("TALL, lambda 0.4", _full("tall_masks", **{"lambda": 0.4})),
    Row("TALL, lambda 0.6", _full("tall_masks", **{"lambda": 0.6})),
    Row("TALL, lambda by held-out loss", _full("tall_masks", **{"lambda": "grid"})),
    Row("TALL, least squared error (lambda 1)", _full("tall_masks", **{"lambda": "auto"})),
    Row("TALL, least squared error, fitted factor", _full("tall_masks", **{"lambda": "auto", "factor": "fitted"})),
    Row(
        "TALL on TIES (half kept), lambda by held-out loss",
        _full("tall_masks", **{"lambda": "grid", "multi_task": "ties", "density": 0.5}),
    ),
    Row(
        "TALL on TIES over the model (half kept), lambda by held-out loss",
        _full("tall_masks", **{"lambda": "grid", "multi_task": "ties", "density": 0.5, "threshold_scope": "model"}),
    ),
    *(
        Row(
            f"TALL on TIES (half kept), masks learned from {what}",
            _full(
                "tall_masks",
                **{"lambda": 0.5, "multi_task": "ties", "density": 0.5, "masks": "learned", "label_weight": weight},
            ),
        )
        for what, weight in (("the expert", 0.0), ("expert and text", 0.05))
    ),
    Row("two values", _full("two_values")),
    *(Row(f"quantized, {bits} bit{'s' * (bits > 1)}", _full("quantized", bits=bits)) for bits in (1, 2, 3, 4, 6)),
    *(
        Row(f"quantized, {bits} bits, least squares", _full("quantized", bits=bits, scale="squares"))
        for bits in (2, 3, 4)
    ),
    Row("quantized, 3 bits, groups of 256", _full("quantized", bits=3, group=256)),
    *(
        Row(f"quantized, {bits} bits, from the base", _full("quantized", bits=bits, center="base"))
        for bits in (2, 3, 4, 6)
    ),
]


def halves(tokenizer: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """For each task the first half of its text, and windows of the second."""
    found = {}
    for task in TASKS:
        text = (ROOT / "examples" / "text" / "heldout" / f"{task}.txt").read_text(encoding="utf-8")
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
        ids = torch.tensor(tokenizer(second, add_special_tokens=False, verbose=False)["input_ids"])
        whole = [w for w in windows(ids, WINDOW) if len(w) == WINDOW + 1]
        found[task] = (first, torch.stack(whole[:: max(1, len(whole) // COUNT)][:COUNT]))
    return found


def loss(network: Any, batch: torch.Tensor) -> float:
    """Nats per token."""
    total = sum(batch_loss(network, b) for b in batch.split(8))
    return total / batch[:, 1:].numel()


def shard_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def quality(models: Path) -> dict[str, Any]:
    """Every row: bytes on disk, and for each task its loss and the share of the expert's gain that is kept."""
    network, tokenizer = load_for_evaluation(models / "base")
    texts = halves(tokenizer)
    base = {t: loss(network, texts[t][1]) for t in TASKS}
    experts = {t: loss(load_for_evaluation(models / t)[0], texts[t][1]) for t in TASKS}
    packed = sum(shard_bytes(models / t) for t in TASKS)
    rows = [
        {
            "label": "experts, unpacked",
            "bytes": packed,
            "ratio": 1.0,
            "loss": experts,
            "gain": dict.fromkeys(TASKS, 1.0),
        }
    ]
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for task, (first, _) in texts.items():
            files.append(str(Path(scratch) / f"{task}.txt"))
            Path(files[-1]).write_text(first, encoding="utf-8")
        for row in ROWS:
            out = Path(scratch) / "bundle"
            report = merge(row.recipe(models, files), out, device="cpu").report
            size, losses = shard_bytes(out), {}
            with open_bundle(out) as bundle:
                for task in TASKS:
                    bundle.load_into(network, task)
                    losses[task] = loss(network, texts[task][1])
            gain = {t: (base[t] - losses[t]) / (base[t] - experts[t]) for t in TASKS}
            lambdas = {t: f["lambda"] for t, f in report.get("details", {}).get("lambda", {}).items()}
            rows.append(
                {"label": row.label, "bytes": size, "ratio": size / packed, "loss": losses, "gain": gain}
                | ({"lambda": lambdas} if lambdas else {})
            )
            print(row.label, size, {t: round(g, 4) for t, g in gain.items()}, lambdas, flush=True)
            shutil.rmtree(out)
    return {
        "base": base,
        "window": WINDOW,
        "windows": COUNT,
        "rows": rows,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


class Holder(torch.nn.Module):
    """Parameters of the synthetic models by name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty_like(tensor)))


def speed(layers: int, repeats: int) -> dict[str, Any]:
    """Seconds of a recovery and of its floor, gigabytes a second of a swap and of a copy; medians."""
    shape = (4096, 4096)
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACKING_SCRATCH")) as scratch:
        root = Path(scratch)
        paths = []
        for m in range(5):
            folder = root / f"m{m}"
            folder.mkdir()
            g = torch.Generator().manual_seed(m)
            one = (torch.randn(shape, generator=g) * (1.0 if m == 0 else 0.01)).bfloat16()
            save_file({f"w{i}": (one + i / 64).bfloat16() for i in range(layers)}, folder / "model.safetensors")
            paths.append(folder)
        models = [{"model": str(p), "name": p.name} for p in paths[1:]]
        recipe = {"merge_method": "tall_masks", "base_model": str(paths[0]), "models": models}
        began = time.perf_counter()
        merge(recipe, root / "bundle", device="cpu")
        packing = time.perf_counter() - began
        size = shard_bytes(root / "bundle") / sum(shard_bytes(p) for p in paths[1:])
        floors, recoveries = [], []
        for k in range(repeats):
            read_into_cache([root / "bundle", *paths[:2]])
            floors.append(plain(paths[:2], root / f"floor{k}")["total"])
            (root / f"floor{k}").unlink()
            began = time.perf_counter()
            recover(root / "bundle", "m2", root / f"out{k}", device="cpu")
            recoveries.append(time.perf_counter() - began)
            shutil.rmtree(root / f"out{k}")
        module = Holder({f"w{i}": one for i in range(layers)})
        with open_bundle(root / "bundle") as bundle:
            bundle.hold()
            bundle.load_into(module, "m1")
            swaps, copies = [], []
            other = torch.empty(layers * shape[0] * shape[1], dtype=torch.bfloat16)
            source = torch.full_like(other, 1.0)  # zeros would be one page of the kernel's, read from cache
            for k in range(max(5, repeats)):
                swaps.append(bundle.load_into(module, f"m{1 + k % 4}").gigabytes_per_second)
                began = time.perf_counter()
                other.copy_(source)
                copies.append(2 * other.numel() * 2 / (time.perf_counter() - began) / 1e9)
    return {
        "parameters": layers * shape[0] * shape[1],
        "tasks": 4,
        "pack_seconds": packing,
        "ratio": size,
        "formula": (2 + 4 / 16) / 4,
        "floor_seconds": floors,
        "recover_seconds": recoveries,
        "recover_ratio": median(recoveries) / median(floors),
        "swap_gb_per_s": swaps,
        "copy_gb_per_s": copies,
        "swap_ratio": median(swaps) / median(copies),
    }


def quality_table(found: dict[str, Any]) -> str:
    head = "| bundle | MB | of unpacked | " + " | ".join(f"{t} loss | gain kept" for t in TASKS) + " | 99 % |"
    lines = [head, "|---|---|---|" + "---|---|" * len(TASKS) + "---|"]
    for row in found["rows"]:
        cells = " | ".join(f"{row['loss'][t]:.4f} | {100 * row['gain'][t]:.1f} %" for t in TASKS)
        picked = row.get("lambda")
        label = row["label"] + (f" ({', '.join(f'{t} {x}' for t, x in picked.items())})" if picked else "")
        reached = "yes" if min(row["gain"].values()) >= GAIN else "no"
        lines.append(f"| {label} | {row['bytes'] / 1e6:.2f} | {row['ratio']:.3f} | {cells} | {reached} |")
    base = ", ".join(f"{t} {found['base'][t]:.4f}" for t in TASKS)
    return "\n".join(
        [
            *lines,
            "",
            f"The base's losses: {base}. Nats per token, {found['windows']} windows of {found['window']} tokens.",
        ]
    )


def speed_table(found: dict[str, Any]) -> str:
    def mark(ok: bool) -> str:
        return "yes" if ok else "**no**"

    off = abs(found["ratio"] / found["formula"] - 1)
    return "\n".join(
        [
            "| what | measured | target | reached |",
            "|---|---|---|---|",
            f"| shards of {found['tasks']} tasks, of their checkpoints | {found['ratio']:.4f} "
            f"(formula {found['formula']:.4f}) | within 2 % | {mark(off <= SIZE)} |",
            f"| `recover` {median(found['recover_seconds']):.2f} s, floor {median(found['floor_seconds']):.2f} s | "
            f"{found['recover_ratio']:.2f}x | at most {RECOVER}x | {mark(found['recover_ratio'] <= RECOVER)} |",
            f"| `load_into` {median(found['swap_gb_per_s']):.1f} GB/s, "
            f"copy {median(found['copy_gb_per_s']):.1f} GB/s | "
            f"{100 * found['swap_ratio']:.0f} % | at least {100 * SWAP:.0f} % | {mark(found['swap_ratio'] >= SWAP)} |",
            "",
            f"{found['parameters'] / 1e6:.0f} million bf16 parameters; packed in {found['pack_seconds']:.1f} s. "
            f"{found['machine']['cpu']}, {found['machine']['cores']} cores, load {found['load'][0]:.1f} before and "
            f"{found['load'][1]:.1f} after.",
        ]
    )


def write_page(page: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of ``page``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = page.read_text().split(begin)
    page.write_text(head + begin + "\n" + text + "\n" + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["quality", "speed"])
    parser.add_argument("--models", type=Path, default=ROOT / "examples" / "models")
    parser.add_argument("--layers", type=int, default=10, help="layers of 16.8 million parameters in the speed part")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality_packing.md")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    found = quality(args.models) if args.part == "quality" else speed(args.layers, args.repeats)
    found |= {"machine": machine(), "torch": torch.__version__, "load": [before, os.getloadavg()[0]]}
    everything = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    everything[args.part] = found
    RESULT.write_text(json.dumps(everything, indent=1) + "\n")
    write_page(args.page, f"packing-{args.part}", (quality_table if args.part == "quality" else speed_table)(found))


if __name__ == "__main__":
    main()
