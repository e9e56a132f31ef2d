"""Zero-shot accuracy through lm-evaluation-harness, and paired differences to full precision.

On a few hundred items the difference of two accuracies is mostly noise that both models share: whether an item is hard. So
every item's score is kept, and differences come with an interval from a bootstrap over items, the same items for both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino.errors import InputError

Progress = Callable[[str, int, int], None]
_RESAMPLES = 10_000
_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of two models' scores on the same items: ours minus theirs, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskScore:
    """Figures of a task.

    Attributes:
        figures: metric -> value, and ``{metric}_stderr`` where there is one; perplexities count too.
        items: metric -> the score of every item, in the order of the data, for metrics that are 0 or 1.
        samples: how many items.
    """

    figures: dict[str, float]
    items: dict[str, tuple[float, ...]]
    samples: int

    @property
    def metric(self) -> str:
        """What published tables show: accuracy by log-likelihood a character where there is one, else accuracy."""
        return next((m for m in ("acc_norm", "acc") if m in self.figures), next(iter(self.figures)))

    @property
    def value(self) -> float:
        """The figure of :attr:`metric`."""
        return self.figures[self.metric]

    @property
    def stderr(self) -> float | None:
        """Its standard error."""
        return self.figures.get(f"{self.metric}_stderr")


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model on several tasks.

    Attributes:
        tasks: by name, in the order asked for.
        seconds: wall time of the model on all of them.
    """

    tasks: dict[str, TaskScore]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean of the tasks' main figures, each task counting the same."""
        return sum(t.value for t in self.tasks.values()) / len(self.tasks)

    @property
    def mean_stderr(self) -> float | None:
        """Its standard error; None if a task has none."""
        errors = [t.stderr for t in self.tasks.values()]
        return math.sqrt(sum(e * e for e in errors if e is not None)) / len(errors) if None not in errors else None

    def difference(self, other: TaskScores, task: str, metric: str) -> Difference | None:
        """Ours minus another model's on one task; None where the metric is not counted by items.

        Raises:
            InputError: if the two were not measured on the same items.
        """
        return _summary([_drawn(task, self.tasks[task].items.get(metric), other.tasks[task].items.get(metric))])

    def mean_difference(self, other: TaskScores) -> Difference | None:
        """Ours minus another model's mean over the tasks; items are drawn anew within every task."""
        pairs = [(n, t.items.get(t.metric), other.tasks[n].items.get(t.metric)) for n, t in self.tasks.items()]
        return _summary([_drawn(*pair) for pair in pairs])

    def to_json(self, other: TaskScores | None = None) -> dict[str, Any]:
        """Task -> metric -> figure, with ``_difference``, ``_difference_low`` and ``_difference_high`` to ``other`` beside."""
        rows: dict[str, Any] = {}
        for name, task in self.tasks.items():
            row: dict[str, Any] = task.figures | {"samples": task.samples}
            for metric in task.items if other is not None else ():
                assert other is not None
                row |= _flat(metric, self.difference(other, name, metric))
            rows[name] = row
        return rows

    def mean_to_json(self, other: TaskScores | None = None) -> dict[str, Any]:
        """The mean's figures in the same form."""
        row: dict[str, Any] = {"mean": self.mean, "mean_stderr": self.mean_stderr}
        return row if other is None else row | _flat("mean", self.mean_difference(other))


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data has been read, to be run on any number of models.

    Attributes:
        suite: of the harness.
        limit: how many items of each task from the start; None for all.
    """

    suite: Any
    limit: int | None

    def run(self, model: Any, tokenizer: Any, progress: Progress | None = None) -> TaskScores:
        """Score a loaded model.

        Args:
            model: as :func:`sordino.load` gives it; its own dtype and attention function are used.
            tokenizer: the same.
            progress: called with ("tasks", requests done, all requests).
        """
        started = time.time()
        found = _harness().run_suite(self.suite, model, tokenizer, self.limit, progress)
        scores = {n: _score(n, found["results"][n], found["samples"], leaves) for n, leaves in self.suite.tops.items()}
        return TaskScores(scores, round(time.time() - started, 2))


def open_tasks(names: Sequence[str], data: str | Path | None = None, limit: int | None = None) -> Tasks:
    """Read the data of tasks.

    Args:
        names: piqa, arc_easy, arc_challenge, winogrande, hellaswag, boolq, openbookqa, lambada, mmlu; without ``data``, any
            name that lm-evaluation-harness knows.
        data: folder with one folder a task, see docs/tasks.md; None takes the harness' own data from the hub.
        limit: how many items of each task from the start.

    Raises:
        InputError: if lm-evaluation-harness is not installed, a name is unknown, or data is missing or broken.
    """
    if not names:
        raise InputError("no task is named; write e.g. --tasks piqa,arc_easy")
    if data is not None and not Path(data).is_dir():
        raise InputError(f"--task-data {data} is not a folder")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least 1")
    return Tasks(_harness().open_suite(list(dict.fromkeys(names)), None if data is None else Path(data)), limit)


def _harness() -> ModuleType:
    try:
        from sordino.measure import harness
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sordino"):
            raise
        raise InputError(f"tasks need lm-evaluation-harness ({error.name} is missing): pip install 'sordino[eval]'") from None
    return harness


def _score(name: str, result: Mapping[str, Any], samples: Mapping[str, Any], leaves: Sequence[str]) -> TaskScore:
    """Our form of the harness' figures: "acc,none" is acc; other filters stay in the name."""
    figures = {}
    for key, value in result.items():
        if isinstance(value, float) and "," in key:
            figures[key.removesuffix(",none")] = value
    if not figures:
        raise InputError(f"group '{name}' has no figure of its own; name its tasks: {', '.join(leaves[:5])} …")
    rows = [row for leaf in leaves for row in samples[leaf]]
    items = {m: tuple(float(row[m]) for row in rows) for m in figures if all(row.get(m) in (0, 1) for row in rows)}
    return TaskScore(figures, items, len(rows))


# Paired differences


def _drawn(task: str, ours: Sequence[float] | None, theirs: Sequence[float] | None) -> tuple[float, NDArray[np.float64]] | None:
    """The mean difference over items, and what it is when as many items are drawn from them with replacement, [R]."""
    if ours is None or theirs is None:
        return None
    if len(ours) != len(theirs):
        raise InputError(f"{task}: {len(ours)} items of one model, {len(theirs)} of the other; measure both on the same data")
    values, counts = np.unique(np.subtract(ours, theirs), return_counts=True)  # at most -1, 0 and 1
    seed = np.random.default_rng([len(ours), *counts])  # the same figures give the same interval
    draws = seed.multinomial(len(ours), counts / len(ours), size=_RESAMPLES)
    return float(values @ counts) / len(ours), draws @ values / len(ours)


def _summary(drawn: Sequence[tuple[float, NDArray[np.float64]] | None]) -> Difference | None:
    """Mean of some tasks' differences with its interval."""
    parts = [d for d in drawn if d is not None]
    if len(parts) < len(drawn):
        return None
    means = np.mean([d for _, d in parts], axis=0)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Difference(sum(value for value, _ in parts) / len(parts), float(low), float(high))


def _flat(name: str, d: Difference | None) -> dict[str, float]:
    return (
        {}
        if d is None
        else {
            f"{name}_difference": d.value,
            f"{name}_difference_low": d.low,
            f"{name}_difference_high": d.high,
        }
    )
