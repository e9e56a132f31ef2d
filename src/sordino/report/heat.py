"""A map of numbers as coloured cells in SVG; the colour comes from the page's style, its strength from the logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, LEFT, TOP, BOTTOM = 480, 40, 22, 22
_LINE = 16  # height of a line of text; see sordino.report.svg for the units


def heat(rows: Sequence[Sequence[float]], x_label: str, y_label: str, title: str) -> Markup:
    """Draw rows (downwards) of positive values; 1 and below stay empty, the largest is full. All rows are equally long."""
    top = max((v for row in rows for v in row if math.isfinite(v)), default=1.0)
    scale = math.log(max(top, 1.0 + 1e-9))
    cell = _LINE if len(rows) <= 12 else _LINE // 2  # height of a row
    height = TOP + cell * len(rows) + BOTTOM
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, f"{title}: largest {top:.4g}")
    ]
    parts.append(Markup('<g class="s0">'))
    for i, row in enumerate(rows):
        step = (WIDTH - LEFT) / len(row)
        for j, value in enumerate(row):
            strength = math.log(value) / scale if math.isfinite(value) and value > 1 else 0.0
            if strength >= 0.02:
                drawn = Markup('<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill-opacity="{:.2f}"/>')
                parts.append(drawn.format(LEFT + j * step, TOP + i * cell, step, cell - 1, strength))
    parts.append(Markup("</g>"))
    for i in range(0, len(rows), max(_LINE // cell, len(rows) // 6)):
        parts.append(Markup('<text x="{}" y="{}" class="end">{}</text>').format(LEFT - 6, TOP + i * cell + cell / 2 + 4, i))
    parts.append(Markup('<text x="{}" y="{}" class="mid">{}</text>').format((LEFT + WIDTH) / 2, height - 5, x_label))
    parts.append(Markup('<text x="4" y="13">{}</text>').format(y_label))
    return Markup("").join(parts) + Markup('</svg><p class="soft">full colour: {:.4g} times the median channel</p>').format(top)
