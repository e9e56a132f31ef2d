"""Rows of benchmarks/rows as Markdown tables: what render.py and the ladders share."""

from __future__ import annotations

import statistics
from typing import Any

from ladder import ROWS, read

COLUMNS = ["recipe", "bits/weight", "bits/parameter", "PPL", "seeds", "C4 PPL", "KL", "fallbacks to RTN"]
COLUMNS += ["CPU s", "GFLOP/s", "peak GiB"]

Row = dict[str, Any]


def latest(file: str) -> dict[tuple[str, int], Row]:
    """Rows of the usual setting by (name, seed); later ones replace earlier ones."""
    return {(r["name"], r["seed"]): r for r in read(ROWS / file) if r["model"] == "smollm2" and r["windows"] == 32}


def last(file: str, *fields: str) -> dict[Any, Row]:
    """The last row of each value of a field, or tuple of several; empty without the file."""
    return {r[fields[0]] if len(fields) == 1 else tuple(r[f] for f in fields): r for r in read(ROWS / file)}


def table(rows: dict[tuple[str, int], Row], names: list[str], columns: int = len(COLUMNS)) -> str:
    """Markdown table of the rows there are, in the order of ``names``; several seeds in one line."""
    lines = ["| " + " | ".join(COLUMNS[:columns]) + " |", "|" + "---|" * columns]
    for name in dict.fromkeys(names):
        mine = [r for (n, _), r in sorted(rows.items()) if n == name]
        if mine:
            lines.append("| " + " | ".join(cells(name, mine)[:columns]) + " |")
    versions = sorted({r["version"] for r in rows.values()})
    foot = f"\nCode: src tree {', '.join(versions)}; 2 cores.\n" if columns == len(COLUMNS) and versions else ""
    return "\n".join(lines) + "\n" + foot


def cells(name: str, rows: list[Row]) -> list[str]:
    """One table row; several seeds are shown as mean and range."""
    first = rows[0]
    cost = [r["quantize"] for r in rows if r.get("quantize")]
    also = [r["also"]["ppl"] for r in rows if r.get("also")]
    kl = [r["kl"] for r in rows if r.get("kl") is not None]
    falls = sorted({b for r in rows for b in r.get("fallbacks") or []})
    return [
        name,
        f"{first['bits_per_weight']:.3f}",
        f"{first['bits_per_parameter']:.3f}",
        spread([r["ppl"] for r in rows], 2),
        str(len(rows)) if first["recipe"] else "–",
        spread(also, 2),
        spread(kl, 3),
        ", ".join(map(str, falls)) or "–",
        spread([c["cpu_seconds"] for c in cost], 0),
        "/".join(str(g) for g in sorted({r["gflops"] for r in rows if r.get("gflops")})) or "–",
        f"{max(c['peak_bytes'] for c in cost) / 2**30:.2f}" if cost else "–",
    ]


def spread(values: list[float], digits: int) -> str:
    """A value, or mean and range of several, or a dash."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} … {max(values):.{digits}f})"
