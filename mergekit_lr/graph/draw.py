"""A graph's summary as one SVG file: inputs on the left, what is done to which layers in the middle, the output right.

Plain SVG without scripts, fonts or links; every name is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

from mergekit_lr.graph.summary import Block, Row
from mergekit_lr.sizes import format_size

LEFT, MIDDLE, RIGHT = (16, 230), (330, 790), (1200, 184)  # x and width of the columns
LINE, PAD, GAP, TOP = 17, 10, 26, 64
WIDTH = RIGHT[0] + RIGHT[1] + 16
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")
COLUMNS = (12, 300, 350, 465, 515)  # of a row within a block: kind, count, shape, dtype, action


def draw(title: str, models: Mapping[str, int], blocks: Sequence[Block], output: Sequence[str]) -> str:
    """The picture as SVG text. ``models``: bytes of each file by name; ``output``: lines for the box on the right."""
    tops = []
    y = TOP
    for block in blocks:
        tops.append(y)
        y += _height(block) + GAP
    height = max(y, TOP + len(models) * 62, TOP + 40 + len(output) * LINE) + PAD
    middle = (TOP + y - GAP) / 2
    boxes = {i: _model_top(i, len(models), height) for i in range(len(models))}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        _text(LEFT[0], 30, title, size=17, weight="bold"),
    ]
    for block, top in zip(blocks, tops, strict=True):
        centre = top + _height(block) / 2
        parts += [
            _edge((LEFT[0] + LEFT[1], boxes[i] + 24), (MIDDLE[0], centre), nbytes, COLOURS[i % len(COLOURS)])
            for i, nbytes in enumerate(block.models)
            if nbytes
        ]
        if block.bytes_out:
            parts.append(_edge((MIDDLE[0] + MIDDLE[1], centre), (RIGHT[0], middle), block.bytes_out, "#888888"))
    for i, (name, nbytes) in enumerate(models.items()):
        parts += _box(LEFT, boxes[i], 48, COLOURS[i % len(COLOURS)])
        parts.append(_text(LEFT[0] + PAD, boxes[i] + 20, _short(name, 33), weight="bold"))
        parts.append(_text(LEFT[0] + PAD, boxes[i] + 38, format_size(nbytes)))
    for block, top in zip(blocks, tops, strict=True):
        parts += _drawn(block, top)
    tall = 2 * PAD + len(output) * LINE
    parts += _box(RIGHT, middle - tall / 2, tall, "#444444")
    parts += [
        _text(
            RIGHT[0] + PAD,
            middle - tall / 2 + PAD + LINE * (n + 0.75),
            _short(line, 27),
            weight="normal" if n else "bold",
        )
        for n, line in enumerate(output)
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _height(block: Block) -> int:
    return 2 * PAD + LINE * (len(block.rows) + 1)


def _model_top(number: int, count: int, height: float) -> float:
    room = height - TOP - PAD
    return TOP + room * (number + 0.5) / count - 24


def _drawn(block: Block, top: float) -> list[str]:
    parts = _box(MIDDLE, top, _height(block), "#444444")
    alike = f", {block.layers} layers alike, each:" if block.layers > 1 else ""
    sizes = f"reads {format_size(block.bytes_in)}, writes {format_size(block.bytes_out)}"
    x = MIDDLE[0]
    parts.append(_text(x + COLUMNS[0], top + PAD + LINE * 0.75, _short(block.title, 50) + alike, weight="bold"))
    parts.append(_text(x + MIDDLE[1] - PAD, top + PAD + LINE * 0.75, sizes, anchor="end"))
    for n, row in enumerate(block.rows, 1):
        parts += _row(row, x, top + PAD + LINE * (n + 0.75))
    return parts


def _row(row: Row, x: float, y: float) -> list[str]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    grey = "#999999" if row.action.startswith("dropped") else "#111111"
    cells = (_short(row.kind, 44), f"x {row.count}" if row.count > 1 else "", shape, row.dtype, _short(row.action, 46))
    return [_text(x + at, y, cell, colour=grey, size=11) for at, cell in zip(COLUMNS, cells, strict=True) if cell]


def _box(column: tuple[int, int], top: float, height: float, colour: str) -> list[str]:
    return [
        f'<rect x="{column[0]}" y="{top:.1f}" width="{column[1]}" height="{height:.1f}" rx="5" fill="#fbfbfb" '
        f'stroke="{colour}" stroke-width="1.5"/>'
    ]


def _edge(start: tuple[float, float], end: tuple[float, float], nbytes: int, colour: str) -> str:
    (x0, y0), (x1, y1) = start, end
    bend = (x1 - x0) / 2
    width = max(0.6, min(7.0, log2(max(nbytes, 2)) / 6))
    path = f"M{x0:.1f} {y0:.1f} C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity="0.55" stroke-width="{width:.1f}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    colour: str = "#111111",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most // 2] + "…" + text[-(most - most // 2 - 1) :]
