"""`sordino bench` on a tiny model: figures, ratios, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sordino
from sordino.cli import app
from sordino.errors import InputError
from sordino.measure.bench import PRECISIONS, Bench, Speed, bench
from tiny import make_tiny


def test_ratios_are_medians_of_rounds() -> None:
    fast, slow = Speed("q", [1.0, 2.0, 1.0], [1.0, 1.0, 4.0], 7), Speed("bf16", [2.0, 2.0, 4.0], [3.0, 4.0, 4.0], 9)
    figures = Bench([fast], {"q": {"bf16": slow, "fp32": fast}}, 10, 4, 1).to_json()
    assert figures["prefill_tokens_per_s"] == 10.0 and figures["prefill_tokens_per_s_range"] == [5.0, 10.0]
    assert figures["decode_tokens_per_s"] == 4.0 and figures["time_to_first_token_s"] == 1.0
    assert figures["ratio_to_bf16"] == {"prefill": 2.0, "decode": 3.0}
    assert figures["ratio_to_fp32"] == {"prefill": 1.0, "decode": 1.0}
    assert figures["peak_memory_bytes"] == 7


def test_bench_measures_checkpoint_and_full_precision(tmp_path: Path) -> None:
    model, out, file = make_tiny(tmp_path / "model", layers=2), tmp_path / "out", tmp_path / "speed.json"
    sordino.quantize(str(model), "rtn-w4", out, overrides=("format.weights.group=32",))
    words = ["bench", str(out), str(model), "--prompt-tokens", "20", "--new-tokens", "3", "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert [m["model"] for m in figures["models"]] == [str(out), str(model), *(f"{p} twin" for p in PRECISIONS)]
    for row in figures["models"]:
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 and row["peak_memory_bytes"] > 1e7
    assert figures["threads"] == 1 and set(figures["ratio_to_bf16"]) == {"prefill", "decode"}


def test_too_long_a_prompt_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    with pytest.raises(InputError, match="600 tokens of prompt and answer are more than the 512 positions"):
        bench([model], prompt_tokens=500, new_tokens=100)


def test_a_broken_model_is_told_in_one_line(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    (model / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        bench([model], prompt_tokens=5, new_tokens=1)
