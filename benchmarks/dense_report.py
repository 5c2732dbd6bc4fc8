"""The tables of docs/quality_dense.md from a result of `dense_quality`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOMAINS = ("english", "python", "c", "german")
Table = dict[str, dict[str, float]]


def mean(row: dict[str, float]) -> float:
    return sum(row.values()) / len(row)


def share(table: Table, name: str) -> float:
    """Share of the joint fine-tune's gain over the base, of the mean loss."""
    base, joint = mean(table["base"]), mean(table["joint"])
    return (base - mean(table[name])) / (base - joint)


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def compared(data: dict[str, Any]) -> str:
    """Every row of the comparison, best first."""
    table: Table = data["compared"]
    head = ["merge", "lambda", *DOMAINS, "mean", "share of the joint gain"]
    rows = [line(head), line(["---", *["---:"] * (len(head) - 1)])]
    for name in sorted(table, key=lambda n: mean(table[n])):
        factor = data["lambda"].get(name)
        cells = [name, "" if factor is None else f"{factor:.2f}", *(f"{table[name][d]:.4f}" for d in DOMAINS)]
        rows.append(line([*cells, f"{mean(table[name]):.4f}", f"{share(table, name):.0%}"]))
    return "\n".join(rows)


def swept(data: dict[str, Any]) -> str:
    """`ota` over densities: share of the joint gain, one line for each power, denominator and form."""
    table: Table = data["swept"]
    densities = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
    kinds = [(p, d, f) for p in (0.0, 0.5, 1.0) for d in ("kept", "all") for f in ("full", "rank1")]
    rows = [line(["power, denominator, moments", *(f"{d:g}" for d in densities)]), line(["---", *["---:"] * 6])]
    for power, denominator, form in kinds:
        names = [f"ota power {power} density {d} {denominator} {form}" for d in densities]
        if sum(n in table for n in names) > 1:
            cells = [f"{share(table, n):.1%}" if n in table else "as kept" for n in names]
            rows.append(line([f"{power:g}, {denominator}, {form}", *cells]))
    return "\n".join(rows)


def others(data: dict[str, Any]) -> str:
    """What is measured on the windows of the sweep and is no cell of its table."""
    table: Table = data["swept"]
    rows = [line(["merge", "lambda", "mean", "share of the joint gain"]), line(["---", "---:", "---:", "---:"])]
    for name in sorted(table, key=lambda n: mean(table[n])):
        if not (name.startswith("ota power") and name.endswith(("kept full", "all full", "kept rank1"))):
            factor = data["lambda"].get(name)
            shown = "" if factor is None else f"{factor:.2f}"
            rows.append(line([name, shown, f"{mean(table[name]):.4f}", f"{share(table, name):.1%}"]))
    return "\n".join(rows)


def agreement(data: dict[str, Any]) -> str:
    found = data["agreement"]["log correlation"]
    rows = [line(["expert", "correlation of log v with log F from text"]), line(["---", "---:"])]
    return "\n".join([*rows, *(line([e, f"{v['text']:.2f}"]) for e, v in found.items())])


def rows(data: dict[str, Any]) -> str:
    """Scales fitted on half of the documents, measured on the other half; how many numbers were fitted."""
    table: Table = data["rows"]
    counts = {f"row scales, {name}": fit["scales"] for name, fit in data["fits"].items()}
    found = [line(["merge", "scales", *DOMAINS, "mean", "share of the joint gain"]), line(["---", *["---:"] * 7])]
    for name in sorted(table, key=lambda n: mean(table[n])):
        count = f"{counts[name]:,}" if name in counts else ""
        cells = [name, count, *(f"{table[name][d]:.4f}" for d in DOMAINS)]
        found.append(line([*cells, f"{mean(table[name]):.4f}", f"{share(table, name):.0%}"]))
    return "\n".join(found)


def report(result: Path, page: Path) -> None:
    """Put every table between its markers on the page."""
    data = json.loads(result.read_text())
    text = page.read_text()
    tables = {"compared": compared, "swept": swept, "others": others, "rows": rows, "agreement": agreement}
    for name, make in tables.items():
        start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, _, rest = text.partition(start)
        text = f"{head}{start}\n{make(data)}\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
