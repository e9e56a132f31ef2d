"""Zero-shot accuracy through lm-evaluation-harness, and paired differences to full precision.

On a few hundred items the difference of two accuracies is mostly noise that both models share: whether an item is hard. So
every item's score is kept, and differences come with an interval from a bootstrap over items, the same items for both, and
with McNemar's exact p-value. Few items on which the models differ make a plain bootstrap too sure (with 4 won and none lost
no draw is ever lost); half an item more on either side takes that off.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino.contract import Progress
from sordino.errors import InputError

_RESAMPLES = 10_000
_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of two models' scores on the same items: ours minus theirs.

    Attributes:
        value: the difference.
        low: lower end of its 95 % interval.
        high: upper end.
        p: McNemar's exact two-sided p-value; None for a mean over several tasks.
    """

    value: float
    low: float
    high: float
    p: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """Figures of a task.

    Attributes:
        figures: metric -> value, and ``{metric}_stderr`` where there is one; perplexities count too.
        items: metric -> the score of every item, in the order of the data, for metrics that are 0 or 1.
        samples: how many items.
        content: hash of the items, so that other items of the same number are not taken for these.
        cut: of how many requests (an item has several) the context, too long for the model's positions, lost its beginning.
    """

    figures: dict[str, float]
    items: dict[str, tuple[float, ...]]
    samples: int
    content: str = ""
    cut: int = 0

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
        """Ours minus another model's on one task; None where the metric is not counted by items, and to itself.

        Raises:
            InputError: if the two were not measured on the same items.
        """
        return _summary([self._drawn(other, task, metric)])

    def mean_difference(self, other: TaskScores) -> Difference | None:
        """Ours minus another model's mean over the tasks, likewise; items are drawn anew within every task."""
        return _summary([self._drawn(other, name, task.metric) for name, task in self.tasks.items()])

    def _drawn(self, other: TaskScores, name: str, metric: str) -> _Drawn | None:
        if other is self:
            return None
        ours, theirs = self.tasks[name], other.tasks.get(name)
        if theirs is None:
            raise InputError(f"{name}: only one of the two models was measured on it")
        if (ours.samples, ours.content) != (theirs.samples, theirs.content):
            sizes = f"{ours.samples} items of one model, {theirs.samples} of the other"
            raise InputError(f"{name}: not the same items ({sizes}); measure both on the same data")
        if metric not in ours.items or metric not in theirs.items:
            return None
        return _drawn(name, ours.items[metric], theirs.items[metric])

    def to_json(self, other: TaskScores | None = None) -> dict[str, Any]:
        """Task -> metric -> figure, with ``_difference``, ``_difference_low``, ``_high`` and ``_p`` to ``other`` beside."""
        rows: dict[str, Any] = {}
        for name, task in self.tasks.items():
            row: dict[str, Any] = task.figures | {"samples": task.samples} | ({"contexts_cut": task.cut} if task.cut else {})
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
        scores = {n: self._score(n, found) for n in self.suite.tops}
        return TaskScores(scores, round(time.time() - started, 2))

    def _score(self, name: str, found: Mapping[str, Any]) -> TaskScore:
        leaves = self.suite.tops[name]
        score = score_of(name, found["results"][name], found["samples"], leaves)
        if found["broken"].intersection(leaves):  # the harness would take the first answer for the likeliest
            return replace(score, figures=dict.fromkeys(score.figures, math.nan), items={})
        return replace(score, cut=sum(found["cut"][leaf] for leaf in leaves))


def open_tasks(names: str | Sequence[str], data: str | Path | None = None, limit: int | None = None) -> Tasks:
    """Read the data of tasks.

    Args:
        names: piqa, arc_easy, arc_challenge, winogrande, hellaswag, boolq, openbookqa, lambada, mmlu, in a list or between
            commas; without ``data``, any name that lm-evaluation-harness knows.
        data: folder with one folder a task, see docs/tasks.md; None takes the harness' own data from the hub.
        limit: how many items of each task from the start.

    Raises:
        InputError: if lm-evaluation-harness is not installed, a name is unknown, or data is missing or broken.
    """
    if isinstance(names, str):
        names = [name for part in names.split(",") if (name := part.strip())]
    if not names:
        raise InputError("no task is named; write e.g. --tasks piqa,arc_easy")
    if data is not None and not Path(data).is_dir():
        raise InputError(f"--task-data {data} is not a folder")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least 1")
    return Tasks(_harness().open_suite(list(dict.fromkeys(names)), None if data is None else Path(data)), limit)


def tasks_asked_for(tasks: Tasks | str | Sequence[str], data: str | Path | None, limit: int | None) -> Tasks | None:
    """What a measurement is given: opened tasks as they are, names as :func:`open_tasks` reads them, nothing for none."""
    return (tasks if isinstance(tasks, Tasks) else open_tasks(tasks, data, limit)) if tasks else None


def _harness() -> ModuleType:
    try:
        from sordino.measure import harness
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sordino"):
            raise
        raise InputError(f"tasks need lm-evaluation-harness ({error.name} is missing): pip install -e '.[eval]'") from None
    return harness


def score_of(name: str, result: Mapping[str, Any], samples: Mapping[str, Any], leaves: Sequence[str]) -> TaskScore:
    """Our form of the harness' figures: "acc,none" is acc; other filters stay in the name.

    Args:
        name: of a task or group.
        result: its entry of the harness' ``results``.
        samples: the harness' ``samples``, by task.
        leaves: names of the tasks in it.
    """
    figures = {}
    for key, value in result.items():
        if isinstance(value, float) and "," in key:
            figures[key.removesuffix(",none")] = value
    rows = [row for leaf in leaves for row in samples[leaf]]
    items = {m: tuple(float(row[m]) for row in rows) for m in figures if all(row.get(m) in (0, 1) for row in rows)}
    content = zlib.crc32("".join(row["doc_hash"] for row in rows).encode())
    return TaskScore(figures, items, len(rows), f"{content:08x}")


# Paired differences


@dataclass(frozen=True)
class _Drawn:
    """A task's mean difference over its items, and what it is when as many items are drawn with replacement, [R]."""

    value: float
    draws: NDArray[np.float64]
    p: float


def _drawn(task: str, ours: Sequence[float], theirs: Sequence[float]) -> _Drawn:
    """Draw items, each task from random numbers of its own: tasks with equal counts must not rise and fall together."""
    values = np.array([-1.0, 0.0, 1.0])
    apart = np.subtract(ours, theirs)
    counts = np.array([np.count_nonzero(apart == v) for v in values])
    chances = counts + np.array([0.5, 0.0, 0.5])
    seed = np.random.default_rng([zlib.crc32(task.encode()), *counts])  # the same figures give the same interval
    draws = seed.multinomial(len(ours), chances / chances.sum(), size=_RESAMPLES)
    return _Drawn(float(values @ counts) / len(ours), draws @ values / len(ours), mcnemar(int(counts[2]), int(counts[0])))


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value: how rare so uneven a split of the items on which two models differ is among equals.

    Example:
        >>> mcnemar(5, 0)
        0.0625
    """
    n, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << n))


def _summary(drawn: Sequence[_Drawn | None]) -> Difference | None:
    """Mean of some tasks' differences with its interval."""
    parts = [d for d in drawn if d is not None]
    if len(parts) < len(drawn):
        return None
    low, high = np.quantile(np.mean([d.draws for d in parts], axis=0), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    value = sum(d.value for d in parts) / len(parts)
    return Difference(value, float(low), float(high), parts[0].p if len(parts) == 1 else None)


def _flat(name: str, d: Difference | None) -> dict[str, float]:
    if d is None:
        return {}
    ends = {"": d.value, "_low": d.low, "_high": d.high, "_p": d.p}
    return {f"{name}_difference{end}": value for end, value in ends.items() if value is not None}
