"""Local task files: every format is read, every broken row is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sordino.errors import InputError
from sordino.measure.local_tasks import LOCAL_TASKS, find_local, read_rows

ARC = {"question": "What is wet?", "choices": ["rock", "water", "sand"], "gold": 1}
ROWS: dict[str, dict[str, Any]] = {
    "piqa": {"goal": "open a door", "sol1": "push it", "sol2": "eat it", "label": 0},
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "winogrande": {"sentence": "The dog saw the cat and _ barked.", "option1": "dog", "option2": "cat", "answer": "1"},
    "hellaswag": {
        "query_cap": "Cooking: A man cuts an onion. He",
        "endings": ["weeps.", "flies.", "melts.", "rings."],
        "label": 0,
    },
    "boolq": {"question": "is water wet", "passage": "Water is wet.", "answer": True},
    "openbookqa": {"question_stem": "Water is", "choices": ["wet", "dry", "red", "old"], "gold": 0},
    "lambada_openai": {"text": "She drank the water because she was thirsty"},
    "mmlu": {"subject": "anatomy", "question": "Where is the heart?", "choices": ["chest", "foot", "hand", "ear"], "answer": 0},
}


def write(data: Path, name: str, *rows: Any) -> Path:
    task = LOCAL_TASKS[name]
    file = data / task.folder / task.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_read_plain_and_packed(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, ROWS[name], ROWS[name])
    plain = read_rows(LOCAL_TASKS[name], tmp_path)
    assert len(plain) == 2
    file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert read_rows(LOCAL_TASKS[name], tmp_path) == plain


def test_labels_of_a_file_of_their_own(tmp_path: Path) -> None:
    row = {k: v for k, v in ROWS["piqa"].items() if k != "label"}
    labels = write(tmp_path, "piqa", row, row).with_name("valid-labels.lst")
    labels.write_text("1\n0\n")
    assert [r["label"] for r in read_rows(LOCAL_TASKS["piqa"], tmp_path)] == [1, 0]
    labels.write_text("1\n")
    with pytest.raises(InputError, match=r"valid-labels.lst has 1 labels, valid.jsonl 2 rows"):
        read_rows(LOCAL_TASKS["piqa"], tmp_path)


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path: Path) -> None:
    row = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False).replace("three", "three four")
    write(tmp_path, "lambada", row + "\n\n" + row)
    assert len(read_rows(LOCAL_TASKS["lambada"], tmp_path)) == 2


def test_hellaswag_as_its_authors_publish_it(tmp_path: Path) -> None:
    row = {"activity_label": "Cooking", "ctx_a": "A man cuts.", "ctx_b": "he", "endings": ["a", "b"], "label": 1}
    write(tmp_path, "hellaswag", row)
    assert read_rows(LOCAL_TASKS["hellaswag"], tmp_path) == [row | {"label": "1"}]


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("piqa", {"goal": None}, "'goal' must be a text"),
        ("piqa", {"label": 2}, "'label' must be an index from 0 to 1"),
        ("piqa", {"label": True}, "'label'"),
        ("arc_easy", {"choices": ["one"]}, "'choices' must be a list"),
        ("arc_easy", {"choices": "abc"}, "'choices' must be a list"),
        ("arc_challenge", {"gold": 3}, "'gold' must be an index from 0 to 2"),
        ("winogrande", {"answer": "3"}, "'answer' must be 1 or 2"),
        ("winogrande", {"sentence": "no blank"}, "no blank '_'"),
        ("hellaswag", {"query_cap": "no colon"}, "activity: context"),
        ("boolq", {"answer": "yes"}, "true or false"),
        ("openbookqa", {"question_stem": ""}, "'question_stem'"),
        ("lambada", {"text": "one "}, "must end in the word"),
        ("mmlu", {"choices": ["a", "b"]}, "4 texts"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, name: str, change: dict[str, Any], word: str) -> None:
    row = ROWS[LOCAL_TASKS[name].name]
    file = write(tmp_path, name, row, row | change)
    with pytest.raises(InputError) as refused:
        read_rows(LOCAL_TASKS[name], tmp_path)
    assert f"{file} line 2" in str(refused.value) and word in str(refused.value)


@pytest.mark.parametrize(
    ("content", "word"), [("{", "line 1: not JSON"), ("[1]", "not a JSON object"), ("\n \n", "has no rows")]
)
def test_files_that_hold_no_rows(tmp_path: Path, content: str, word: str) -> None:
    write(tmp_path, "boolq", content)
    with pytest.raises(InputError, match=word):
        read_rows(LOCAL_TASKS["boolq"], tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    task = LOCAL_TASKS["boolq"]
    with pytest.raises(InputError, match=r"dev.jsonl is missing"):
        read_rows(task, tmp_path)
    file = write(tmp_path, "boolq", ROWS["boolq"])
    file.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(task, tmp_path)
    file.unlink()
    file.with_name("dev.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(task, tmp_path)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'winogrande'"):
        find_local("winogrand")
    with pytest.raises(InputError, match="did you mean 'winogrande'"):
        find_local("wino")
    with pytest.raises(InputError, match="there are piqa"):
        find_local("zzz")
    assert find_local("lambada").name == "lambada_openai"
