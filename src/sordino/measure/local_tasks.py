"""Zero-shot tasks from local files: one folder a task, in the formats their authors publish (docs/tasks.md).

Rows come out as the columns that lm-evaluation-harness' own task of that name reads, so that its prompts and scoring apply
unchanged. A row that does not fit is named by file and line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sordino.errors import InputError, nearest, reason

Row = dict[str, Any]


class _Broken(Exception):
    """What is wrong with a row."""


@dataclass(frozen=True)
class LocalTask:
    """A task that can be read from files.

    Attributes:
        name: of the task in lm-evaluation-harness; of a group, of the group.
        home: folder of the task's definition in lm-evaluation-harness, under ``lm_eval/tasks``.
        folder: under the data folder.
        file: rows, one JSON object a line.
        convert: from a row of the file to the columns that the definition reads.
        labels: file with one label a line, where they are kept apart; rows of the file may have ``label`` instead.
    """

    name: str
    home: str
    folder: str
    file: str
    convert: Callable[[Row], Row]
    labels: str | None = None


def read_rows(task: LocalTask, data: Path) -> list[Row]:
    """All rows of a task.

    Raises:
        InputError: if a file is missing, unreadable or empty, or a row does not fit, naming file and line.
    """
    file, lines = _lines(data / task.folder / task.file)
    rows = [_parse(file, n, line) for n, line in lines]
    if task.labels is not None and rows and "label" not in rows[0]:
        origin, labels = _lines(data / task.folder / task.labels)
        if len(labels) != len(rows):
            raise InputError(f"{origin} has {len(labels)} labels, {file.name} {len(rows)} rows")
        rows = [row | {"label": label.strip()} for row, (_, label) in zip(rows, labels, strict=True)]
    converted = []
    for (n, _), row in zip(lines, rows, strict=True):
        try:
            converted.append(task.convert(row))
        except _Broken as error:
            raise InputError(f"{file} line {n}: {error}") from None
    if not converted:
        raise InputError(f"{file} has no rows")
    return converted


def find_local(name: str) -> LocalTask:
    """The task of a name.

    Raises:
        InputError: with the nearest name, if there is none.
    """
    if name not in LOCAL_TASKS:
        hint = nearest(name, LOCAL_TASKS, f"there are {', '.join(LOCAL_TASKS)}", like=0.5)
        raise InputError(f"no task '{name}' that can be read from --task-data{hint}")
    return LOCAL_TASKS[name]


def _lines(path: Path) -> tuple[Path, list[tuple[int, str]]]:
    """The file (or its ``.gz``) and its lines that are not blank, with their numbers."""
    packed = path.with_name(path.name + ".gz")
    file = path if path.is_file() or not packed.is_file() else packed
    try:
        raw = gzip.decompress(file.read_bytes()) if file is packed else file.read_bytes()
        # Not splitlines: texts may hold other line separators of Unicode.
        return file, [(n, line) for n, line in enumerate(raw.decode("utf-8-sig").split("\n"), 1) if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path} is missing (its .gz too); docs/tasks.md says what the files look like") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {reason(error)}") from None


def _parse(file: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{file} line {number}: not JSON") from None
    if not isinstance(row, dict):
        raise InputError(f"{file} line {number}: not a JSON object")
    return row


# Columns


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _Broken(f"'{key}' must be a text that is not empty")
    return value


def _texts(row: Row, key: str, size: int | None = None) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v for v in value):
        raise _Broken(f"'{key}' must be a list of two or more texts")
    if size is not None and len(value) != size:
        raise _Broken(f"'{key}' must have {size} texts, not {len(value)}")
    return value


def _index(row: Row, key: str, choices: int) -> int:
    """An index from 0; labels files and some data sets write it as text."""
    value = row.get(key)
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < choices:
        raise _Broken(f"'{key}' must be an index from 0 to {choices - 1}, not {value!r}")
    return number


def _piqa(row: Row) -> Row:
    return {k: _text(row, k) for k in ("goal", "sol1", "sol2")} | {"label": _index(row, "label", 2)}


def _lettered(row: Row, question: str) -> Row:
    """Choices in the form of the ARC data set: texts with letters, and the letter of the right one."""
    choices = _texts(row, "choices")
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    key = letters[_index(row, "gold", len(choices))]
    return {question: _text(row, question), "choices": {"text": choices, "label": letters}, "answerKey": key}


def _winogrande(row: Row) -> Row:
    answer, sentence = str(row.get("answer")), _text(row, "sentence")
    if answer not in ("1", "2"):
        raise _Broken(f"'answer' must be 1 or 2, not {row.get('answer')!r}")
    if "_" not in sentence:
        raise _Broken("'sentence' has no blank '_'")
    return {"sentence": sentence, "answer": answer} | {k: _text(row, k) for k in ("option1", "option2")}


def _hellaswag(row: Row) -> Row:
    endings = _texts(row, "endings")
    label = str(_index(row, "label", len(endings)))
    if "query_cap" not in row:  # as the authors publish it
        parts = {k: _text(row, k) for k in ("activity_label", "ctx_a")} | {"ctx_b": str(row.get("ctx_b", ""))}
        return parts | {"endings": endings, "label": label}
    activity, colon, context = _text(row, "query_cap").partition(": ")
    if not colon:
        raise _Broken("'query_cap' must read 'activity: context'")
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": endings, "label": label}


def _boolq(row: Row) -> Row:
    """As in SuperGLUE, which the harness reads: the title, a file of its own authors keeps it apart, opens the passage."""
    answer, passage = row.get("answer"), _text(row, "passage")
    if not isinstance(answer, bool):
        raise _Broken(f"'answer' must be true or false, not {answer!r}")
    if "title" in row and not passage.startswith(opening := f"{_text(row, 'title')} -- "):
        passage = opening + passage
    return {"question": _text(row, "question"), "passage": passage, "label": int(answer)}


def _lambada(row: Row) -> Row:
    text = _text(row, "text")
    if not text.split(" ")[-1].strip() or " " not in text:
        raise _Broken("'text' must end in the word to guess, after a space")
    return {"text": text}


def _mmlu(row: Row) -> Row:
    choices = _texts(row, "choices", 4)
    texts = {"question": _text(row, "question"), "subject": _text(row, "subject")}
    return texts | {"choices": choices, "answer": _index(row, "answer", 4)}


def _table(tasks: Iterable[LocalTask]) -> dict[str, LocalTask]:
    return {t.name: t for t in tasks}


LOCAL_TASKS = _table(
    [
        LocalTask("piqa", "piqa", "piqa", "valid.jsonl", _piqa, "valid-labels.lst"),
        LocalTask("arc_easy", "arc", "arc_easy", "test.jsonl", lambda row: _lettered(row, "question")),
        LocalTask("arc_challenge", "arc", "arc_challenge", "test.jsonl", lambda row: _lettered(row, "question")),
        LocalTask("winogrande", "winogrande", "winogrande", "dev.jsonl", _winogrande),
        LocalTask("hellaswag", "hellaswag", "hellaswag", "val.jsonl", _hellaswag),
        LocalTask("boolq", "super_glue/boolq", "boolq", "dev.jsonl", _boolq),
        LocalTask("openbookqa", "openbookqa", "openbookqa", "test.jsonl", lambda row: _lettered(row, "question_stem")),
        LocalTask("lambada_openai", "lambada", "lambada", "test.jsonl", _lambada),
        LocalTask("mmlu", "mmlu/default", "mmlu", "test.jsonl", _mmlu),
    ]
)
LOCAL_TASKS["lambada"] = LOCAL_TASKS["lambada_openai"]
