"""The colours of pages and plots, in one place: names as in the pages' style (``--ink``), ``c0`` … ``c7`` for series."""

from __future__ import annotations

_SERIES = ("#0b62c4", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0e7490", "#a16207", "#475569")
_SERIES_ON_DARK = ("#6cb2ff", "#ff9d6b", "#6ee79b", "#c4a4ff", "#ff9ac6", "#67e0f5", "#f5d06b", "#b6c2cf")
COLOURS = len(_SERIES)  # classes s0 … s7 of the page's style

LIGHT = {
    "ink": "#1c2024",
    "soft": "#5f6872",
    "paper": "#ffffff",
    "card": "#f3f5f7",
    "rule": "#d9dee3",
    "warn": "#8a4b00",
    "warn-card": "#fff3df",
} | {f"c{i}": colour for i, colour in enumerate(_SERIES)}
DARK = {
    "ink": "#e6e9ec",
    "soft": "#9aa4ae",
    "paper": "#15181b",
    "card": "#1f2429",
    "rule": "#363d44",
    "warn": "#ffc978",
    "warn-card": "#3a2a10",
} | {f"c{i}": colour for i, colour in enumerate(_SERIES_ON_DARK)}
