"""How alike experts are, as a picture: a heat map and a tree of each layer. Drawn where matplotlib is installed."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.experts.deciding import Parts
from mergekit_lr.experts.decision import Decision

if TYPE_CHECKING:
    from mergekit_lr.calibration.statistics import Statistics

PICTURE = "expert_similarity.png"
MOST_LAYERS = 6


def write_pictures(folder: Path, statistics: Statistics, decision: Decision, parts: Parts) -> None:
    """Draw the cosines of experts' outputs for a few layers spread over the model, ordered by their tree."""
    try:
        import matplotlib
    except ImportError:
        return
    known = [n for n, m in statistics.mixtures.items() if "expert_cosine_gram" in m]
    if not known or parts.prunes:
        return
    every = max(1, len(known) // MOST_LAYERS)
    data = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the tree of equal experts has no height
        figure = _figure(statistics, known[::every][:MOST_LAYERS], decision)
        figure.savefig(data, format="png", dpi=80, metadata={"Software": None})
    partial = folder / (PICTURE + ".partial")
    fs.write_file(partial, data.getvalue())
    fs.rename(partial, folder / PICTURE)


def _figure(statistics: Statistics, layers: list[int], decision: Decision) -> Any:
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram

    from mergekit_lr.experts.grouping import gram_distances, linkage_tree

    figure = Figure(figsize=(3.2 * len(layers) + 0.6, 4.6))
    grid = figure.subplots(2, len(layers), squeeze=False, height_ratios=(1, 3))
    for column, index in enumerate(layers):
        cosine = statistics.mixture(index).cosine
        tree = linkage_tree(gram_distances(cosine), "average")
        top, below = grid[0][column], grid[1][column]
        order = dendrogram(tree, ax=top, no_labels=True, color_threshold=0, above_threshold_color="0.3")["leaves"]
        top.set_axis_off()
        top.set_title(f"layer {index}", fontsize=9)
        shown = cosine[order][:, order].numpy()
        image = below.imshow(shown, vmin=-1, vmax=1, cmap="RdBu_r")
        made = decision.of(statistics.mixture(index).prefix.removesuffix(".experts"))
        small = len(order) <= 32
        below.set_xticks(range(len(order)) if small else [], [str(e) for e in order] if small else [], fontsize=6)
        names = made.partition.new_index(len(order)) if made and small else []
        below.set_yticks(range(len(order)) if names else [], [f"{e}→{names[e]}" for e in order] if names else [],
                         fontsize=6)  # fmt: skip
    figure.subplots_adjust(
        left=0.6 / figure.get_figwidth(), right=1 - 0.7 / figure.get_figwidth(), top=0.93, bottom=0.08
    )
    bar = figure.add_axes((1 - 0.6 / figure.get_figwidth(), 0.15, 0.12 / figure.get_figwidth(), 0.45))
    figure.colorbar(image, cax=bar, label="mean cosine of outputs")
    return figure
