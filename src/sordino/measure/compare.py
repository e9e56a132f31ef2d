"""Several checkpoints on the same text, side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sordino.corpus import EVAL_TEXT, load_text
from sordino.measure.evaluate import Evaluation, evaluate, reference
from sordino.walk.source import locate


@dataclass(frozen=True)
class Comparison:
    """Evaluations by name, in the order given."""

    rows: tuple[tuple[str, Evaluation], ...]

    header = ("checkpoint", "bits/weight", "bits/parameter", "MiB", "PPL", "KL", "top-1 agreement")

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells as text; a dash where a figure was not asked for."""
        return [
            (
                name,
                f"{e.bits_per_weight:.3f}",
                f"{e.bits_per_parameter:.3f}",
                f"{e.bytes / 2**20:.1f}",
                _with_error(e.ppl, e.ppl_stderr, 3),
                _with_error(e.kl, e.kl_stderr, 4),
                _with_error(e.top1_agreement, e.top1_agreement_stderr, 4),
            )
            for name, e in self.rows
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """One object a checkpoint."""
        return [{"checkpoint": name} | e.to_json() for name, e in self.rows]

    def to_csv(self) -> str:
        """Full figures, one line a checkpoint."""
        rows = self.to_json()
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """The table as Markdown."""
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, ("---",) * len(self.header), *self.cells())]
        return "\n".join(lines) + "\n"


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def compare(
    checkpoints: Sequence[str | Path],
    *,
    text: str = EVAL_TEXT,
    seqlen: int = 2048,
    windows: int | None = None,
    against: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measure several checkpoints; see :func:`sordino.evaluate` for the arguments and errors."""
    for name in (*checkpoints, *([] if against is None else [against])):
        locate(name)  # a mistyped name is found now, not after minutes of measuring the others
    options: dict[str, Any] = {"text": load_text(text), "seqlen": seqlen, "windows": windows, "progress": progress}
    exact = None if against is None else reference(against, **options)
    rows = []
    for checkpoint in checkpoints:
        figures = evaluate(checkpoint, against=exact, **options)
        rows.append((str(checkpoint), figures))
    return Comparison(tuple(rows))
