"""Rotations of values, keys and down_proj's input keep the function on every family, through the whole path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.errors import InputError
from sordino.recipe import Recipe, load_recipe
from tiny import FAMILIES, assert_same_function, assert_seen_in_the_walk, make_tiny

PLAIN = ["format.weights.bits=16", "guard=off"]
SMALL: dict[str, Any] = {"windows": 4, "seqlen": 32}
BOTH = 'moves=[{move="rotate", size="full"}, {move="rotate-inner"}]'


def turned(moves: str) -> Recipe:
    return load_recipe("rtn-w4", [*PLAIN, moves])


@pytest.mark.parametrize("ffn", [96, 172])  # 172 = 4 * 43: no Hadamard matrix of any order that divides it but 4
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_unchanged(family: str, ffn: int, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2, hidden_size=96, num_attention_heads=6, ffn=ffn)
    moves = BOTH if family != "olmo2" else 'moves=[{move="rotate-inner"}]'
    sordino.quantize(str(model), turned(moves), tmp_path / "out", **SMALL)
    names = ("mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj")
    exact, ours, ids = assert_same_function(model, tmp_path / "out", [f"model.layers.1.{n}" for n in names])
    assert torch.equal(exact.generate(ids, max_new_tokens=16), ours.generate(ids, max_new_tokens=16))


@pytest.mark.parametrize("option", ["values", "keys", "down"])
def test_each_alone_keeps_the_function(option: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    others = ", ".join(f"{o}=false" for o in ("values", "keys", "down") if o != option)
    sordino.quantize(str(model), turned(f'moves=[{{move="rotate-inner", {others}}}]'), tmp_path / "out", **SMALL)
    exact, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("model", "out"))
    ids = torch.randint(2, 300, (2, 20))
    with torch.no_grad():
        a, b = exact(ids).logits, ours(ids).logits
    assert (a - b).norm() <= 1e-4 * a.norm()
    assert ours.config.quantization_config.inner == [option]


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    with pytest.raises(InputError, match="more than one move rotates the inside"):
        twice = 'moves=[{move="rotate-inner"}, {move="rotate-inner"}]'
        sordino.quantize(str(model), turned(twice), tmp_path / "out", **SMALL)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_calibration_sees_what_the_rotated_rounded_checkpoint_does(family: str, kind: str, tmp_path: Path) -> None:
    """Everything at once: the divergence measured in the walk is what the checkpoint shows on the same windows."""
    model = make_tiny(tmp_path / "model", family, layers=2)
    made = load_recipe("gptq-w4", [
        "format.weights.group=channel", "format.weights.symmetric=true", f'format.activations={{bits=8, mode="{kind}"}}',
        f'format.kv={{bits=4, mode="{kind}", symmetric={"true" if kind == "static" else "false"}}}', BOTH, "guard=on",
    ])  # fmt: skip
    manifest = sordino.quantize(str(model), made, tmp_path / "out", windows=16, seqlen=48).manifest
    assert_seen_in_the_walk(model, tmp_path / "out", manifest)


@pytest.mark.parametrize("ffn", [96, 172])
def test_the_guards_baseline_is_the_same_model_rounded(ffn: int, tmp_path: Path) -> None:
    """A recipe that is RTN itself is exactly as good as the guard's RTN, rotated online or not."""
    model = make_tiny(tmp_path / "model", layers=2, ffn=ffn)
    made = load_recipe("rtn-w4", ["format.activations={bits=8, mode='dynamic'}", 'moves=[{move="rotate-inner"}]'])
    manifest = sordino.quantize(str(model), made, tmp_path / "out", windows=16, seqlen=32).manifest
    for block in manifest["blocks"]:
        assert block["error"] == pytest.approx(block["rtn_error"], rel=1e-5)
    assert manifest["guard"]["kl"] == pytest.approx(manifest["guard"]["rtn_kl"], rel=1e-5)


def test_a_column_scale_behind_an_online_rotation_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    with pytest.raises(InputError, match="'rotate-inner': down_proj has a column scale"):
        sordino.quantize(str(model), load_recipe("w3", ['moves=[{move="rotate-inner"}]']), tmp_path / "out", **SMALL)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["quarot-w4a4kv4", "prefixquant-w4a8kv4-static-tuned", "w4a8kv4"])
def test_fp16_models_store_what_was_calibrated(name: str, family: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, dtype=torch.float16, layers=2)
    made = load_recipe(name, ["format.weights.ignore=['*.0.mlp.down_proj']"])
    sordino.quantize(str(model), made, tmp_path / "out", windows=16, seqlen=32)
    ours, tokenizer = sordino.load(tmp_path / "out", dtype=torch.float32)
    ids = tokenizer("it still speaks", return_tensors="pt").input_ids
    assert torch.isfinite(ours(ids).logits).all()
