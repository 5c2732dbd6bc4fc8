"""PNG plots of a curvature report. matplotlib is imported here and nowhere else in the package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lr.checkpoint import fs
from mergekit_lr.curvatures.report import CurvatureReport, Tally
from mergekit_lr.errors import UsageError


def draw(report: CurvatureReport, folder: str | Path) -> list[Path]:
    """Draw overlap by layer, density by layer and role, and contribution by layer; returns the files.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UsageError("plots need matplotlib", fix="pip install 'mergekit-lr[plot]'") from e
    place = Path(folder)
    fs.make_folder(place, parents=True)
    names = [Path(m).name for m in report.models]

    def page(title: str, tables: dict[str, dict[str, Tally]], value: Any, legend: list[str], file: str) -> Path:
        figure = Figure(figsize=(9, 3.2 * len(tables)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(tables), squeeze=False)[:, 0]
        for axis, (what, table) in zip(axes, tables.items(), strict=True):
            rows = np.array([value(t) for t in table.values()])
            width = 0.8 / max(1, rows.shape[1])
            for i, label in enumerate(legend):
                axis.bar(np.arange(len(rows)) + (i - (len(legend) - 1) / 2) * width, rows[:, i], width, label=label)
            axis.set_xticks(np.arange(len(rows)), [k.rpartition("layers.")[2] for k in table], rotation=45, ha="right")
            axis.set_title(f"{title} by {what}")
            axis.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        fs.write_file(place / file, buffer.getvalue())
        return place / file

    pairs = list(zip(*np.triu_indices(len(names), 1), strict=True))
    drawn = []
    if pairs:
        labels = [f"{names[a]} / {names[b]}" for a, b in pairs]
        overlap = lambda t: [np.nan_to_num(t.overlap()[a, b]) for a, b in pairs]  # noqa: E731
        drawn.append(page("overlap of log curvature", {"layer": report.layers}, overlap, labels, "overlap.png"))
    both = {"layer": report.layers, "role": report.roles}
    drawn.append(page("kept share of entries", both, Tally.density, names, "density.png"))
    drawn.append(page("share of the merge", both, Tally.contribution, names, "contribution.png"))
    return drawn
