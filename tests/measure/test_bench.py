"""`sordino bench` on a tiny model: figures, ratios, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sordino
from sordino.cli import app
from sordino.errors import InputError
from sordino.measure.bench import Bench, bench
from sordino.measure.roofline import weight_bytes
from sordino.measure.workers import PRECISIONS, Speed
from sordino.runtime import kernels
from tiny import make_tiny


def test_ratios_are_medians_of_rounds() -> None:
    fast, slow = Speed("q", [1.0, 2.0, 1.0], [1.0, 1.0, 4.0], 7), Speed("bf16", [2.0, 2.0, 4.0], [3.0, 4.0, 4.0], 9)
    figures = Bench([fast], {"q": {"bf16": slow, "fp32": fast}}, 10, 4, 1).to_json()
    assert figures["prefill_tokens_per_s"] == 10.0 and figures["prefill_tokens_per_s_range"] == [5.0, 10.0]
    assert figures["decode_tokens_per_s"] == 4.0 and figures["time_to_first_token_s"] == 1.0
    assert figures["ratio_to_bf16"] == {"prefill": 2.0, "decode": 3.0}
    assert figures["ratio_to_fp32"] == {"prefill": 1.0, "decode": 1.0}
    assert figures["peak_memory_bytes"] == 7


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("rtn-w4", ("format.weights.group=32",)), ("prefixquant-w4a8kv4-dynamic", ("moves=[]", "guard=off"))],
)
def test_bench_measures_checkpoint_and_full_precision(recipe: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Of linears multiplied by themselves, and of a prompt that is one call."""
    model, out, file = make_tiny(tmp_path / "model", layers=2), tmp_path / "out", tmp_path / "speed.json"
    sordino.quantize(str(model), recipe, out, overrides=overrides, windows=8, seqlen=48)
    words = ["bench", str(out), str(model), "--prompt-tokens", "20", "--new-tokens", "3", "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert [m["model"] for m in figures["models"]] == [str(out), str(model), *(f"{p} twin" for p in PRECISIONS)]
    packed, full = figures["models"][0], figures["models"][2]
    assert packed["load_s"] > 0 and full["load_s"] is None
    assert 0 < packed["weight_bytes_per_token"] < full["weight_bytes_per_token"]
    assert 0 < figures["decode_share_of_read"] < 1 and 0 < figures["prefill_share_of_int8"] < 1
    assert set(figures["machine"]) == {"read_gb_per_s", "int8_gop_per_s", "bf16_gop_per_s"}
    assert full["kernel_share"] == {"prefill": 0, "decode": 0}
    assert all((0 < share < 1) == (kernels.active() is not None) for share in packed["kernel_share"].values())
    assert "this machine, 1 threads: reads" in result.output
    for row in figures["models"]:
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 and row["peak_memory_bytes"] > 1e7
    assert figures["threads"] == 1 and set(figures["ratio_to_bf16"]) == {"prefill", "decode"}


@pytest.mark.parametrize(("tied", "packed"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_token_reads_every_weight_but_a_table_that_is_not_the_head(tied: bool, packed: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1, tie_word_embeddings=tied)
    if packed:
        sordino.quantize(str(model), "rtn-w4", tmp_path / "out", overrides=("format.weights.group=32", "format.embeddings=8"))
    loaded = sordino.load(tmp_path / "out" if packed else str(model))[0]
    every = {t.data_ptr(): t.numel() * t.element_size() for t in (*loaded.parameters(), *loaded.buffers())}
    table = loaded.get_input_embeddings()
    apart = [] if tied else [*table.parameters(), *table.buffers()]
    assert weight_bytes(loaded) == sum(every.values()) - sum(t.numel() * t.element_size() for t in apart)


def test_too_long_a_prompt_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    with pytest.raises(InputError, match="600 tokens of prompt and answer are more than the 512 positions"):
        bench([model], prompt_tokens=500, new_tokens=100)


def test_a_broken_model_is_told_in_one_line(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=1)
    (model / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        bench([model], prompt_tokens=5, new_tokens=1)
