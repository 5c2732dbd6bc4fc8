"""Plans of a model of 1T parameters, 61 layers and 384 experts, from headers alone: time, memory, table and picture.

    python benchmarks/plan_1t.py

Each recipe is planned by the command in a process of its own, interpreter and imports included, over the hollow
checkpoints of ``giant.py``. Writes the result file, the table in docs/planning.md and the pictures beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import giant
from measure import machine

HERE = Path(__file__).parent
MODELS = ("base", "chat", "code", "math")
FINE_TUNES = "\n".join(f"  - {{model: ./{m}, parameters: {{weight: 0.4}}}}" for m in MODELS[1:])
CALIBRATION = "calibration: {text: [./text.txt], samples: 128, sequence_length: 2048}"
MOE = "models: [{model: ./base}]"
RECIPES = {
    "task_arithmetic": f"merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n{FINE_TUNES}\ndtype: bfloat16\n",
    "ties": f"merge_method: ties\nbase_model: ./base\nmodels:\n{FINE_TUNES}\nparameters: {{density: 0.2}}\n",
    "reap": f"merge_method: reap\n{MOE}\nparameters: {{num_experts: 192}}\n{CALIBRATION}\n",
    "width_shrink": f"merge_method: width_shrink\n{MOE}\nparameters: {{keep: 0.5}}\n{CALIBRATION}\n",
}
DRAWN = ("task_arithmetic", "reap")
BANDWIDTH = "2GB/s"
SECONDS, MEMORY = 10.0, 10**9  # targets


def plan_once(folder: Path, name: str, drawn: bool) -> dict[str, Any]:
    """Plan one recipe with the command; what it says, and what it took."""
    (folder / f"{name}.yml").write_text(RECIPES[name])
    command = [str(Path(sys.executable).with_name("mergekit-lr")), "plan", f"{name}.yml", "--json"]
    command += ["--device", "cpu", "--bandwidth", BANDWIDTH]
    command += ["--graph", f"{name}.svg"] if drawn else []
    with (folder / "plan.json").open("wb") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    said = json.loads((folder / "plan.json").read_text())
    took = {"seconds": round(wall, 2), "cpu": round(usage.ru_utime + usage.ru_stime, 2), "rss": usage.ru_maxrss * 1024}
    kept = ("tensors", "parameters", "bytes_in", "bytes_out", "units", "peak_memory", "disk_needed", "transfer_seconds")
    return {"recipe": name, **took, "files": len(said["shards"]), **{k: said[k] for k in kept}}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    m = result["machine"]
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, Linux {m['linux']}, load {result['load']:.1f} before; "
        f"mergekit-lr {result['software']['mergekit-lr']}; {result['date']}.",
        "",
        "| recipe | tensors | reads, TB | writes, TB | files | units | at 2 GB/s, min | tensors in memory, MiB "
        "| plan, s | CPU, s | peak resident, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in result["rows"]:
        cells = (
            *(f"`{r['recipe']}`", f"{r['tensors']:,}", f"{r['bytes_in'] / 1e12:.2f}", f"{r['bytes_out'] / 1e12:.2f}"),
            *(str(r["files"]), f"{r['units']:,}", f"{r['transfer_seconds'] / 60:.0f}"),
            *(f"{r['peak_memory'] / 2**20:.0f}", f"{r['seconds']:.1f}", f"{r['cpu']:.1f}", f"{r['rss'] / 1e6:.0f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    fast = all(r["seconds"] <= SECONDS for r in result["rows"])
    cheap = all(r["cpu"] <= SECONDS for r in result["rows"])
    small = all(r["rss"] <= MEMORY for r in result["rows"])
    reached = "yes" if fast and small else "in CPU seconds" if cheap and small else "**no**"
    return "\n".join([*lines, "", f"Target: each in ≤ 10 s and ≤ 1 GB: {reached}."])


def main() -> None:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="mergekit_lr-1t-") as root:
        folder = Path(root)
        for model in MODELS:
            giant.write(folder / model)
        (folder / "text.txt").write_text("text\n")
        rows = [
            min((plan_once(folder, name, drawn=False) for _ in range(options.repeats)), key=lambda row: row["seconds"])
            for name in RECIPES
        ]
        for name in DRAWN:
            plan_once(folder, name, drawn=True)
            (options.docs / f"planning_1t_{name}.svg").write_bytes((folder / f"{name}.svg").read_bytes())
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "load": round(load, 2),
        "software": {"mergekit-lr": version("mergekit-lr")},
        "bandwidth": BANDWIDTH,
        "rows": rows,
    }
    (options.results / "plan-1t.json").write_text(json.dumps(result, indent=1) + "\n")
    page = options.docs / "planning.md"
    before, _, rest = page.read_text().partition("<!-- plan-1t:begin -->")
    _, _, after = rest.partition("<!-- plan-1t:end -->")
    page.write_text(f"{before}<!-- plan-1t:begin -->\n{table(result)}\n<!-- plan-1t:end -->{after}")


if __name__ == "__main__":
    main()
