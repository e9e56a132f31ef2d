"""How results show themselves in a notebook: a small table, and plots as SVG files of their own.

Strings and numbers in, markup out; nothing here knows a result. Everything given is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from markupsafe import Markup

from sordino.errors import InputError
from sordino.report import heat
from sordino.report.colours import COLOURS, LIGHT
from sordino.report.heat import Heat
from sordino.report.svg import HEIGHT, LEFT, WIDTH, Plot, Series, draw

T = TypeVar("T")
_KEY = 18  # height of one line of the legend
# Fixed colours on white: a notebook's dark theme is not known to a picture.
_STYLE = (
    f"svg{{font:12px system-ui,sans-serif;background:{LIGHT['paper']}}}"
    f"text{{fill:{LIGHT['soft']}}}line{{stroke:{LIGHT['rule']}}}line.edge{{stroke:var(--c);stroke-dasharray:4 3}}"
    ".mid{text-anchor:middle}.end{text-anchor:end}polyline{fill:none;stroke:var(--c);stroke-width:1.8}"
    f"circle,rect{{fill:var(--c)}}g text{{fill:{LIGHT['ink']}}}"
) + "".join(f".s{i}{{--c:{LIGHT[f'c{i}']}}}" for i in range(COLOURS))


@dataclass(frozen=True)
class Figure:
    """A plot; shows itself in a notebook.

    Attributes:
        svg: a whole SVG document, without scripts and without anything from a network.
    """

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write it to a file, which browsers and vector editors open."""
        Path(path).write_text(self.svg, encoding="utf-8")


def figure(series: Sequence[Series], x_label: str, y_label: str, *, lines: bool, log_x: bool = False) -> Figure:
    """A plot by itself; see :func:`sordino.report.svg.plot` for the arguments. The legend names series if there are several."""
    drawn = draw(series, x_label, y_label, lines=lines, log_x=log_x) or Markup('<text x="9" y="20">Nothing to draw.</text>')
    parts, named = [], series if len(series) > 1 else ()
    for i, s in enumerate(named):
        y = HEIGHT + _KEY * i
        key = Markup('<g class="s{}"><rect x="{}" y="{}" width="10" height="10"/><text x="{}" y="{}">{}</text></g>')
        parts.append(key.format(i % COLOURS, LEFT, y, LEFT + 16, y + 9, s.name))
    return _document(WIDTH, HEIGHT + _KEY * len(named), drawn, *parts)


def picture(drawing: Plot | Heat) -> Figure:
    """A drawing of a page by itself."""
    if isinstance(drawing, Plot):
        return figure(drawing.series, drawing.x_label, drawing.y_label, lines=True)
    words = Markup('<text x="{}" y="{}">{}; {}</text>').format(heat.LEFT, drawing.height + 11, drawing.title, drawing.key)
    return _document(heat.WIDTH, drawing.height + _KEY, drawing.draw(), words)


def _document(width: int, height: int, *parts: Markup) -> Figure:
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}"><style>').format(width, height, width)
    return Figure(str(head + Markup(_STYLE) + Markup("</style>") + Markup("").join(parts) + Markup("</svg>\n")))


def chosen(plots: Mapping[str, T], label: str | None) -> T:
    """The plot of a name; the first one without a name.

    Raises:
        InputError: if there is none, naming those there are.
    """
    label = label or next(iter(plots))
    if label not in plots:
        raise InputError(f"no figure '{label}'; there are {', '.join(plots)}")
    return plots[label]


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), title: str = "") -> str:
    """An HTML table of text.

    Args:
        rows: the cells.
        header: names of the columns; none are shown if empty.
        title: above it.
    """

    def line(cells: Sequence[str], tag: str) -> Markup:
        cell = Markup(f'<{tag} style="text-align:left">{{}}</{tag}>')
        return Markup("<tr>") + Markup("").join(cell.format(c) for c in cells) + Markup("</tr>")

    caption = Markup("<caption>{}</caption>").format(title) if title else Markup("")
    head = Markup("<thead>") + line(header, "th") + Markup("</thead>") if header else Markup("")
    body = Markup("").join(line(row, "td") for row in rows)
    return str(Markup("<table>") + caption + head + Markup("<tbody>") + body + Markup("</tbody></table>"))
