"""Results of commands as lines of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 100


def table_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """One line a method: name and summary."""
    width = max((len(m["name"]) for m in found), default=0)
    return [f"{m['name']:<{width}}  {_summary(m)}" for m in found]


def _summary(method: dict[str, Any]) -> str:
    origin = "" if method["origin"] == "built-in" else f" ({method['origin']})"
    return f"{method['summary']}{origin}"


def method_lines(method: dict[str, Any]) -> list[str]:
    """Everything about one method."""
    least, most = method["min_models"], method["max_models"]
    count = f"exactly {least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    lines = [
        f"{method['name']}: {_summary(method)}",
        f"  source   {method['source']['title']}, {method['source']['link']}",
        f"  models   {count}",
        f"  base     {method['base_model']}",
        f"  order    {'does not matter' if method['commutes'] else 'matters'}",
        f"  random   {'yes, decided by seed' if method['stochastic'] else 'no'}",
    ]
    for title, key in (("parameters", "parameters"), ("parameters of each model", "model_parameters")):
        if method[key]:
            lines += ["", title]
            for parameter in method[key]:
                lines += _parameter_lines(parameter)
    return lines


def _parameter_lines(parameter: dict[str, Any]) -> list[str]:
    facts = [parameter["type"]]
    if parameter["range"]:
        facts.append(parameter["range"])
    default = parameter["default"]
    shown = str(default).lower() if isinstance(default, bool) or default is None else str(default)
    facts.append("required" if parameter["required"] else f"default {shown}")
    meaning = textwrap.wrap(parameter["description"], WIDTH - 6)
    return [f"  {parameter['name']}: {', '.join(facts)}", *(f"      {line}" for line in meaning)]


def extraction_lines(report: dict[str, Any]) -> list[str]:
    """What an adapter holds, and the modules that lost most."""
    modules = report["modules"]
    share = report["bytes"] / max(report["bytes_of_model"], 1)
    lines = [
        f"{len(modules)} matrices as low-rank pairs, {len(report['saved'])} tensors whole, "
        f"{report['bytes'] / 2**20:,.2f} MiB ({share:.1%} of the model)",
        f"relative error of all pairs together {report['relative_error']:.4f}",
    ]
    worst = sorted(modules, key=lambda m: -modules[m]["relative_error"])[:3]
    lines += [f"  {modules[m]['relative_error']:.4f}  rank {modules[m]['rank']}  {m}" for m in worst]
    return lines + [f"{name} {rule}" for name, rule in report["dropped"].items()]


def loss_lines(result: dict[str, Any]) -> list[str]:
    """A row for each text: nats per token, nats per byte, perplexity, tokens."""
    rows = [("text", "nats/token", "nats/byte", "perplexity", "tokens")]
    for name, found in result["files"].items():
        numbers = (f"{found['loss']:.4f}", f"{found['loss_per_byte']:.4f}", f"{found['perplexity']:.2f}")
        rows.append((name, *numbers, f"{found['tokens']:,}"))
    if len(rows) > 2:
        rows.append(("mean", f"{result['mean']:.4f}", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [_row(row, widths) for row in rows]


def _row(row: tuple[str, ...], widths: Sequence[int]) -> str:
    numbers = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return f"{row[0].ljust(widths[0])}  {numbers}".rstrip()
