"""Rounded inputs through the main path: what calibration simulated is what the checkpoint computes, in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sordino
from sordino.corpus import DEFAULT_TEXT, calibration_windows, load_text, tokenize
from sordino.errors import InputError
from sordino.numerics.inputs import InputGrid, encode
from sordino.recipe import MoveSpec, Recipe, load_recipe
from sordino.runtime.modules import QuantLinear
from tiny import make_tiny

SMALL: dict[str, Any] = {"windows": 16, "seqlen": 48}


def recipe(mode: str, bits: int, *moves: str, base: str = "rtn-w4", group: str = "channel") -> Recipe:
    mode, _, parts = mode.partition(", ")
    inputs = f", group='{parts}'" if parts == "auto" else ", symmetric=false" if parts else ""
    overrides = [f"format.activations={{bits={bits}, mode='{mode}'{inputs}}}", f"format.weights.group='{group}'"]
    overrides += ["format.weights.symmetric=true"] * (group == "channel")
    made = load_recipe(base, overrides)
    return made.model_copy(update={"moves": tuple(MoveSpec(move=m) for m in moves)}) if moves else made


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("weights", [2, 3, 4, 8])
def test_integer_product_equals_the_simulated_one(weights: int, mode: str, bits: int) -> None:
    rng = torch.Generator().manual_seed(weights)
    linear = QuantLinear(32, 24, True, weights, 32, True, inputs={"bits": bits, "mode": mode})
    linear.weight_packed.copy_(torch.randint(-(2**31), 2**31, linear.weight_packed.shape, generator=rng))
    linear.weight_scale.copy_(torch.rand(24, 1, generator=rng) + 0.1)
    assert linear.bias is not None
    linear.bias.data.normal_(generator=rng)
    x = torch.randn(3, 5, 32, generator=rng)
    linear.input_scale.fill_(0.2 if mode == "static" else 0.9)
    scale = torch.tensor([0.2]) if mode == "static" else InputGrid(bits).fit(x, 0.9)[0]
    expected = torch.nn.functional.linear(encode(x, scale, bits) * scale, linear.dequantize(torch.float32), linear.bias)
    assert float((linear(x) - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2"])
@pytest.mark.parametrize(("mode", "group", "base"), [
    ("dynamic", "channel", "rtn-w4"), ("static", "channel", "gptq-w4"), ("static", "auto", "gptaq-w3"),
    ("dynamic", "auto", "w2"), ("dynamic, auto", "auto", "gptq-w4"), ("dynamic, auto", "channel", "w2"),
    ("dynamic, zero points", "channel", "w2"),
])  # fmt: skip
def test_what_calibration_saw_is_what_ships(mode: str, group: str, base: str, family: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", family, layers=2)
    moves = ("tune", "distill") if base == "w2" else ("mean-shift",) if base == "gptaq-w3" and family != "olmo2" else ()
    made = recipe(mode, 8, *moves, base=base, group=group)
    manifest = sordino.quantize(str(model), made, tmp_path / "out", **SMALL).manifest
    ours, tokenizer = sordino.load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(model)
    size = sordino.evaluate(tmp_path / "out", windows=1, seqlen=16).bits_per_weight
    assert size == pytest.approx(manifest["bits_per_weight"])
    if base != "rtn-w4":
        windows = calibration_windows(tokenize(load_text(DEFAULT_TEXT), tokenizer), 48, 16, 4, 0)[16:]
        with torch.no_grad():
            q, p = (m(windows).logits.log_softmax(-1) for m in (ours, plain))
        assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(manifest["guard"]["kl"], rel=2e-3)
    if "zero" in mode:
        assert all(
            g["inputs"] == {"bits": 8, "mode": "dynamic", "symmetric": False} for g in ours.config.quantization_config.groups
        )
    if "auto" in mode:
        assert ours.model.layers[1].mlp.down_proj.input_scale.shape == (3,)  # groups of 32 in 96 channels
        assert {g["inputs"].get("group") for g in ours.config.quantization_config.groups} == {None, 32}  # 64: the whole token
    if mode == "static":
        found = [b["inputs"] for b in manifest["blocks"]]
        assert all(set(f) == {"qkv", "o", "gate_up", "down"} for f in found)
        layer = ours.model.layers[1]
        assert float(layer.mlp.down_proj.input_scale) == pytest.approx(found[1]["down"]["scale"])
        assert float(layer.self_attn.q_proj.input_scale) == float(layer.self_attn.v_proj.input_scale)


def test_a_static_scale_is_the_best_of_its_candidates(tmp_path: Path) -> None:
    """Changing any one searched scale of the first block makes that block's output worse, on the text it was searched on."""
    model = make_tiny(tmp_path / "model", layers=1)
    made = load_recipe(recipe("static", 4), ["format.weights.bits=8"])
    manifest = sordino.quantize(str(model), made, tmp_path / "out", **SMALL).manifest
    shares = {site: note["share"] for site, note in manifest["blocks"][0]["inputs"].items()}
    assert all(0.2 <= s <= 1.0 for s in shares.values()) and any(s < 1.0 for s in shares.values())
    ours, tokenizer = sordino.load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(model)
    windows = calibration_windows(tokenize(load_text(DEFAULT_TEXT), tokenizer), 48, 16, 4, 0)[:16]
    scale, seen = ours.model.layers[0].mlp.down_proj.input_scale, []
    with torch.no_grad():
        exact = plain.model(windows).last_hidden_state
        for factor in (0.4, 1.0, 3.0):
            scale.mul_(factor)
            seen.append(float((ours.model(windows).last_hidden_state - exact).norm()))
            scale.div_(factor)
    assert seen[1] < seen[0] and seen[1] < seen[2]


def test_static_and_dynamic_round_to_the_widths_they_say(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", layers=2)
    for mode in ("static", "dynamic"):
        sordino.quantize(str(model), recipe(mode, 3), tmp_path / mode, **SMALL)
        ours, _ = sordino.load(tmp_path / mode)
        kinds = {type(m) for n, m in ours.model.layers.named_modules() if n.endswith("_proj")}
        assert kinds == {QuantLinear}
        assert all(m.inputs == InputGrid(3, mode == "static") for m in ours.modules() if isinstance(m, QuantLinear))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_static_scales_survive_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype=dtype, layers=2)
    manifest = sordino.quantize(str(model), recipe("static", 8), tmp_path / "out", **SMALL).manifest
    ours, _ = sordino.load(tmp_path / "out")
    ours.save_pretrained(tmp_path / "again")
    for loaded in (ours, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        for layer, report in zip(loaded.model.layers, manifest["blocks"], strict=True):
            assert float(layer.mlp.down_proj.input_scale) == report["inputs"]["down"]["scale"]


def test_w8a8_is_close_to_full_precision_and_needs_no_text(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model")
    result = sordino.quantize(str(model), "w8a8", tmp_path / "out")
    assert result.manifest["guard"] == {}
    kl = sordino.evaluate(tmp_path / "out", windows=2, seqlen=48, against=model).kl
    assert kl is not None and kl < 2e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["format.activations.bits=8", "format.weights.bits=16"], "nothing would be rounded"),
        (["format.activations={bits=8, mode='static', clip=0.9}"], "a static scale is searched"),
        (["format.activations={bits=8, mode='static', symmetric=false}"], "static scales are symmetric"),
        (["format.activations.bits=5"], "format.activations.bits"),
    ],
)
def test_formats_that_say_nothing_are_refused(changes: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        sordino.quantize(str(make_tiny(tmp_path / "model")), load_recipe("rtn-w4", changes), tmp_path / "out", **SMALL)


def test_engines_without_them_are_named() -> None:
    from sordino.walk.doctor import examine

    for recipe_, word in (("w8a8", "rounded inputs"), ("gptq-w4", "prefix")):
        overrides = ('moves=[{move="prefix"}]',) if word == "prefix" else ()
        with pytest.raises(InputError, match=word):
            examine("smollm2", recipe_, overrides, ("vllm",))
