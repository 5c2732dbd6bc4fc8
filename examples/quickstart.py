"""Merges the example fine-tunes and shows what the merge knows: held-out loss per domain, in a minute or two.

Run it with ``make demo``, or ``python examples/quickstart.py [OUT]`` from the repository's root.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from mergekit_lr import merge
from mergekit_lr.evaluation import evaluate, loss_table

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "quickstart.yml"
MODELS = ("base", "python", "c", "german")
TOKENS = 12_000  # of each held-out text: enough for differences of 0.01 nats, and quick


def main() -> None:
    out = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else HERE.parent / "demo-out"
    os.chdir(HERE)  # the recipe names its models relative to this folder
    console = Console()
    console.print(f"Merging {', '.join(MODELS[1:])} into {MODELS[0]} with {RECIPE.name} ...")
    result = merge(RECIPE, out, device="cpu", overwrite=True)
    run = result.report["run"]
    console.print(f"Wrote {result.out} in {run['seconds']:.1f} s. Measuring held-out loss ...")
    texts = sorted((HERE / "text" / "heldout").glob("*.txt"))
    folders = [*(HERE / "models" / name for name in MODELS), result.out]
    results = [evaluate(folder, texts, max_tokens=TOKENS) for folder in folders]
    console.print(loss_table(results, names=[*MODELS, "merge"]))


if __name__ == "__main__":
    main()
