"""What `plan` says a run's processes will take, against what the operating system counted.

    python benchmarks/memory.py [--count 50] [--seed 0] [--work FOLDER] [--out results/memory.json] [--page PAGE.md]

Fifty random recipes (`memory_recipes.py`) over synthetic checkpoints, each under a random ``--max-memory`` with one or
two threads: what ``mergekit-lr plan --json`` says, and ``mergekit-lr merge`` with the same options in a fresh process.
Measured is anonymous memory over the process and its forked workers, pages that they share counted once
(``Pss_Anon``), every 10 ms; the page cache is not in it, because the system takes it back when it is short.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from measure import machine, run
from memory_recipes import Drawn, build, draw

from mergekit_lr import plan

ROOT = Path(__file__).resolve().parent.parent
TARGET = 1.15
INTERVAL = 0.03  # seconds between two looks at the processes: one look takes milliseconds of a core
COMMAND = [sys.executable, "-c", "from mergekit_lr.cli.app import main; main()"]
NAMES = {"dense": "dense methods", "ota": "`ota`", "adapter": "models with LoRAs", "experts": "fewer experts"}
NAMES |= {"bundle": "bundles", "recover": "`recover`", "slices": "slices of layers"}


def measured(drawn: Drawn, work: Path) -> dict[str, Any]:
    """One recipe: what its plan says and what its merge took, in bytes."""
    recipe, out = work / "recipe.json", work / "out"
    recipe.write_text(json.dumps(drawn.recipe))
    options = ["--max-memory", drawn.max_memory, "--threads", str(drawn.threads), "--device", "cpu"]
    laid_out = plan(recipe, device="cpu", max_memory=drawn.max_memory, threads=drawn.threads)
    planned = laid_out.to_dict()  # what `plan --json` prints
    sample = run([*COMMAND, "merge", str(recipe), str(out), *options], work, _environment(), INTERVAL)
    shutil.rmtree(out)
    found = {
        "kind": drawn.kind,
        "method": drawn.recipe["merge_method"],
        "inputs": len(planned["models"]) + len(planned["companions"]),
        "tensors": planned["tensors"],
        "max_memory": drawn.max_memory,
        "threads": drawn.threads,
        "held": planned["peak_memory"],
        "planned": planned["peak_process_memory"],
        "measured": sample.anonymous,
    }
    return found | {"ratio": round(sample.anonymous / found["planned"], 3)}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["rows"]
    lines = [
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores; {len(rows)} recipes, seed {result['seed']}.",
        "",
        "| recipes | number | planned, MB | measured, MB | measured / planned: least | median | most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    kinds = [k for k in NAMES if any(r["kind"] == k for r in rows)]
    for name, chosen in [*((NAMES[k], [r for r in rows if r["kind"] == k]) for k in kinds), ("all", rows)]:
        ratios = [r["ratio"] for r in chosen]
        megabytes = [
            f"{min(r[key] for r in chosen) / 1e6:.0f}–{max(r[key] for r in chosen) / 1e6:.0f}"
            for key in ("planned", "measured")
        ]
        cells = [name, str(len(chosen)), *megabytes, *(f"{f(ratios):.2f}" for f in (min, median, max))]
        lines.append(f"| {' | '.join(cells)} |")
    within = sum(r["ratio"] <= TARGET for r in rows)
    reached = "yes" if within == len(rows) else "**no**"
    return "\n".join([*lines, "", f"At most {TARGET} times the plan: {within} of {len(rows)}; reached: {reached}."])


def renewed(page: str, result: dict[str, Any]) -> str:
    """The page with the result's table between its markers."""
    before, _, rest = page.partition("<!-- memory:begin -->\n")
    after = rest.partition("<!-- memory:end -->")[2]
    return f"{before}<!-- memory:begin -->\n{table(result)}\n<!-- memory:end -->{after}"


def main() -> None:
    """Build, measure each recipe, write the result and the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep the checkpoints here (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.work or Path(scratch) / "models"
        if not (models / "built").exists():
            build(models)
            (models / "built").touch()
        rows = []
        for drawn in draw(models, arguments.count, arguments.seed):
            rows.append(measured(drawn, Path(scratch)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {"machine": machine(), "seed": arguments.seed, "target": TARGET, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if arguments.page:
        arguments.page.write_text(renewed(arguments.page.read_text(), result))


if __name__ == "__main__":
    main()
