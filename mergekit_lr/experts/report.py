"""What a reduction says of itself: who became one with whom, in merge_report.json and in the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.experts.deciding import Parts
from mergekit_lr.experts.decision import LayerDecision
from mergekit_lr.experts.pictures import PICTURE

MOST_LAYERS = 8
"""Layers that a card lists; the report lists all."""


def parameter_counts(layers: Sequence[MoeLayer], decided: Mapping[str, LayerDecision]) -> dict[str, int]:
    """Weights of routed experts before and after (scales of quantised ones not counted)."""

    def weights(layer: MoeLayer) -> int:
        return 3 * layer.width * layer.hidden

    before = sum(layer.experts * weights(layer) for layer in layers)
    return {"before": before, "after": sum(decided[layer.block].experts * weights(layer) for layer in layers)}


def details(
    parts: Parts, layers: Sequence[MoeLayer], decided: Mapping[str, LayerDecision], prepared: Path | None
) -> dict[str, Any]:
    """Plain data for the report: the parts, every layer's groups, parameters of routed experts."""
    fits = fitted_errors(prepared)
    return {
        "parts": asdict(parts),
        "expert_parameters": parameter_counts(layers, decided),
        "layers": {layer.block: _layer(decided[layer.block], fits.get(layer.block)) for layer in layers},
    }


def _layer(decision: LayerDecision, errors: Mapping[str, list[float]] | None) -> dict[str, Any]:
    plain = decision.plain()
    del plain["block"], plain["router"]
    for j, group in enumerate(plain["groups"]):
        if errors and str(j) in errors:
            group["relative_error"] = dict(zip(("average", "fitted"), errors[str(j)], strict=True))
    return plain


def fitted_errors(prepared: Path | None) -> dict[str, dict[str, list[float]]]:
    """Relative output errors of fitted groups, before and after the fit, by layer and new expert."""
    from mergekit_lr.checkpoint.header import read_header
    from mergekit_lr.experts.fitting import FOLDER

    folder = None if prepared is None else prepared / FOLDER
    if folder is None or not folder.exists():
        return {}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        metadata = read_header(path).metadata
        found[path.stem] = {j: [float(v) for v in s.split()] for j, s in metadata.items() if j.isdigit()}
    return found


def picture_files(prepared: Path | None) -> dict[str, bytes]:
    """The picture of similarities, if one could be drawn."""
    path = None if prepared is None else prepared / PICTURE
    return {PICTURE: path.read_bytes()} if path is not None and path.exists() else {}


def card(parts: Parts, layers: Sequence[MoeLayer], decided: Mapping[str, LayerDecision], prepared: Path | None) -> str:
    """The section of the model card."""
    counts = parameter_counts(layers, decided)
    before, after = layers[0].experts, [decided[layer.block].experts for layer in layers]
    kept = str(after[0]) if len(set(after)) == 1 else f"{min(after)} to {max(after)}"
    share = counts["after"] / counts["before"]
    lines = [
        "",
        "## Experts",
        "",
        f"{kept} of {before} experts in each of {len(layers)} layers; {counts['after']:,} of {counts['before']:,} "
        f"parameters of routed experts ({share:.0%}). Ranked by `{parts.score}`, grouped by `{parts.grouping}`"
        + (f", merged by `{parts.merge}`" if not parts.prunes else "")
        + f", router `{'select' if parts.prunes else parts.router}`.",
        "",
        "| layer | experts that became one | left out |",
        "|---|---|---|",
    ]
    for layer in layers[:MOST_LAYERS]:
        own = decided[layer.block].partition
        groups = ", ".join("+".join(map(str, g.members)) for g in own.groups)
        dropped = ", ".join(map(str, own.dropped))
        lines.append(f"| `{layer.block}` | {groups} | {dropped} |")
    if len(layers) > MOST_LAYERS:
        lines.append(f"\n{len(layers) - MOST_LAYERS} more layers are in `merge_report.json`.")
    if picture_files(prepared):
        lines += ["", f"![How alike the experts of each layer are]({PICTURE})"]
    return "\n".join(lines) + "\n"
