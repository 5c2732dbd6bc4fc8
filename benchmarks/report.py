"""Result files as Markdown tables, written into docs/performance.md between markers.

    python benchmarks/report.py elementwise|planning RESULT.json [DOC.md]

A page holds ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; what is between them is generated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

FLOOR_TARGETS = {
    "linear": 1.1,
    "task_arithmetic": 1.1,
    "slerp": 1.6,
    "model_stock": 2.5,
    "dare_ties": 2.5,
    "ties": 2.5,
}
PEER_TARGETS = {
    "linear": 2.5,
    "task_arithmetic": 2.0,
    "slerp": 2.5,
    "model_stock": 2.0,
    "dare_ties": 8.0,
    "ties": 20.0,
}
BUDGET, INTERPRETER = 256 * 2**20, 350e6
START_UP_TARGETS = {"--help": 0.4, "check": 0.6}
PLANNING_TARGET = 10.0

Samples = list[dict[str, float]]


def mid(samples: Samples, key: str = "seconds") -> float:
    """Median over the runs."""
    return median(sample[key] for sample in samples)


def spread(samples: Samples, key: str = "seconds") -> str:
    """``median (min-max)``."""
    values = [sample[key] for sample in samples]
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def megabytes(samples: Samples, key: str) -> str:
    """Largest over the runs, in MB of 10^6 bytes."""
    return f"{max(sample[key] for sample in samples) / 1e6:.0f}"


def mark(reached: bool) -> str:
    """What a target's column says."""
    return "yes" if reached else "**no**"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def conditions(result: dict[str, Any]) -> str:
    """One sentence on where and with what."""
    machine, software = result["machine"], result["software"]
    with_what = ", ".join(f"{name} {number}" for name, number in software.items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['linux']}; "
        f"{with_what}; {result['date']}."
    )


def against_floor(samples: dict[str, dict[str, Samples]]) -> str:
    """Work in a warm interpreter against the floor."""
    rows = []
    for method, runs in samples.items():
        if "floor" not in runs or "in_process" not in runs:
            continue
        ratio = mid(runs["in_process"]) / mid(runs["floor"])
        target = FLOOR_TARGETS[method]
        rows.append(
            [
                f"`{method}`",
                spread(runs["floor"]),
                spread(runs["early"]) if "early" in runs else "–",
                spread(runs["in_process"]),
                f"{mid(runs['in_process'], 'cpu'):.2f}",
                f"{ratio:.2f}",
                f"≤ {target}",
                mark(ratio <= target),
            ]
        )
    head = ["method", "floor, s", "least found, s", "merge, s", "merge, CPU s", "merge / floor", "target", "reached"]
    return table(head, rows)


def against_mergekit(samples: dict[str, dict[str, Samples]]) -> str:
    """Whole processes."""
    rows = []
    for method, runs in samples.items():
        if "mergekit" not in runs or "whole" not in runs:
            continue
        times = mid(runs["mergekit"]) / mid(runs["whole"])
        target = PEER_TARGETS[method]
        rows.append(
            [
                f"`{method}`",
                spread(runs["mergekit"]),
                f"{mid(runs['mergekit'], 'cpu'):.1f}",
                spread(runs["whole"]),
                f"{mid(runs['whole'], 'cpu'):.1f}",
                f"{times:.1f}",
                f"≥ {target}",
                mark(times >= target),
            ]
        )
    head = ["method", "mergekit, s", "CPU s", "mergekit-lr, s", "CPU s", "times faster", "target", "reached"]
    return table(head, rows)


def memory(samples: dict[str, dict[str, Samples]]) -> str:
    """Peak resident memory by kind, and time, under the small budget."""
    limit = BUDGET + INTERPRETER
    rows = []
    for method, runs in samples.items():
        if "small" not in runs:
            continue
        small = runs["small"]
        peak = max(sample["anonymous"] for sample in small)
        peer = runs.get("mergekit")
        rows.append(
            [
                f"`{method}`",
                f"{megabytes(peer, 'anonymous')} + {megabytes(peer, 'file_backed')}" if peer else "–",
                f"{megabytes(runs['whole'], 'anonymous')} + {megabytes(runs['whole'], 'file_backed')}",
                f"{megabytes(small, 'anonymous')} + {megabytes(small, 'file_backed')}",
                spread(small),
                f"≤ {limit / 1e6:.0f} anonymous",
                mark(peak <= limit),
            ]
        )
    head = ["method", "mergekit, MB", "default, MB", "256 MiB, MB", "256 MiB, s", "target, MB", "reached"]
    return table(head, rows)


def start_up(seconds: dict[str, list[float]]) -> str:
    """Commands that only look at a recipe."""
    rows = [
        [
            f"`mergekit-lr {name}`",
            f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})",
            f"< {START_UP_TARGETS[name]}",
            mark(median(values) < START_UP_TARGETS[name]),
        ]
        for name, values in seconds.items()
    ]
    return table(["command", "whole process, s", "target", "reached"], rows)


def elementwise(result: dict[str, Any]) -> str:
    """The whole section of the elementwise benchmark."""
    samples, checkpoint = result["samples"], result["checkpoint"]
    runs = next(iter(samples.values()))
    peer_runs = len(runs.get("mergekit", []))
    size = f"{checkpoint['parameters'] / 1e6:.0f} M parameters, {checkpoint['bytes'] / 1e9:.2f} GB in bf16 each"
    parts = [
        conditions(result),
        f"Checkpoints: Llama-shaped, {size}. Median (least–most) of {len(runs['in_process'])} runs, mergekit of "
        f"{peer_runs}.",
        "Against the floor, in a warm interpreter:",
        against_floor(samples),
        "Whole processes, interpreter and imports included:",
        against_mergekit(samples),
        *(["Peak resident memory, anonymous + file-backed:", memory(samples)] if "small" in runs else []),
        *(["Start-up:", start_up(result["start_up"])] if "start_up" in result else []),
    ]
    return "\n\n".join(part for part in parts if part)


def planning(result: dict[str, Any]) -> str:
    """The section on planning time."""
    rows = [
        [
            f"{row['tensors']:,}",
            f"{row['seconds']:.2f}",
            f"{1e6 * row['seconds'] / row['tensors']:.0f}",
            f"{row['anonymous'] / 1e6:.0f}",
        ]
        for row in result["rows"]
    ]
    last = result["rows"][-1]
    verdict = (
        f"Target: {last['tensors']:,} tensors in ≤ {PLANNING_TARGET:.0f} s, and time linear in their number: "
        f"{mark(last['seconds'] <= PLANNING_TARGET)}."
    )
    head = ["tensors", "`plan`, s", "µs per tensor", "peak anonymous, MB"]
    return "\n\n".join([conditions(result), table(head, rows), verdict])


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"elementwise": elementwise, "planning": planning}


def write_table(page: Path, name: str, result: Path) -> None:
    """Replace what is between the markers of ``name`` in ``page``.

    Raises:
        ValueError: the page has no such markers.
    """
    text = page.read_text()
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{page.name} has no markers {begin} and {end}")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    section = SECTIONS[name](json.loads(result.read_text()))
    page.write_text(f"{before}{begin}\n{section}\n{end}{after}")


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "docs" / "performance.md"
    write_table(Path(sys.argv[3]) if len(sys.argv) > 3 else default, sys.argv[1], Path(sys.argv[2]))
