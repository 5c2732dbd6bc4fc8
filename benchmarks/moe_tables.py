"""The result of ``moe_quality.py`` as Markdown, written into docs/quality_moe.md between markers.

python benchmarks/moe_tables.py [RESULT.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from moe_quality import CONTESTANTS, REDUCTIONS, RESULT, SHIFT, Contestant

PAGE = Path(__file__).resolve().parent.parent / "docs" / "quality_moe.md"
KINDS = {"peer": "peer", "refit": "peer's choice, our refit", "ours": "**ours**"}
DOMAINS = ("english", "python", "c", "german")


def cells(found: dict[str, Any], model: str, reduction: float, contestant: Contestant) -> dict[str, dict[str, Any]]:
    """What was measured of one row, by draw."""
    out = {}
    for key, value in found["cases"].items():
        m, r, draw, name = key.split("|")
        if (m, float(r), name) == (model, reduction, contestant.name):
            out[draw] = value
    return out


def _row(found: dict[str, Any], model: str, reduction: float, contestant: Contestant) -> tuple[float, list[str]] | None:
    measured = cells(found, model, reduction, contestant)
    shifted = measured.pop(f"{SHIFT} only", None)
    if not measured:
        return None
    values = [m["increase"]["mean"] for m in measured.values()]
    spread = f"{mean(values):.4f}" + (f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else "")
    domains = [f"{mean(m['increase'][d] for m in measured.values()):.3f}" for d in DOMAINS]
    first = next(iter(measured.values()))
    total, active = sizes(found["models"][model], contestant, reduction, first)
    return mean(values), [
        contestant.name,
        KINDS[contestant.kind],
        "yes" if contestant.stock else "no",
        str(len(values)),
        spread,
        *domains,
        "" if shifted is None else f"{shifted['increase']['mean']:.4f}",
        f"{total / 1e6:.2f}",
        f"{active / 1e6:.2f}",
    ]


def sizes(model: dict[str, int], contestant: Contestant, reduction: float, case: dict[str, Any]) -> tuple[int, int]:
    """Parameters, and those that one token passes."""
    experts, width = case["experts"], case["width"]
    if contestant.axis == "experts":
        experts, width = round(model["experts"] * (1 - reduction)), model["width"]
    each = 3 * model["layers"] * model["hidden"] * width
    return case["parameters"], case["parameters"] - each * experts + each * min(model["per_token"], experts)


def table(found: dict[str, Any], model: str, reduction: float) -> str:
    """One model at one reduction, the best first."""
    rows = [r for c in CONTESTANTS if (r := _row(found, model, reduction, c)) is not None]
    head = ["method", "whose", "stock", "draws", "mean increase (from - to)", *DOMAINS, f"calibrated on {SHIFT} only",
            "M parameters", "M active"]  # fmt: skip
    lines = [head, ["---", "---", "---", *["---:"] * (len(head) - 3)], *(cells for _, cells in sorted(rows))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets(found: dict[str, Any]) -> str:
    """Ours beside the peers that it is measured against."""
    head = ["model", "reduction", "best of ours", "REAP", "Sub-MoE (best stock router)", "ours / REAP",
            "ours / Sub-MoE", "neuron_select", "best peer with fewer experts", "best with refit"]  # fmt: skip
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for model in found["models"]:
        for reduction in sorted(REDUCTIONS, reverse=True):
            best = _best(found, model, reduction)
            if not {"REAP", "neuron_select", "width_shrink"} <= best.keys():
                continue
            names = ("width_shrink", "neuron_select", "moe_budget")
            ours = min(((best[n], n) for n in names if n in best), key=lambda pair: pair[0])
            sub = min(v for n, v in best.items() if n.startswith("Sub-MoE, router") and "tied" not in n)
            peers = {c.name for c in CONTESTANTS if c.kind == "peer" and c.stock and c.axis == "experts"}
            refits = {c.name for c in CONTESTANTS if c.kind == "refit"}
            peer = min((v, n) for n, v in best.items() if n in peers)
            refit = min((v, n) for n, v in best.items() if n in refits)
            row = [model, f"{reduction:.0%}", f"{ours[0]:.4f} ({ours[1]})", f"{best['REAP']:.4f}", f"{sub:.4f}",
                   f"{ours[0] / best['REAP']:.2f}", f"{ours[0] / sub:.2f}", f"{best['neuron_select']:.4f}",
                   f"{peer[0]:.4f} ({peer[1]})", f"{refit[0]:.4f} ({refit[1]})"]  # fmt: skip
            lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _best(found: dict[str, Any], model: str, reduction: float) -> dict[str, float]:
    """Mean over the seeded draws that each row has."""
    out = {}
    for c in CONTESTANTS:
        measured = {d: v for d, v in cells(found, model, reduction, c).items() if d != f"{SHIFT} only"}
        if measured:
            out[c.name] = mean(v["increase"]["mean"] for v in measured.values())
    return out


def page(found: dict[str, Any]) -> str:
    """Everything between the markers."""
    machine = found["machine"]
    parts = [
        f"{len(found['cases'])} cases; {machine['cpu']}, {machine['cores']} cores; calibration {found['samples']} "
        f"windows of {found['sequence_length']} tokens, held out {found['heldout_windows']} windows of 256 tokens of "
        "each domain. "
        "Loss of the originals: "
        + "; ".join(f"{m} {mean(b.values()):.4f}" for m, b in found["base"].items())
        + " nats per token.",
        targets(found),
    ]
    for model in found["models"]:
        for reduction in sorted(REDUCTIONS, reverse=True):
            title = f"### {model}, {reduction:.0%} fewer expert parameters"
            measured = any(cells(found, model, reduction, c) for c in CONTESTANTS)
            parts += [title, table(found, model, reduction) if measured else "Not measured yet."]
    return "\n\n".join(parts)


def write(result: Path) -> None:
    """Renew the page."""
    begin, end = "<!-- moe-quality:begin -->", "<!-- moe-quality:end -->"
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    found = json.loads(result.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{begin}\n{page(found)}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT)
