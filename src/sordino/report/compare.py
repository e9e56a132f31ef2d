"""Several checkpoints on one page: the table, and quality over size and speed with what no other checkpoint beats."""

from __future__ import annotations

from typing import Any

from sordino.measure.bench import DECODED
from sordino.measure.compare import Comparison
from sordino.report.page import render
from sordino.report.svg import plot


def comparison_page(comparison: Comparison) -> str:
    """One self-contained HTML page of a comparison."""
    first = comparison.rows[0][1]
    about = []
    if first.ppl is not None:
        about.append(f"Text {comparison.text}: {first.windows} windows of {first.seqlen} tokens; ± is one standard error.")
    if first.tasks is not None:
        samples = ", ".join(f"{name} {task.samples}" for name, task in first.tasks.tasks.items())
        about.append(f"Zero-shot items: {samples}; ± is one standard error.")
    if first.tasks is not None and first.tasks_against is not None:
        about.append("Differences are paired with the reference, item by item; an interval that holds 0 tells none.")
    if comparison.speeds:
        about.append(f"Speed: a prompt of random tokens, then {DECODED} more, the models in turns; compare the ratios.")
    return render(
        "compare.html",
        title="Checkpoints compared",
        header=comparison.header,
        rows=comparison.cells(),
        notes=comparison.notes(),
        differences=comparison.differences(),
        about=" ".join(about),
        plots=_plots(comparison),
    )


def _plots(comparison: Comparison) -> list[dict[str, Any]]:
    """Quality over size and over speed, one plot for each figure that was measured."""
    plots = []
    for trade in comparison.plots().values():
        drawing = plot(trade.series, trade.cost, trade.figure, lines=False, log_x=True)
        what = "Size" if trade.cost == "MiB" else "Speed"
        plots.append({"title": f"{what} and {trade.figure.partition(',')[0]}", "drawing": drawing})
    return plots
