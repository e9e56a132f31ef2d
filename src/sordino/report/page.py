"""Templates into pages. Everything a model, a recipe or a user supplied is escaped; a policy in the page forbids the rest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sordino.report.colours import COLOURS, DARK, LIGHT
from sordino.version import __version__


def render(template: str, **content: Any) -> str:
    """Fill a template of ``report/templates``.

    Args:
        template: its file name.
        content: what it shows; only what :mod:`sordino.report.svg` drew is taken as markup.
    """
    return _environment().get_template(template).render(version=__version__, **_STYLE, **content) + "\n"


_STYLE = {"light": LIGHT, "dark": DARK, "series": range(COLOURS)}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sordino.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "numeric": numeric}
    return environment


def figure(value: Any) -> str:
    """A value as a reader wants it: four digits, thousands apart, words for None and truth values."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(figure, value)) if isinstance(value, list | tuple) else str(value)


def numeric(rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Which columns of a table hold numbers only, or nothing: these are set to the right."""
    return [
        all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in column)
        for column in zip(*rows, strict=True)
    ]
