"""Several checkpoints on the same text and tasks, side by side, and what quality costs in size and speed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from sordino.contract import Progress
from sordino.corpus import EVAL_TEXT, load_text
from sordino.errors import InputError
from sordino.measure.bench import DECODED, PROMPT, bench, positions
from sordino.measure.evaluate import Evaluation, Reference, evaluate, prompt_beside, reference
from sordino.measure.tasks import Difference, Tasks, tasks_asked_for
from sordino.report.notebook import Figure, chosen, figure, table
from sordino.report.svg import Series
from sordino.runtime.prefix import prefix_ids, quantization_of
from sordino.walk.source import locate

_SIZES = 4  # columns before those of text and tasks
MEAN = "mean of tasks"


@dataclass(frozen=True)
class Trade:
    """One figure over what it costs.

    Attributes:
        cost: what x is: "MiB", of which less is better, or "decode tokens/s", of which more is.
        figure: what y is; less is better, but for a mean of tasks.
        points: (x, y, checkpoint).
    """

    cost: str
    figure: str
    points: tuple[tuple[float, float, str], ...]

    @property
    def series(self) -> list[Series]:
        """What to draw: the points, and a line along the frontier."""
        return [Series(self.figure, self.points, self.frontier)]

    @property
    def frontier(self) -> list[tuple[float, float]]:
        """The points that no other one beats, from the cheapest on."""
        signs = (1 if self.cost == "MiB" else -1), (-1 if self.figure == MEAN else 1)
        kept: list[tuple[float, float]] = []
        finite = [p for p in self.points if math.isfinite(p[0]) and math.isfinite(p[1])]
        for x, y, _ in sorted(finite, key=lambda p: (signs[0] * p[0], signs[1] * p[1])):
            if not kept or signs[1] * y < signs[1] * kept[-1][1]:
                kept.append((x, y))
        return kept


@dataclass(frozen=True)
class Comparison:
    """Evaluations by name, in the order given, all on the same text and tasks.

    Attributes:
        rows: (name, evaluation).
        text: what the text is called; None if only tasks were asked for.
        speeds: speed of each row in tokens a second, and its ratios to full precision, as ``sordino bench`` has them; empty if
            not asked for.
    """

    rows: tuple[tuple[str, Evaluation], ...]
    text: str | None = None
    speeds: tuple[dict[str, Any], ...] = ()

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the table's columns; those of text and tasks only where they were asked for."""
        first, tasks = self.rows[0][1], self.rows[0][1].tasks
        text = ("PPL", "KL", "top-1 agreement") if first.ppl is not None else ()
        scores = [] if tasks is None else [*(f"{n} {t.metric}" for n, t in tasks.tasks.items()), MEAN]
        paired = ["difference of means [95 %]"] if tasks is not None and first.tasks_against is not None else []
        speed = ("prefill tokens/s", "decode tokens/s", "decode × bf16") if self.speeds else ()
        return ("checkpoint", "bits/weight", "bits/parameter", "MiB", *text, *scores, *paired, *speed)

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells as text; a dash where a figure was not asked for."""
        return [
            (
                name,
                f"{e.bits_per_weight:.3f}",
                f"{e.bits_per_parameter:.3f}",
                f"{e.bytes / 2**20:.1f}",
                *(_text_cells(e) if e.ppl is not None else ()),
                *_task_cells(e),
                *(_speed_cells(self.speeds[i]) if self.speeds else ()),
            )
            for i, (name, e) in enumerate(self.rows)
        ]

    def tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """Header and cells in parts that a terminal has room for: size and text, then tasks, then speed."""
        header, cells, first = self.header, self.cells(), self.rows[0][1]
        text = _SIZES + (len(_text_cells(first)) if first.ppl is not None else 0)
        ends = list(dict.fromkeys((text, text + len(_task_cells(first)), len(header))))
        spans = [slice(1, ends[0]), *(slice(*pair) for pair in pairwise(ends))]
        parts = [((header[0], *header[s]), [(row[0], *row[s]) for row in cells]) for s in spans]
        return [*parts, *self.differences()]

    def differences(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """Header and cells of the paired differences to the reference, task by task; nothing where there is none."""
        tasks = self.rows[0][1].tasks
        if tasks is None or self.rows[0][1].tasks_against is None or len(tasks.tasks) < 2:  # of one task it is the mean's
            return []
        header = ("checkpoint", *(f"{n} {t.metric}, difference [95 %]" for n, t in tasks.tasks.items()))
        return [(header, [(name, *_difference_cells(e)) for name, e in self.rows])]

    def notes(self) -> list[str]:
        """What a reader should know of single checkpoints before reading their figures."""
        found = []
        for name, e in self.rows:
            tasks = {} if e.tasks is None else e.tasks.tasks
            if any(math.isnan(x) for x in (0.0 if e.ppl is None else e.ppl, *(t.value for t in tasks.values()))):
                found.append(f"{name} answers with what is no number (NaN): a weight is broken, or too large for its dtype.")
            for task, score in tasks.items():
                if score.cut:
                    found.append(
                        f"{name}, {task}: {score.cut} contexts are longer than its positions and lost their beginning."
                    )
        return found

    def to_json(self) -> list[dict[str, Any]]:
        """One object a checkpoint."""
        speeds = self.speeds or ({},) * len(self.rows)
        return [{"checkpoint": name} | e.to_json() | speed for (name, e), speed in zip(self.rows, speeds, strict=True)]

    def to_csv(self) -> str:
        """Full figures, one line a checkpoint; a task's are named ``tasks.piqa.acc``."""
        rows = [_flat(row) for row in self.to_json()]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """The table as Markdown."""
        rows = (self.header, ("---",) * len(self.header), *self.cells())
        return "".join("| " + " | ".join(map(_plain, row)) + " |\n" for row in rows)

    def plots(self) -> dict[str, Trade]:
        """Quality over size, and over speed where that was measured, for each kind of figure."""
        kinds: dict[str, Callable[[Evaluation], float | None]] = {
            "perplexity": lambda e: e.ppl,
            "KL to the reference, nats a token": lambda e: e.kl,
            MEAN: lambda e: None if e.tasks is None else e.tasks.mean,
        }
        costs = {"": ("MiB", [e.bytes / 2**20 for _, e in self.rows])}
        if self.speeds:
            costs[" over speed"] = ("decode tokens/s", [s["decode_tokens_per_s"] for s in self.speeds])
        found: dict[str, Trade] = {}
        for over, (cost, xs) in costs.items():
            for label, of in kinds.items():
                points = [(x, y, name) for x, (name, e) in zip(xs, self.rows, strict=True) if (y := of(e)) is not None]
                found |= {label + over: Trade(cost, label, tuple(points))} if points else {}
        return found

    def figure(self, label: str | None = None) -> Figure:
        """One of the plots, with a line through the checkpoints that no other one beats.

        Args:
            label: which of :meth:`plots`; the first one if not given.

        Raises:
            InputError: if that was not measured.
        """
        trade = chosen(self.plots(), label)
        return figure(trade.series, trade.cost, trade.figure, lines=False, log_x=True)

    def _repr_html_(self) -> str:
        return table(self.cells(), self.header)


def _text_cells(e: Evaluation) -> tuple[str, ...]:
    return (
        _with_error(e.ppl, e.ppl_stderr, 3),
        _with_error(e.kl, e.kl_stderr, 4),
        _with_error(e.top1_agreement, e.top1_agreement_stderr, 4),
    )


def _task_cells(e: Evaluation) -> tuple[str, ...]:
    if e.tasks is None:
        return ()
    scores = [_with_error(t.value, t.stderr, 3) for t in e.tasks.tasks.values()]
    cells = (*scores, _with_error(e.tasks.mean, e.tasks.mean_stderr, 3))
    if e.tasks_against is None:
        return cells
    return (*cells, _difference_cell(e.tasks.mean_difference(e.tasks_against)))


def _difference_cells(e: Evaluation) -> list[str]:
    assert e.tasks is not None and e.tasks_against is not None
    return [_difference_cell(e.tasks.difference(e.tasks_against, name, task.metric)) for name, task in e.tasks.tasks.items()]


def _difference_cell(d: Difference | None) -> str:
    return "–" if d is None else f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def _speed_cells(row: dict[str, Any]) -> tuple[str, ...]:
    twin = row["ratio_to_bf16"]
    ratio = "–" if twin is None else f"{twin['decode']:.2f}"
    return f"{row['prefill_tokens_per_s']:.0f}", f"{row['decode_tokens_per_s']:.0f}", ratio


def _plain(cell: str) -> str:
    """A cell of a Markdown table in which a name cannot end the cell or become a tag."""
    return escape(cell, quote=False).replace("|", "\\|").replace("\n", " ")


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _flat(row: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Cells of one line: a table's entries by their path, a range by its ends; what was not asked for has no cell."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}{key}.")
        elif isinstance(value, list | tuple):
            flat |= {f"{path}{key}_low": value[0], f"{path}{key}_high": value[-1]}
        elif key != "tasks":
            flat[path + key] = value
    return flat


def compare(
    checkpoints: Sequence[str | Path] | str | Path,
    *,
    text: str | Path | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    against: str | Path | None = None,
    prefix_from: str | Path | None = None,
    tasks: Tasks | str | Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    speed: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Measure several checkpoints; see :func:`sordino.evaluate` for the arguments and errors.

    ``prefix_from`` gives its prefix to full-precision models; checkpoints keep what they have. ``speed`` measures that too, all
    in turns (:func:`sordino.measure.bench.bench`).
    """
    checkpoints = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    # A mistyped name is found now, not after minutes of measuring the others.
    prefixes = [None if quantization_of(locate(name)) else prefix_from for name in checkpoints]
    if against is not None:
        locate(against)
    if prefix_from is not None:
        prefix_ids(locate(prefix_from))
        if not any(prefixes):
            raise InputError("a prefix is put before full-precision models, and there is none among these")
    suite = tasks_asked_for(tasks, task_data, limit)
    content = load_text(text or EVAL_TEXT) if text is not None or suite is None else None
    options: dict[str, Any] = {"text": content, "seqlen": seqlen, "windows": windows, "progress": progress}
    exact: Reference | None = None
    rows = []
    for checkpoint, prefix in zip(checkpoints, prefixes, strict=True):
        if against is not None and (exact is None or exact.behind != prompt_beside(checkpoint, against)):
            exact = reference(against, tasks=suite, behind=prompt_beside(checkpoint, against), **options)
        figures = evaluate(checkpoint, against=exact, prefix_from=prefix, tasks=suite or (), **options)
        rows.append((str(checkpoint) if prefix is None else f"{checkpoint} + prefix", figures))
    return Comparison(tuple(rows), None if content is None else content.spec, _speeds(checkpoints, progress) if speed else ())


def _speeds(checkpoints: Sequence[str | Path], progress: Progress | None) -> tuple[dict[str, Any], ...]:
    """Speed of each checkpoint: tokens a second with their range over rounds, ratios to full precision, memory."""
    limits = [positions(name) for name in checkpoints]
    tokens = min([PROMPT, *(limit - DECODED for limit in limits if limit is not None)])
    found = bench(checkpoints, prompt_tokens=max(1, tokens), new_tokens=DECODED, progress=progress)
    rows = {speed.name: found.row(speed) for speed in found.models}
    return tuple({k: v for k, v in rows[str(name)].items() if k != "model"} for name in checkpoints)
