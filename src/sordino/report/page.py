"""Templates into pages. Everything a model, a recipe or a user supplied is escaped; a policy in the page forbids the rest."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sordino.version import __version__


def render(template: str, **content: Any) -> str:
    """Fill a template of ``report/templates``.

    Args:
        template: its file name.
        content: what it shows; only what :mod:`sordino.report.svg` drew is taken as markup.
    """
    return _environment().get_template(template).render(version=__version__, **content) + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sordino.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
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
