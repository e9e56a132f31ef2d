"""A map of numbers as coloured cells in SVG; the colour comes from the page's style, its strength from the logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, LEFT, TOP, BOTTOM = 480, 40, 22, 22
_LINE = 16  # height of a line of text; see sordino.report.svg for the units


@dataclass(frozen=True)
class Heat:
    """Rows (downwards) of positive values; 1 and below stay empty, the largest is full. All rows are equally long."""

    rows: Sequence[Sequence[float]]
    x_label: str
    y_label: str
    title: str

    @property
    def top(self) -> float:
        """The largest value."""
        return max((v for row in self.rows for v in row if math.isfinite(v)), default=1.0)

    @property
    def cell(self) -> int:
        """Height of a row."""
        return _LINE if len(self.rows) <= 12 else _LINE // 2

    @property
    def height(self) -> int:
        """Of the drawing."""
        return TOP + self.cell * len(self.rows) + BOTTOM

    @property
    def key(self) -> str:
        """What the colours mean."""
        return f"full colour: {self.top:.4g} times the median channel"

    def __html__(self) -> str:
        head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">')
        drawn = head.format(WIDTH, self.height, f"{self.title}: largest {self.top:.4g}") + self.draw()
        return drawn + Markup('</svg><p class="soft">{}</p>').format(self.key)

    def draw(self) -> Markup:
        """What stands inside the svg element."""
        cell, scale = self.cell, math.log(max(self.top, 1.0 + 1e-9))
        parts = [Markup('<g class="s0">')]
        for i, row in enumerate(self.rows):
            step = (WIDTH - LEFT) / len(row)
            for j, value in enumerate(row):
                strength = math.log(value) / scale if math.isfinite(value) and value > 1 else 0.0
                if strength >= 0.02:
                    drawn = Markup('<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill-opacity="{:.2f}"/>')
                    parts.append(drawn.format(LEFT + j * step, TOP + i * cell, step, cell - 1, strength))
        parts.append(Markup("</g>"))
        for i in range(0, len(self.rows), max(_LINE // cell, len(self.rows) // 6)):
            parts.append(Markup('<text x="{}" y="{}" class="end">{}</text>').format(LEFT - 6, TOP + i * cell + cell / 2 + 4, i))
        middle = (LEFT + WIDTH) / 2
        parts.append(Markup('<text x="{}" y="{}" class="mid">{}</text>').format(middle, self.height - 5, self.x_label))
        parts.append(Markup('<text x="4" y="13">{}</text>').format(self.y_label))
        return Markup("").join(parts)
