"""Size against held-out loss of low-rank packing: extracted adapters, reversible bundles, unpacked experts.

    python benchmarks/packing_lowrank.py run [RESULT.json]      measure what the file lacks, row by row
    python benchmarks/packing_lowrank.py report [RESULT.json]   write the tables of docs/quality_lowrank.md

The three example fine-tunes (rank 4, 8, 16) and, where ``examples/zoo/build/lora-*`` are there, the two adapters of
rank 8. Each task is measured on held-out text of its own domain, 48 windows of 256 tokens spread evenly over it, in
fp32. Bytes are those of the tensors on disk; the base, which every row needs, is not counted. ``kept`` is the share of
the experts' gain over the base that is left: sum of (base - packed) over sum of (base - expert), in nats.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

from zoo import WORK, models  # noqa: E402
from zoo.text import heldout_tokens  # noqa: E402

from benchmarks.report import table  # noqa: E402
from mergekit_lr import extract_lora, merge, open_bundle  # noqa: E402
from mergekit_lr.checkpoint.open import open_model  # noqa: E402
from mergekit_lr.checkpoint.reference import ModelReference  # noqa: E402
from mergekit_lr.lowrank.adapters import read_whole  # noqa: E402

MODELS = ROOT / "examples" / "models"
FULL = ("python", "c", "german")
ADAPTERS = ("python", "german")
RESULT = ROOT / "benchmarks" / "results" / "packing-lowrank.json"
PAGE = ROOT / "docs" / "quality_lowrank.md"
WINDOWS, LENGTH = 48, 256
Row = dict[str, Any]


class Bench:
    """One live model, into which every candidate's weights go."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.base = MODELS / "base"
        self.model = models.load_base().float().eval()
        self.windows = {}
        for domain in FULL:
            tokens = heldout_tokens(domain)
            starts = np.linspace(0, len(tokens) // LENGTH - 1, WINDOWS).astype(int) * LENGTH
            self.windows[domain] = torch.from_numpy(np.stack([tokens[s : s + LENGTH].astype(np.int64) for s in starts]))

    def loss(self, domain: str) -> float:
        total = 0.0
        with torch.inference_mode():
            for part in self.windows[domain].split(16):
                logits = self.model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1)
                losses = torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="none")
                total += float(losses.double().sum())
        return total / (WINDOWS * (LENGTH - 1))

    def of_reference(self, reference: str, domain: str) -> float:
        """Loss of a model, or of an adapter on its base, as the package reads it."""
        with open_model(ModelReference.parse(reference)) as checkpoint:
            state = {n: read_whole(checkpoint, n).float() for n in checkpoint.tensors}
        self.model.load_state_dict(state, strict=False)
        return self.loss(domain)


def stored(folder: Path) -> int:
    """Bytes of all tensors in a folder."""
    return sum(t.nbytes for p in folder.glob("*.safetensors") for t in load_file(p).values())


def unpacked(bench: Bench, domains: tuple[str, ...], references: dict[str, str], size: int) -> Row:
    return {"bytes": size, "loss": {d: bench.of_reference(references[d], d) for d in domains}}


def extracted(bench: Bench, folder: Path, rank: int, embeddings: Any) -> Row:
    """Plain SVD packing: an adapter for each fine-tune."""
    size, losses, errors = 0, {}, {}
    for d in FULL:
        out = folder / f"{d}-{rank}-{embeddings}"
        report = extract_lora(
            MODELS / d, bench.base, out, rank=rank, embeddings=embeddings, dtype="bfloat16", device="cpu", threads=1
        ).report
        size += report["bytes"]
        errors[d] = report["relative_error"]
        losses[d] = bench.of_reference(f"{bench.base}+{out}", d)
    return {"bytes": size, "loss": losses, "error": errors}


def packed(bench: Bench, folder: Path, references: dict[str, str], **parameters: Any) -> Row:
    """A bundle of `reversible`, every task swapped into the live model."""
    recipe = {
        "merge_method": "reversible",
        "base_model": str(bench.base),
        "models": [{"model": r, "name": d} for d, r in references.items()],
        "parameters": parameters,
    }
    out = folder / "bundle"
    merge(recipe, out, device="cpu", threads=1, overwrite=True)
    summary = json.loads((out / "packing.json").read_text())
    with open_bundle(out) as bundle:
        losses = {}
        for d in references:
            bundle.load_into(bench.model, d, threads=1)
            losses[d] = bench.loss(d)
    return {
        "bytes": stored(out),
        "loss": losses,
        "error": summary["relative_error"],
        "residual_energy": summary["residual_energy"],
        "ratio_to_pairs": summary["storage"]["ratio_to_pairs"],
        "p_for_99_percent": summary["p_for_99_percent"],
    }


def rows(bench: Bench, folder: Path) -> dict[str, dict[str, Any]]:
    """Every row by name, as a function that measures it."""
    full = {d: str(MODELS / d) for d in FULL}
    sizes = sum(stored(MODELS / d) for d in FULL)
    found: dict[str, Any] = {
        "full/base": lambda: unpacked(bench, FULL, dict.fromkeys(FULL, str(bench.base)), 0),
        "full/experts": lambda: unpacked(bench, FULL, full, sizes),
    }
    for rank in (4, 8, 16):
        found[f"full/svd r={rank}"] = lambda r=rank: extracted(bench, folder, r, "lora")
        for p in (0, 1, 2):
            found[f"full/reversible r={rank} p={p}"] = lambda r=rank, p=p: packed(
                bench, folder, full, basis=p, rank=r, embeddings="low_rank"
            )
    found["full/svd r=16, embeddings whole"] = lambda: extracted(bench, folder, 16, "save")
    found["full/reversible r=16 p=1, embeddings whole"] = lambda: packed(bench, folder, full, basis=1, rank=16)
    for name, more in {"aligned": {"gauge": "aligned"}, "tensor": {"granularity": "tensor"}}.items():
        found[f"full/reversible r=16 p=1, {name}"] = lambda m=more: packed(
            bench, folder, full, basis=1, rank=16, embeddings="low_rank", **m
        )
    adapters = {d: f"{bench.base}+{WORK / f'lora-{d}'}" for d in ADAPTERS}
    if all((WORK / f"lora-{d}" / "README.md").exists() for d in ADAPTERS):
        size = sum(stored(WORK / f"lora-{d}") for d in ADAPTERS)
        found["lora/base"] = lambda: unpacked(bench, ADAPTERS, dict.fromkeys(ADAPTERS, str(bench.base)), 0)
        found["lora/adapters"] = lambda: unpacked(bench, ADAPTERS, adapters, size)
        for rank in (4, 8):
            for p in (0, 1):
                found[f"lora/reversible r={rank} p={p}"] = lambda r=rank, p=p: packed(
                    bench, folder, adapters, basis=p, rank=r
                )
        found["lora/reversible r=8 p=0, aligned"] = lambda: packed(
            bench, folder, adapters, basis=0, rank=8, gauge="aligned"
        )
    return found


def run(path: Path) -> None:
    result = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    result["machine"] = f"{platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    bench = Bench()
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in rows(bench, Path(folder)).items():
            if name not in result["rows"]:
                result["rows"][name] = measure()
                print(name, result["rows"][name], flush=True)
                path.write_text(json.dumps(result, indent=1) + "\n")


def report(path: Path) -> None:
    result = json.loads(path.read_text())
    text = PAGE.read_text()
    for part in ("full", "lora"):
        found = {n.partition("/")[2]: r for n, r in result["rows"].items() if n.startswith(part)}
        if not found:
            continue
        section = f"{result['machine']}\n\n{_table(found, 'experts' if part == 'full' else 'adapters')}"
        begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{section}\n{end}{rest.split(end, 1)[1]}"
    PAGE.write_text(text)


def _table(found: dict[str, Row], expert: str) -> str:
    base, best = found["base"]["loss"], found[expert]["loss"]
    gain = sum(base[d] - best[d] for d in base)
    lines = []
    for name, row in found.items():
        kept = sum(base[d] - row["loss"][d] for d in base) / gain
        error = max(row.get("error", {"": 0.0}).values())
        ratio = f"{row['ratio_to_pairs']:.3f}" if "ratio_to_pairs" in row else ""
        losses = [f"{row['loss'][d]:.4f}" for d in base]
        lines.append([name, f"{row['bytes']:,}", ratio, *losses, f"{error:.3g}" if error else "", f"{kept:.1%}"])
    return table(["packed as", "bytes", "of the pairs", *base, "largest error", "kept"], lines)


if __name__ == "__main__":
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULT
    {"run": run, "report": report}[sys.argv[1]](where)
