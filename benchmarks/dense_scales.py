"""Scales of each expert, in each layer, in each tensor, found on held-out calibration text; part of `dense_quality`.

The merge is linear in its scales: ``base + sum_i s_i T_i`` with T_i what model i adds (`scale` of `ota`, one-hot), or
``base + sum_i s_i D_i`` for task arithmetic. So the T_i are made once by the engine and the s_i, one for each expert,
one for each expert and layer, or one for each expert and tensor, follow by Adam on windows of held-out text that no row
is measured on, the coarser first. (Training text will not do: an expert knows its own by heart, and asks for more of
it.) All three are recipes: `scale` (or `weight`) takes filters by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mergekit_lr.arch.layers import layer_of

STEPS, RATE = 8, 0.12
GRAINS = ("expert", "expert and layer", "expert and tensor")
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None, str]] = {
    "ota power 1": ("ota", {"power": 1.0}, {}, "full", "fisher"),
    "task_arithmetic": ("task_arithmetic", {}, {"weight": 0.5}, None, "task_arithmetic"),
}


def scaled_rows(bench: Any, results: Any) -> None:
    """Measure what the scales add, for both methods and both grains."""
    for title, (method, shared, each, file, row) in METHODS.items():
        terms: list[dict[str, Tensor]] | None = None
        begin = {key_of("", i, "expert"): results.data.get("lambda", {}).get(row, 1.0) for i in range(3)}
        for grain in GRAINS:
            name = f"{title}, scale per {grain}"
            if name in results.data.get("compared", {}):
                continue
            if terms is None:
                terms = terms_of(bench, method, shared, each, file)
            scales = fit(bench, terms, begin, grain)
            begin = {k: float(v) for k, v in scales.items()}
            results.get("scales", name, lambda s=scales: {k: round(float(v), 3) for k, v in s.items()})  # type: ignore[misc]
            task = combined(terms, scales, grain)
            for section, text in (("swept", bench.swept), ("compared", bench.compared)):
                results.get(
                    section,
                    name,
                    lambda w=text, t=task: {k: round(v, 5) for k, v in bench.losses(t, 1.0, w).items()},  # type: ignore[misc]
                )


def terms_of(bench: Any, method: str, shared: Any, each: Any, file: str | None) -> list[dict[str, Tensor]]:
    """What each expert adds to the merge, by leaving all others out of the numerator."""
    from dense_quality import EXPERTS

    found = []
    for kept in EXPERTS:
        key = "scale" if method == "ota" else "weight"
        own = {e: {**each, key: (each.get(key, 1.0) if e == kept else 0.0)} for e in EXPERTS}
        found.append(bench.merged(method, shared, own, file, per_expert=True))
    return found


def key_of(name: str, expert: int, grain: str) -> str:
    """Which scale a tensor of an expert has."""
    place = layer_of(name)
    layer = "outside" if place is None else f"layer {place[1]}"
    return f"{expert} {dict(zip(GRAINS, ('all', layer, name), strict=True))[grain]}"


def combined(terms: list[dict[str, Tensor]], scales: dict[str, Tensor], grain: str) -> dict[str, Tensor]:
    return {n: sum(scales[key_of(n, i, grain)] * t[n] for i, t in enumerate(terms)) for n in terms[0]}  # type: ignore[misc]


def fit(bench: Any, terms: list[dict[str, Tensor]], begin: dict[str, float], grain: str) -> dict[str, Tensor]:
    """Adam on the scales over all windows at once, from coarser ones; the best of its steps by that same loss."""
    first: dict[str, float] = {}
    for i in range(len(terms)):
        for name in terms[0]:
            coarser = next(begin[k] for k in (key_of(name, i, g) for g in reversed(GRAINS)) if k in begin)
            first[key_of(name, i, grain)] = coarser
    scales = {k: torch.tensor(float(v), requires_grad=True) for k, v in first.items()}
    optimizer = torch.optim.Adam(list(scales.values()), lr=RATE, betas=(0.8, 0.95))
    best, least = {k: v.detach().clone() for k, v in scales.items()}, float("inf")
    for _ in range(STEPS):
        total = 0.0
        for rows in bench.tuning.values():
            task = combined(terms, scales, grain)
            weights = {n: b + task[n] for n, b in bench.base.items()}
            logits = functional_call(
                bench.model, weights, kwargs={"input_ids": rows, "use_cache": False}, tie_weights=True
            ).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / len(bench.tuning)
            loss.backward()
            total += loss.item()
        if total < least:
            best, least = {k: v.detach().clone() for k, v in scales.items()}, total
        optimizer.step()
        optimizer.zero_grad()
    return best
