"""lm-evaluation-harness, with our models and, if wanted, local data: the only file that imports it (extra ``[eval]``).

Prompts, choices, metrics and aggregation are the harness' own definitions; only the data set behind one is swapped. The
model is its Hugging Face wrapper around a model that :func:`sordino.load` has loaded, so a prefix and rounded inputs stay on.

Requests of equal length share a batch and nothing is padded: then every score is, to the last bit in bf16 and to 1e-6 in
fp32, what the harness computes at its own default of one request at a time. Padding would change it (torch's attention works
in blocks of 32 keys, and bf16 scores show it), and so would reading a context once for all of its answers.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import torch
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from sordino.contract import Progress
from sordino.errors import InputError, nearest, reason
from sordino.measure.local_tasks import LOCAL_TASKS, LocalTask, Row, find_local, read_rows
from sordino.runtime.prefix import prefix_length

Request = tuple[Any, list[int], list[int]]  # (texts, context ids, continuation ids)

_HOME = Path(lm_eval.tasks.__file__).parent
_BATCH_TOKENS = 1024
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it warns of is done on purpose here, or counted
lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)  # bars of half a second, whatever the caller wants


@dataclass(frozen=True)
class Suite:
    """Tasks that are ready to be run.

    Attributes:
        tops: names that figures are given for: tasks, and groups that were asked for as such, with their tasks' names.
        tasks: the harness' task objects by name.
        groups: its groups by name.
    """

    tops: dict[str, tuple[str, ...]]
    tasks: dict[str, Any]
    groups: dict[str, Any]


def open_suite(names: Sequence[str], data: Path | None) -> Suite:
    """Read tasks, from local files or from the hub under the harness' own names.

    Raises:
        InputError: if a name is unknown or no figure belongs to it, a file is missing or broken, or the hub has no data.
    """
    loaded = [_open_local(find_local(n), data) for n in names] if data is not None else _open_hub(names)
    tops: dict[str, tuple[str, ...]] = {}
    suite = Suite(tops, {}, {})
    for found in loaded:
        suite.tasks.update(found["tasks"])
        suite.groups.update(found.get("groups", {}))
        inner = {name for g in found.get("groups", {}).values() for name in g.child_names}
        tops.update({g.name: _leaves(g) for g in found.get("groups", {}).values() if g.name not in inner})
        grouped = {name for leaves in tops.values() for name in leaves}
        tops.update({name: (name,) for name in found["tasks"] if name not in grouped})
    for name, leaves in tops.items():
        if name in suite.groups and not suite.groups[name].aggregate_metric_list:
            raise InputError(f"group '{name}' has no figure of its own; name its tasks: {', '.join(leaves[:5])} …")
    for name, task in suite.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            raise InputError(f"task '{name}' is scored by what a model writes; Sordino runs those scored by log-likelihood")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return suite


def run_suite(suite: Suite, model: Any, tokenizer: Any, limit: int | None, progress: Progress | None) -> dict[str, Any]:
    """The harness' own results for a model: ``results`` by task or group and ``samples`` by task; and ``cut`` and ``broken``.

    Raises:
        InputError: if an answer is longer than the model's positions, or its tokenizer neither begins nor ends a text.
    """
    task_dict = {
        "tasks": suite.tasks,
        "groups": suite.groups,
        "group_map": {name: group.child_names for name, group in suite.groups.items()},
    }
    reader = Reader(model, tokenizer, progress)
    with redirect_stdout(sys.stderr):  # our figures alone go there
        found: dict[str, Any] = evaluate(reader, task_dict, limit=limit, log_samples=True)
    return found | {"cut": reader.cut, "broken": reader.broken}


class Reader(HFLM):  # type: ignore[misc]
    """The harness' wrapper of a loaded transformers model; batches hold requests of one length.

    Args:
        model: as :func:`sordino.load` gives it.
        tokenizer: the same.
        progress: called with ("tasks", requests done, all requests).

    Attributes:
        cut: by task, of how many requests the context is longer than the model's positions; the harness drops its beginning.
        broken: tasks with a score that is no number.
    """

    def __init__(self, model: Any, tokenizer: Any, progress: Progress | None = None):
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise InputError("tasks need a tokenizer with a token that begins or ends a text; this model's has neither")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH_TOKENS)
        self.cut: Counter[str] = Counter()
        self.broken: set[str] = set()
        self._asked: list[tuple[str, int]] = []  # task and item of each request
        self._max_length = self.max_length - prefix_length(model)  # a prefix takes its places
        self._progress = progress
        self._kept = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores of (context, continuation) pairs, without the harness' bars."""
        self._asked = [(request.task_name, request.doc_id) for request in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self.broken |= {task for (task, _), (score, _) in zip(self._asked, found, strict=True) if math.isnan(score)}
        self._asked = []
        return found

    def _check(self, requests: list[Request]) -> None:
        """Refuse answers that the model has no positions for, and count contexts that lose their beginning."""
        room = int(self._max_length)
        for (task, item), (_, context, answer) in zip(self._asked, requests, strict=True):
            if len(answer) > room:
                before = prefix_length(self.model)
                behind = f" behind its prefix of {before}" if before else ""
                raise InputError(
                    f"{task}: item {item} has an answer of {len(answer)} tokens, the model {room} positions{behind}"
                )
            self.cut[task] += len(context) + len(answer) > room + 1

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._asked:  # else parts of a long text
            self._check(requests)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for batch in self._batches(requests):
            part = [requests[i] for i in batch]
            self._kept = max(len(continuation) for _, _, continuation in part)
            found = super()._loglikelihood_tokens(part, disable_tqdm=True)
            for i, answer in zip(batch, found, strict=True):
                answers[i] = answer
            done += len(batch)
            if self._progress is not None:
                self._progress("tasks", done, len(requests))
        self._kept = 0
        return answers

    def _batches(self, requests: list[Request]) -> Iterator[list[int]]:
        """Numbers of requests whose inputs are of one length, longest first; equal inputs stand together, to be read once."""

        def length(i: int) -> int:
            return min(len(requests[i][1]) + len(requests[i][2]) - 1, int(self.max_length))

        order = sorted(range(len(requests)), key=lambda i: (-length(i), requests[i][1] + requests[i][2]))
        batch: list[int] = []
        for i in order:
            if batch and (length(i) != length(batch[0]) or (len(batch) + 1) * length(i) > _BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _model_call(self, inps: Any, **options: Any) -> Any:
        """Logits [B, K, V] of the last K positions, those that some request of the batch is scored at (all if K is 0)."""
        if options:
            return super()._model_call(inps, **options)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=self._kept, use_cache=False).logits


# Local files


def _open_local(task: LocalTask, data: Path) -> dict[str, Any]:
    rows = read_rows(task, data)
    manager = TaskManager(include_path=str(_HOME / task.home), include_defaults=False)
    if task.name != "mmlu":
        try:
            found: dict[str, Any] = manager.load(_swapped(manager, task.name, rows))
        except Exception as error:  # its code for the published rows met others
            why = f"{type(error).__name__}: {reason(error)}"
            raise InputError(f"{data / task.folder}: lm-evaluation-harness cannot make items of these rows ({why})") from None
        return found
    group = Group.from_config(GroupConfig(group="mmlu", aggregate_metric_list=[{"metric": "acc", "weight_by_size": True}]))
    known = {e.cfg["dataset_name"]: name for name, e in manager.task_index.items() if "dataset_name" in (e.cfg or {})}
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        if row["subject"] not in known:
            raise InputError(f"{data / task.folder}: MMLU has no subject '{row['subject']}'")
        subjects.setdefault(row["subject"], []).append(row)
    for subject, part in sorted(subjects.items()):
        for member in manager.load(_swapped(manager, known[subject], part))["tasks"].values():
            group.add(member)
    found = manager.load(group)
    return found


def _swapped(manager: Any, name: str, rows: list[Row]) -> dict[str, Any]:
    """The harness' definition of a task, with our rows in place of its data set."""
    config: dict[str, Any] = load_yaml(manager.task_index[name].yaml_path)
    split = config.get("test_split") or config["validation_split"]
    config |= {"training_split": None, "fewshot_split": None, "fewshot_config": None}
    config |= {"validation_split": split, "test_split": None}  # one split is all there is
    config["custom_dataset"] = partial(_dataset, split, rows)
    return config


def _dataset(split: str, rows: list[Row], **_: Any) -> dict[str, Any]:
    return {split: datasets.Dataset.from_list(rows)}


# The hub


def _open_hub(names: Sequence[str]) -> list[dict[str, Any]]:
    names = [LOCAL_TASKS[name].name if name in LOCAL_TASKS else name for name in names]  # "lambada" is one of two there
    homes = [str(_HOME / task.home) for task in LOCAL_TASKS.values()]
    manager = TaskManager(include_path=homes, include_defaults=False)
    if not all(name in manager.task_index for name in names):
        manager = TaskManager()  # reads 13,000 definitions, which takes seconds
    for name in names:
        if name not in manager.task_index:
            raise InputError(f"lm-evaluation-harness has no task '{name}'{nearest(name, manager.all_tasks, like=0.5)}")
    loaded = []
    for name in names:
        try:
            loaded.append(manager.load([name]))
        except Exception as error:  # whatever the hub's client and the data set's own code raise
            why = f"{type(error).__name__}: {reason(error)}"
            raise InputError(
                f"the data of task '{name}' cannot be had from the hub ({why}); give files with --task-data"
            ) from None
    return loaded


def _leaves(group: Any) -> tuple[str, ...]:
    return tuple(task.task_name for task in group.get_all_tasks())
