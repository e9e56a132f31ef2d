"""One small plot in SVG: points, with or without lines, on linear or logarithmic axes. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 42
PALETTE = ("#0b62c4", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0e7490", "#a16207", "#475569")  # on light paper
COLOURS = len(PALETTE)  # classes s0 … s7 of the page's style


@dataclass(frozen=True)
class Series:
    """Points (x, y, what a reader should see of it) under one name."""

    name: str
    points: Sequence[tuple[float, float, str]]


def plot(series: Sequence[Series], x_label: str, y_label: str, *, lines: bool, log_x: bool = False) -> Markup:
    """Draw series into one frame; y is logarithmic where it spans more than a factor of three.

    Args:
        series: points that are not finite are left out; with none left nothing is drawn.
        x_label: under the frame.
        y_label: beside it.
        lines: join the points of a series; otherwise each carries its text.
        log_x: for sizes.
    """
    drawn = draw(series, x_label, y_label, lines=lines, log_x=log_x)
    if not drawn:
        return Markup("<p>Nothing to draw.</p>")
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, f"{y_label} over {x_label}")
    legend = Markup(" ").join(
        Markup('<span class="key s{}">{}</span>').format(i % COLOURS, s.name) for i, s in enumerate(series) if len(series) > 1
    )
    return head + drawn + Markup("</svg><p>") + legend + Markup("</p>")


def draw(series: Sequence[Series], x_label: str, y_label: str, *, lines: bool, log_x: bool) -> Markup:
    """What stands inside the frame; empty if no point is finite. Arguments as of :func:`plot`."""
    kept = [Series(s.name, [p for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for s in series]
    xs, ys = [p[0] for s in kept for p in s.points], [p[1] for s in kept for p in s.points]
    if not xs:
        return Markup("")
    across, up = _Axis.over(xs, log_x), _Axis.over(ys, min(ys) > 0 and max(ys) > 3 * min(ys))
    parts = []
    for value in across.ticks():
        parts.append(Markup('<text x="{:.1f}" y="{}" class="mid">{:.3g}</text>').format(_x(across, value), HEIGHT - 24, value))
    for value in up.ticks():
        y = _y(up, value)
        parts.append(Markup('<line x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, WIDTH - RIGHT, y=y))
        parts.append(Markup('<text x="{}" y="{:.1f}" class="end">{:.3g}</text>').format(LEFT - 6, y + 4, value))
    parts.append(Markup('<text x="{}" y="{}" class="mid">{}</text>').format((LEFT + WIDTH) / 2, HEIGHT - 6, x_label))
    turn = Markup('<text transform="translate(13 {}) rotate(-90)" class="mid">{}</text>')
    parts.append(turn.format((HEIGHT - BOTTOM) / 2, y_label))
    for number, s in enumerate(kept):
        parts.append(_drawn(s, f"s{number % COLOURS}", across, up, lines))
    return Markup("").join(parts)


def _drawn(s: Series, style: str, across: _Axis, up: _Axis, lines: bool) -> Markup:
    places = [(_x(across, x), _y(up, y), text) for x, y, text in s.points]
    parts = [Markup('<g class="{}">').format(style)]
    if lines:
        parts.append(Markup('<polyline points="{}"/>').format(" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)))
    for x, y, text in places:
        dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
        parts.append(dot.format(x, y, 2.5 if lines else 5, text))
        if not lines:
            near, style = (x - 9, "end") if x > WIDTH * 0.6 else (x + 9, "start")
            parts.append(Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(near, y + 4, style, text))
    return Markup("").join(parts) + Markup("</g>")


@dataclass(frozen=True)
class _Axis:
    """A range of values laid out from 0 to 1; ends are logarithms if ``log``."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool) -> _Axis:
        low, high = (math.log10(f(values)) if log else f(values) for f in (min, max))
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, log)

    def at(self, value: float) -> float:
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Four round enough values, evenly laid out."""
        places = [self.low + (self.high - self.low) * (i + 0.5) / 4 for i in range(4)]
        return [float(f"{10**p if self.log else p:.2g}") for p in places]


def _x(axis: _Axis, value: float) -> float:
    return LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)
