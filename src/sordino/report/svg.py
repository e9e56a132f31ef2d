"""One small plot in SVG: points, with or without lines, on linear or logarithmic axes. Colours come from the page's style.

Sizes are for a phone, where a unit is 0.75 pixels: text of 14 units is readable there and nothing of it touches. On a wide
screen the style makes the text smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup

from sordino.report.axis import Axis, written
from sordino.report.colours import COLOURS

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 26, 42
_LETTER, _LINE = 7.7, 15.0  # width of a letter and height of a line of text, on a phone
_LONGEST = 28  # letters beside a point; of a longer name its beginning and its end, which is where paths differ


@dataclass(frozen=True)
class Series:
    """Points (x, y, what a reader should see of it) under one name.

    Attributes:
        edge: places (x, y) of some of them that a thin broken line joins.
    """

    name: str
    points: Sequence[tuple[float, float, str]]
    edge: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Plot:
    """Lines and what their axes are called; a page shows it as :func:`plot` draws it."""

    series: Sequence[Series]
    x_label: str
    y_label: str

    def __html__(self) -> str:
        return plot(self.series, self.x_label, self.y_label, lines=True)


def plot(series: Sequence[Series], x_label: str, y_label: str, *, lines: bool, log_x: bool = False) -> Markup:
    """Draw series into one frame; y is logarithmic where it spans more than a factor of three.

    Args:
        series: points that are not finite are left out; with none left nothing is drawn.
        x_label: under the frame.
        y_label: above it.
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
    kept = [replace(s, points=[p for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for s in series]
    xs, ys = [p[0] for s in kept for p in s.points], [p[1] for s in kept for p in s.points]
    if not xs:
        return Markup("")
    across, up = Axis.over(xs, log_x), Axis.over(ys, min(ys) > 0 and max(ys) > 3 * min(ys))
    parts = []
    for value in across.ticks():
        text = Markup('<text x="{:.1f}" y="{}" class="mid">{}</text>')
        parts.append(text.format(_x(across, value), HEIGHT - BOTTOM + 18, written(value)))
    for value in up.ticks():
        y = _y(up, value)
        parts.append(Markup('<line x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, WIDTH - RIGHT, y=y))
        parts.append(Markup('<text x="{}" y="{:.1f}" class="end">{}</text>').format(LEFT - 6, y + 4, written(value)))
    parts.append(Markup('<text x="{}" y="{}" class="mid">{}</text>').format((LEFT + WIDTH) / 2, HEIGHT - 6, x_label))
    parts.append(Markup('<text x="4" y="13">{}</text>').format(y_label))
    boxes: list[_Box] = []
    for number, s in enumerate(kept):
        places = [(_x(across, x), _y(up, y), text) for x, y, text in s.points]
        parts.append(Markup('<g class="s{}">').format(number % COLOURS))
        corners = [(_x(across, x), _y(up, y)) for x, y in s.edge if math.isfinite(x) and math.isfinite(y)]
        line = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="edge"/>')
        parts += [line.format(*a, *b) for a, b in pairwise(corners)]
        parts += _line(places) if lines else _labelled(places, boxes)
        parts.append(Markup("</g>"))
    return Markup("").join(parts)


_Place = tuple[float, float, str]
_Box = tuple[float, float, float, float]  # left, right, top, bottom


def _dot(place: _Place, radius: float) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(*place[:2], radius, place[2])


def _line(places: Sequence[_Place]) -> list[Markup]:
    line = Markup('<polyline points="{}"/>').format(" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places))
    return [line, *(_dot(place, 2.5) for place in places)]


def _labelled(places: Sequence[_Place], boxes: list[_Box]) -> Iterator[Markup]:
    """Points with their text; boxes are what other text and points take up already."""
    boxes += [(x - 5, x + 5, y - 5, y + 5) for x, y, _ in places]
    for place in places:
        text = place[2] if len(place[2]) <= _LONGEST else place[2][:9] + "…" + place[2][10 - _LONGEST :]
        x, y, style, box = _free(place[0], place[1], _LETTER * len(text), boxes)
        boxes.append(box)
        yield _dot(place, 5)
        yield Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y + 4, style, text)


def _free(x: float, y: float, width: float, boxes: Sequence[_Box]) -> tuple[float, float, str, _Box]:
    """Where text of a point fits: beside it, else further and further above or below; beside it if nowhere."""
    found = []
    for step in range(8):
        for up in (y - step * _LINE, y + step * _LINE)[: 1 + (step > 0)]:
            for style, left in (("start", x + 9), ("end", x - 9 - width)):
                box = (left, left + width, up - _LINE / 2, up + _LINE / 2)
                inside = left >= 0 and left + width <= WIDTH and box[2] >= TOP - 8 and box[3] <= HEIGHT - BOTTOM
                if not inside:
                    continue
                found.append((x + 9 if style == "start" else x - 9, up, style, box))
                if not any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes):
                    return found[-1]
    return found[0] if found else (x + 9, y, "start", (x + 9, x + 9 + width, y - _LINE / 2, y + _LINE / 2))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)
