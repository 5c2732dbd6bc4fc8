"""How large a mixture is before and after, and the report of a refit in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.arch.moe_config import top_k
from mergekit_lr.checkpoint.model import Checkpoint


def sizes(checkpoint: Checkpoint, layers: Sequence[MoeLayer], experts: int, width: int) -> dict[str, Any]:
    """Parameters of the whole model, of all routed experts, and active for one token, before and after."""
    k = top_k(checkpoint.config or {}) or 1
    owned = {n for layer in layers for n in layer.names}
    rest = sum(t.numel for n, t in checkpoint.tensors.items() if n not in owned)
    before, after = (_of(layers, rest, k, *shape) for shape in ((None, None), (experts, width)))
    return {
        "experts": {"before": layers[0].experts, "after": experts},
        "expert_width": {"before": layers[0].width, "after": width},
        **{key: {"before": before[key], "after": after[key]} for key in before},
    }


def _of(layers: Sequence[MoeLayer], rest: int, k: int, experts: int | None, width: int | None) -> dict[str, int]:
    total, active, routed = rest, rest, 0
    for layer in layers:
        count = experts or layer.experts
        for o in layer.outputs(experts, width):
            numel = math.prod(o.shape)
            total += numel
            if o.router is not None:
                active += numel
            else:
                routed += numel
                each = numel if o.expert is not None else numel // count
                active += each * min(k, count) if o.expert is None else (each if o.expert < min(k, count) else 0)
    return {"parameters": total, "active_parameters": active, "expert_parameters": routed}


def refit_card(details: Mapping[str, Any]) -> str:
    """Markdown for the model card: size, what the reduction costs on held-out calibration text, errors by layer."""
    size = details["size"]
    lines = ["", "## Reduction", "", "| | before | after |", "|---|---:|---:|"]
    for key, label in (
        ("experts", "experts in a layer"),
        ("expert_width", "width of an expert"),
        ("parameters", "parameters"),
        ("active_parameters", "parameters active for a token"),
    ):
        lines.append(f"| {label} | {size[key]['before']:,} | {size[key]['after']:,} |")
    held = details.get("held_out")
    if held:
        lines += ["", "On the half of the calibration windows that no layer was fitted on, nats per token:", ""]
        lines += ["| text | original | reduced | increase | KL |", "|---|---:|---:|---:|---:|"]
        for name, row in [*held["texts"].items(), ("mean", held["mean"])]:
            numbers = (row["loss_original"], row["loss"], row["increase"], row["kl"])
            lines.append(f"| {name} | " + " | ".join(f"{n:.4f}" for n in numbers) + " |")
    errors = {b: n for b, n in details.get("layers", {}).items() if "error" in n}
    if errors:
        lines += ["", "Squared error of each layer's routed output over its own square, on the same tokens:", ""]
        lines += ["| layer | error |", "|---|---:|"]
        lines += [f"| `{block}` | {notes['error']:.5f} |" for block, notes in errors.items()]
    return "\n".join(lines) + "\n"
