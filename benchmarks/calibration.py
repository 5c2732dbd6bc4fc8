"""Calibration against one plain forward over the same tokens, in one run, in turns.

    python benchmarks/calibration.py examples/zoo/build/qwen3-moe examples/zoo/build/mixtral

Contestants, each on the same windows of the held-out texts:

``forward``     the loaded model in transformers, one thread, the quicker of its two CPU ways to run experts
                (a loop over experts, one grouped product); reading weights and text is not counted
``routed``      ``mergekit_lr.calibrate`` as a whole, weights and text read, file written: routed statistics
``similarity``  the same, and all experts on a sample of 4096 tokens
``linear``      routed statistics and the input Gram of every Linear

CPU seconds of the process are compared, so that neighbours on the machine matter little. The result goes to
``results/``, the table into ``docs/calibration.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import machine
from report import conditions, table
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import mergekit_lr
from mergekit_lr.calibration.layers import windows_for
from mergekit_lr.calibration.text import Windows
from mergekit_lr.checkpoint.model import open_folder

HERE = Path(__file__).parent
TEXTS = sorted((HERE.parent / "examples" / "text" / "heldout").glob("*.txt"))
CALIBRATIONS: dict[str, dict[str, Any]] = {
    "routed": {"similarity_tokens": 0},
    "similarity": {"similarity_tokens": 4096},
    "linear": {"similarity_tokens": 0, "grams": ("linear",)},
}
TARGET = 2.0


def forward(network: Any, windows: Windows, experts: str) -> float:
    """CPU seconds of one forward over all windows."""
    network.set_experts_implementation(experts)
    began = time.process_time()
    with torch.inference_mode():
        for batch in windows.batches():
            network(input_ids=batch.ids, use_cache=False)
    return time.process_time() - began


def calibration(folder: Path, settings: dict[str, int], more: dict[str, Any]) -> float:
    """CPU seconds of one whole calibration."""
    with tempfile.TemporaryDirectory() as work:
        began = time.process_time()
        mergekit_lr.calibrate(folder, Path(work) / "s.safetensors", TEXTS, device="cpu", **settings, **more)
        return time.process_time() - began


def measure(folder: Path, settings: dict[str, int], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contestant; the first round warms up and is not kept."""
    with open_folder(folder, folder.name) as checkpoint:
        windows = windows_for(checkpoint, TEXTS, **settings, seed=0)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        seconds = {f"forward_{e}": forward(network, windows, e) for e in ("eager", "grouped_mm")}
        seconds |= {name: calibration(folder, settings, more) for name, more in CALIBRATIONS.items()}
        print(folder.name, turn, {n: round(s, 2) for n, s in seconds.items()}, flush=True)
        if turn:
            for name, value in seconds.items():
                found.setdefault(name, []).append(round(value, 4))
    return found


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One line for each model: the forward in seconds, then ratios."""
    lines = []
    for model, samples in result["models"].items():
        floor = min(median(samples["forward_eager"]), median(samples["forward_grouped_mm"]))
        ratios = [median(samples[name]) / floor for name in CALIBRATIONS]
        lines.append([model, f"{floor:.2f}", *(f"{r:.2f}" for r in ratios)])
    return lines


def page(result: dict[str, Any]) -> str:
    """The table and what it was measured with."""
    head = ["model", "forward, CPU s", "routed", "with similarity", "with linear Grams"]
    return f"{table(head, rows(result))}\n\n{conditions(result)}"


def write(doc: Path, content: str) -> None:
    """Replace what is between the markers."""
    before, _, rest = doc.read_text().partition("<!-- calibration:begin -->\n")
    after = rest.partition("<!-- calibration:end -->")[2]
    doc.write_text(f"{before}<!-- calibration:begin -->\n{content}\n<!-- calibration:end -->{after}")


def main() -> None:
    """Measure, write the result file, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    settings = {"samples": options.samples, "sequence_length": options.sequence_length}
    today = datetime.date.today().isoformat()
    result = {
        "date": today,
        "machine": machine(),
        "software": {name: version(name) for name in ("torch", "transformers")},
        "settings": settings,
        "target": TARGET,
        "models": {folder.name: measure(folder, settings, options.repeats) for folder in options.models},
    }
    (HERE / "results" / f"calibration-{today}.json").write_text(json.dumps(result, indent=1) + "\n")
    write(HERE.parent / "docs" / "calibration.md", page(result))


if __name__ == "__main__":
    main()
