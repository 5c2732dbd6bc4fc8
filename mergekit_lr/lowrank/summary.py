"""What packing lost and what it takes, from the notes of every module; written into the bundle as ``packing.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mergekit_lr.lowrank.budget import Spectrum, needed

KEPT = 0.99


def packing_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """For each module and for all: the share of the factors' energy that is missing, each task's relative error in its
    change of the weights, and the p that would keep 99 % of the energy."""
    notes: Mapping[str, Any] = report.get("notes", {})
    modules = {weight: _module(facts) for weight, facts in notes.items()}
    sides = [side for facts in notes.values() for side in _sides(facts)]
    energy = math.fsum(s.energy for s, _ in sides)
    left = math.fsum(t for s, p in sides for t in s.tail[p:])
    tasks: dict[str, list[tuple[float, float]]] = {}
    for facts in notes.values():
        for task, found in facts["tasks"].items():
            tasks.setdefault(task, []).append((found["error"], found["norm"]))
    return {
        "storage": report.get("details", {}).get("storage", {}),
        "residual_energy": left / energy if energy else 0.0,
        "relative_error": {t: _relative(found) for t, found in tasks.items()},
        "p_for_99_percent": needed([s for s, _ in sides], KEPT),
        "modules": modules,
    }


def _module(facts: Mapping[str, Any]) -> dict[str, Any]:
    sides = _sides(facts)
    energy = math.fsum(s.energy for s, _ in sides)
    left = math.fsum(t for s, p in sides for t in s.tail[p:])
    return {
        "rank": facts["rank"],
        "p": facts["p"],
        "residual_energy": left / energy if energy else 0.0,
        "relative_error": {t: _relative([(f["error"], f["norm"])]) for t, f in facts["tasks"].items()},
        "p_for_99_percent": needed([s for s, _ in sides], KEPT),
    }


def _sides(facts: Mapping[str, Any]) -> list[tuple[Spectrum, int]]:
    return [
        (Spectrum(tuple(facts[x]["tail"]), facts[x]["energy"], 1), p) for x, p in zip("ab", facts["p"], strict=True)
    ]


def _relative(found: list[tuple[float, float]]) -> float:
    norm = math.sqrt(math.fsum(n * n for _, n in found))
    return math.sqrt(math.fsum(e * e for e, _ in found)) / norm if norm else 0.0
