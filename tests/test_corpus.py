"""Checks how texts are read and cut into windows."""

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sordino.corpus import DEFAULT_TEXT, EVAL_TEXT, Text, calibration_windows, eval_windows, load_text, tokenize
from sordino.errors import InputError

IDS = torch.arange(1000)


def refusal(spec: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        load_text(str(spec))
    assert caught.value.exit_code == 2
    assert str(spec) in str(caught.value)
    return str(caught.value)


def put(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("length", [1, 7, 25])
@pytest.mark.parametrize("seed", [0, 1, -1])
def test_calibration_windows_do_not_overlap(length: int, seed: int) -> None:
    windows = calibration_windows(IDS, length, 30, 6, seed)
    assert windows.shape == (36, length)
    assert windows.dtype == torch.int64
    # Token ids are positions here, so that disjoint ids are disjoint places (and held-out ones come from elsewhere).
    assert len(windows.unique()) == windows.numel()
    assert torch.equal(windows - windows[:, :1], torch.arange(length).expand(36, -1))
    assert bool((windows[:, 0] % length == 0).all())


def test_seeds_draw_different_windows() -> None:
    first, again, other = (calibration_windows(IDS, 10, 20, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first.sort(0).values, other.sort(0).values)


def test_the_whole_text_may_be_drawn() -> None:
    assert torch.equal(calibration_windows(IDS, 100, 8, 2, 3).sort(0).values, IDS.view(10, 100))
    assert len(calibration_windows(IDS[:999], 100, 9, 0, 3)) == 9


def test_extra_windows_come_last_as_many_as_the_text_has() -> None:
    first = calibration_windows(IDS, 100, 4, 2, 3)
    for extra, found in ((0, 6), (3, 9), (99, 10)):
        windows = calibration_windows(IDS, 100, 4, 2, 3, extra)
        assert torch.equal(windows[:6], first) and len(windows.unique(dim=0)) == len(windows) == found


def test_a_short_calibration_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError) as caught:
        calibration_windows(IDS, 100, 32, 4, 0)
    assert str(caught.value) == (
        "the calibration text has 1000 tokens = 10 windows of 100, but 36 are needed "
        "(32 to calibrate, 4 held out); give more text or --windows 6"
    )


@pytest.mark.parametrize("have", range(1, 100))
@pytest.mark.parametrize("guarded", [True, False])
def test_the_advice_is_the_largest_that_works(have: int, guarded: bool) -> None:
    def heldout(windows: int) -> int:
        return max(4, windows // 8) if guarded else 0  # as the plan has it

    with pytest.raises(InputError) as caught:
        calibration_windows(IDS[: have * 5], 5, 128, heldout(128), 0)
    advice = re.search(r"--windows (\d+)$", str(caught.value))
    if advice is None:
        assert str(caught.value).endswith("a shorter --seqlen than 5")
        assert have < 1 + heldout(1)
        return
    most = int(advice[1])
    assert len(calibration_windows(IDS[: have * 5], 5, most, heldout(most), 0)) <= have
    assert most + 1 + heldout(most + 1) > have


def test_eval_windows_are_the_first() -> None:
    assert torch.equal(eval_windows(IDS, 100, 3), IDS[:300].view(3, 100))
    for windows in (None, 10, 11):
        assert torch.equal(eval_windows(IDS, 90, windows), IDS[: 90 * (11 if windows != 10 else 10)].view(-1, 90))


def test_a_short_evaluation_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match="1000 tokens, less than one window of 1001"):
        eval_windows(IDS, 1001, None)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a"])
def test_plain_text_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    content = "Où?\r\n\r\n  Là. 😀\u2028{}\n"
    text = load_text(str(put(tmp_path / name, content)))
    assert text.content == content
    assert text.spec == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_rows_are_joined_by_a_blank_line(name: str, end: str, tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "one\ntwo", "other": 3}, "three", {"text": "fo\u2028u\x85r"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    assert load_text(str(put(tmp_path / name, content))).content == "one\ntwo\n\nthree\n\nfo\u2028u\x85r"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert load_text(str(put(tmp_path / "a.txt", "\ufeffabc"))).content == "abc"
    assert load_text(str(put(tmp_path / "a.jsonl", '\ufeff{"text": "abc"}'))).content == "abc"


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    one, same, other = (load_text(str(put(tmp_path / n, t))) for n, t in (("1", "abc"), ("2.gz", "abc"), ("3.gz", "abd")))
    assert one.digest == same.digest == "ba7816bf8f01cfea"
    assert other.digest != one.digest


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_texts_are_refused(name: str, content: str, tmp_path: Path) -> None:
    assert refusal(put(tmp_path / name, content)).endswith("is empty")


def test_rows_without_text_are_empty_too(tmp_path: Path) -> None:
    assert refusal(put(tmp_path / "a.jsonl", '""\n{"text": " "}')).endswith("is empty")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_other_encodings_are_refused(name: str, tmp_path: Path) -> None:
    assert "cannot be read: 'utf-8' codec" in refusal(put(tmp_path / name, "café".encode("latin-1")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('"a"\n\n{"txt": "b"}', "line 3 has no 'text' string"),
        ('{"text": 3}', "line 1 has no 'text' string"),
        ("[]", "line 1 has no 'text' string"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("1" * 5000, "line 1 is not JSON"),
        (r'{"text": "\ud800"}', "not UTF-8"),
    ],
)
def test_bad_rows_are_refused(content: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(put(tmp_path / "a.jsonl", content))


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    raw, path = gzip.compress(bytes(range(256)) * 9), tmp_path / "a.gz"
    for broken in (b"plain", raw[:40], raw[:10] + b"\xff" * 40, raw[:-8] + bytes(8)):
        path.write_bytes(broken)
        assert "cannot be read" in refusal(path)


def test_missing_texts_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.txt").endswith("is missing")
    assert "cannot be read" in refusal(tmp_path)  # a folder
    assert "cannot be read" in refusal("a\0b")


def test_builtin_texts_are_two_different_ones() -> None:
    calibration, evaluation = load_text(DEFAULT_TEXT), load_text(EVAL_TEXT)
    assert calibration.digest != evaluation.digest
    assert min(len(calibration.content), len(evaluation.content)) > 300_000
    shared = set(calibration.content.splitlines()) & set(evaluation.content.splitlines())
    assert sum(len(line) for line in shared) < 0.02 * len(evaluation.content)
    assert "there are builtin:pydoc, builtin:docstrings" in refusal("builtin:nothing")


def test_hub_texts_need_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("hub:some/name:config:split")


def test_tokenize_adds_no_special_tokens() -> None:
    def tokenizer(content: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in content]}

    ids = tokenize(Text("x", "ab", ""), tokenizer)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [97, 98]
